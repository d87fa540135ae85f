"""Partitioners: which client owns which sample.

A partitioner is called with labels, the number of clients and a generator, and answers with the owner of every sample.
``partition`` draws again, a bounded number of times, while a client has fewer than ``min_samples``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from fl_ray.data.rows import Partition, Windows
from fl_ray.errors import SettingError
from fl_ray.randomness import numpy_generator

__all__ = [
    "IID",
    "DirichletPerClass",
    "DirichletPerClient",
    "DomainSkew",
    "LabelBlocks",
    "Natural",
    "Partitioner",
    "QuantitySkew",
    "Resampled",
    "Shards",
    "partition",
]

MAX_DRAWS = 1000


@dataclass
class Partitioner(ABC):
    """Base: fields are the settings of ``data.partition``; ``needs`` names an ImageData array that must be there."""

    min_samples: int = 1
    needs: ClassVar[str | None] = None

    def __post_init__(self) -> None:
        if self.min_samples < 0:
            raise ValueError(f"min_samples is {self.min_samples}, but it must be at least 0")

    @abstractmethod
    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        """The owner of every sample, int64 [samples]; -1 leaves a sample out. ``groups`` is the array of ``needs``."""


def partition(
    partitioner: Partitioner, labels: np.ndarray, clients: int, seed: int, groups: np.ndarray | None = None
) -> Partition:
    """Draw until every client has ``min_samples`` samples.

    Raises:
        SettingError: more clients than samples, or ``min_samples`` not met in MAX_DRAWS draws.
    """
    minimum = getattr(partitioner, "min_samples", 1)
    if clients > len(labels):
        raise SettingError(
            f"data.clients is {clients}, but there are only {len(labels)} client samples; use fewer clients"
        )
    if minimum * clients > len(labels):
        raise SettingError(
            f"data.partition.min_samples is {minimum}: {clients} clients would need {minimum * clients} samples, but "
            f"there are {len(labels)}; lower it or data.clients"
        )
    rng = numpy_generator(seed, "partition")
    smallest = 0
    for _ in range(MAX_DRAWS):
        try:
            owners = partitioner(labels, clients, rng, groups)
        except SettingError:
            raise
        except ValueError as error:
            raise SettingError(f"data.partition {error}") from error
        drawn = Partition.from_owners(owners, clients)
        smallest = max(smallest, int(drawn.sizes.min()))
        if drawn.sizes.min() >= minimum:
            return drawn
    raise SettingError(
        f"data.partition.min_samples is {minimum}, but in {MAX_DRAWS} draws the smallest client never had more than "
        f"{smallest} of the {len(labels)} samples; lower min_samples or data.clients, choose a milder skew, or leave "
        "clients more by data.public_fraction and data.test_fraction"
    )


def _deal(count: int, owners: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """``count`` samples dealt evenly, in random order, to ``owners``."""
    return rng.permutation(np.resize(owners, count))


def _cut(count: int, shares: np.ndarray) -> np.ndarray:
    """Owner of each of ``count`` samples in a row when client i gets the share ``shares[i]``."""
    ends = np.floor(np.cumsum(shares) * count + 1e-9).astype(np.int64)
    ends[-1] = count
    return np.repeat(np.arange(len(shares)), np.diff(ends, prepend=0))


@dataclass
class IID(Partitioner):
    """Equal parts of a shuffle."""

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        return _deal(len(labels), np.arange(clients), rng)


@dataclass
class _Dirichlet(Partitioner):
    alpha: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha}, but it must be positive (small: skewed, large: nearly even)")


@dataclass
class DirichletPerClass(_Dirichlet):
    """Label skew: the samples of each class are split over clients by one draw of Dir(alpha) (arXiv 1905.12022)."""

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        owners = np.empty(len(labels), dtype=np.int64)
        for label in np.unique(labels):
            rows = rng.permutation(np.flatnonzero(labels == label))
            owners[rows] = _cut(len(rows), rng.dirichlet(np.full(clients, self.alpha)))
        return owners


@dataclass
class DirichletPerClient(_Dirichlet):
    """Label skew: client i's class mix is a draw of Dir(alpha * prior), all clients of equal size (arXiv 1909.06335).

    Clients draw sample by sample from their mix; a class that has run out is taken out of every mix.
    """

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        classes, counts = np.unique(labels, return_counts=True)
        rows = {label: list(rng.permutation(np.flatnonzero(labels == label))) for label in classes}
        mixes = rng.dirichlet(np.maximum(self.alpha * counts / counts.mean(), 1e-6), size=clients)
        owners = np.full(len(labels), -1, dtype=np.int64)
        left = counts.copy()
        for client in rng.permutation(np.resize(np.arange(clients), len(labels))):
            shares = np.where(left > 0, mixes[client], 0.0)
            if shares.sum() <= 0:
                shares = left.astype(float)
            pick = int(rng.choice(len(classes), p=shares / shares.sum()))
            owners[rows[classes[pick]].pop()] = client
            left[pick] -= 1
        return owners


@dataclass
class Shards(Partitioner):
    """Every client gets ``classes_per_client`` shards, each of one class, so at most that many classes.

    As McMahan et al. (arXiv 1602.05629), but a shard never spans two classes.
    """

    classes_per_client: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes_per_client < 1:
            raise ValueError(f"classes_per_client is {self.classes_per_client}, but it must be at least 1")

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        classes, counts = np.unique(labels, return_counts=True)
        total = clients * self.classes_per_client
        if total < len(classes):
            raise ValueError(
                f"shards: {clients} clients x {self.classes_per_client} classes are fewer than the {len(classes)} "
                "classes; raise classes_per_client or data.clients"
            )
        # Largest remainders, at least one shard a class: shard sizes stay as equal as whole shards allow.
        ideal = counts / counts.sum() * total
        shards = np.maximum(1, np.floor(ideal)).astype(np.int64)
        while shards.sum() < total:
            shards[np.argmax(ideal - shards)] += 1
        while shards.sum() > total:
            shards[np.argmax(np.where(shards > 1, shards - ideal, -np.inf))] -= 1
        hands = rng.permutation(np.repeat(np.arange(clients), self.classes_per_client))
        owners = np.empty(len(labels), dtype=np.int64)
        first = 0
        for label, number in zip(classes, shards, strict=True):
            rows = rng.permutation(np.flatnonzero(labels == label))
            for shard, part in enumerate(np.array_split(rows, number)):
                owners[part] = hands[first + shard]
            first += number
        return owners


@dataclass
class LabelBlocks(Partitioner):
    """Classes in contiguous blocks, one block per client; with more clients than classes a block is shared evenly.

    With ``classes_per_client`` a client's block has so many classes, begun evenly over all of them and gone on with the
    first behind the last, so that blocks overlap; a class is dealt evenly to the clients that have it.
    """

    classes_per_client: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes_per_client is not None and self.classes_per_client < 1:
            raise ValueError(f"classes_per_client is {self.classes_per_client}, but it must be at least 1")

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        owners, classes = np.empty(len(labels), dtype=np.int64), np.unique(labels)
        if self.classes_per_client is not None:
            for label, holders in zip(classes, self._holders(len(classes), clients), strict=True):
                rows = np.flatnonzero(labels == label)
                owners[rows] = _deal(len(rows), holders, rng)
            return owners
        blocks = np.array_split(classes, min(clients, len(classes)))
        for number, block in enumerate(blocks):
            rows = np.flatnonzero(np.isin(labels, block))
            owners[rows] = _deal(len(rows), np.arange(number, clients, len(blocks)), rng)
        return owners

    def _holders(self, classes: int, clients: int) -> list[np.ndarray]:
        """The clients that have each class."""
        first = np.arange(clients) * classes // clients
        places = (np.arange(classes)[:, None] - first) % classes  # of a class behind a client's first
        held = places < self.classes_per_client
        if self.classes_per_client > classes or not held.any(axis=1).all():
            raise ValueError(
                f"label_blocks: classes_per_client is {self.classes_per_client}, but with {clients} clients and "
                f"{classes} classes it must be in {-(-classes // clients)}..{classes}, so that each class is somebody's"
            )
        return [np.flatnonzero(row) for row in held]


@dataclass
class QuantitySkew(_Dirichlet):
    """Equal class mixes, client sizes from one draw of Dir(alpha) (arXiv 2102.02079)."""

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        owners = np.empty(len(labels), dtype=np.int64)
        shares = rng.dirichlet(np.full(clients, self.alpha))
        owners[rng.permutation(len(labels))] = _cut(len(labels), shares)
        return owners


@dataclass
class DomainSkew(Partitioner):
    """Feature skew: client i's samples all come from domain i modulo the number of domains, dealt evenly."""

    needs: ClassVar[str | None] = "domains"

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        present = np.unique(groups)
        if clients < len(present):
            raise ValueError(
                f"domain: {clients} clients are fewer than the {len(present)} domains, which would leave data out; "
                "raise data.clients or list fewer data.domains"
            )
        owners = np.empty(len(labels), dtype=np.int64)
        for number, domain in enumerate(present):
            rows = np.flatnonzero(groups == domain)
            owners[rows] = _deal(len(rows), np.arange(number, clients, len(present)), rng)
        return owners


@dataclass
class Natural(Partitioner):
    """The data set's own clients, the ``data.clients`` with the smallest ids; others' samples are left out."""

    needs: ClassVar[str | None] = "owners"

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        ids, owners = np.unique(groups, return_inverse=True)
        if clients > len(ids):
            raise ValueError(f"natural: data.clients is {clients}, but the data set has {len(ids)} clients")
        return np.where(owners < clients, owners, -1)


@dataclass
class Resampled:
    """A population of any size over a finite set: each client's ``samples`` rows are a window of a random order.

    Clients share samples, so this is for studies of scale, not of how data are spread: what one client holds out,
    others train on.
    """

    samples: int = 50
    min_samples: int = 1

    def __post_init__(self) -> None:
        if self.samples < max(1, self.min_samples):
            raise ValueError(f"samples is {self.samples}, but it must be at least {max(1, self.min_samples)}")

    def rows(self, available: np.ndarray, clients: int, seed: int, test_fraction: float) -> tuple[Windows, Windows]:
        """Training and held-out rows of all clients, out of ``available``.

        Raises:
            SettingError: more samples than there are.
        """
        if self.samples > len(available):
            raise SettingError(
                f"data.partition.samples is {self.samples}, but there are {len(available)} client samples; lower it"
            )
        order = numpy_generator(seed, "partition").permutation(available)
        tests = min(round(test_fraction * self.samples), self.samples - 1)
        train = Windows(order, clients, self.samples - tests, seed)
        return train, Windows(order, clients, tests, seed, self.samples - tests)
