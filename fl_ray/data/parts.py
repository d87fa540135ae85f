"""The disjoint parts of a data set (client, public, reserve, test) and the client part's partition."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from fl_ray.config import DataConfig
from fl_ray.data.classes import keep_classes
from fl_ray.data.datasets import ImageData, load
from fl_ray.data.partitioners import Resampled, partition
from fl_ray.data.rows import Partition, Rows
from fl_ray.data.statistics import label_counts
from fl_ray.errors import SettingError
from fl_ray.randomness import numpy_generator
from fl_ray.recipes import build

__all__ = ["FederatedData", "Split", "digest", "prepare", "split"]


def digest(images: np.ndarray, labels: np.ndarray) -> str:
    """A hash of images and labels."""
    made = hashlib.sha256(str(images.shape).encode())
    made.update(np.ascontiguousarray(images).tobytes())
    made.update(labels.tobytes())
    return made.hexdigest()


@dataclass(frozen=True)
class Split:
    """Row numbers of ``ImageData.images`` in each part; ``test`` is empty where the set has a test part itself."""

    clients: np.ndarray
    public: np.ndarray
    reserve: np.ndarray
    test: np.ndarray


@dataclass
class FederatedData:
    """Everything a run needs of its data.

    Attributes:
        images, labels: uint8 [N, C, H, W] and int64 [N]: the rows that ``partition``, ``held_out`` and ``public``
            number.
        test_images, test_labels: the global test part.
        partition: training rows of each client.
        held_out: rows kept for testing on each client (none where ``client_test_fraction`` is 0).
        public: rows that the server may use.
        reserve: rows that nobody but the control generator ``real`` uses.
        test_domains: int64 domain of each test image; None where the data set has none.
        synthetic_from: the first row of ``images`` that is a synthetic one; None: there are none.
    """

    source: ImageData
    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray
    partition: Rows
    held_out: Rows
    public: np.ndarray
    reserve: np.ndarray
    test_domains: np.ndarray | None = None
    synthetic_from: int | None = None

    def counts(self, clients: np.ndarray | None = None) -> np.ndarray:
        """Training samples of each class at the given clients (default: all), int64 [clients, classes]."""
        chosen = np.arange(len(self.partition)) if clients is None else clients
        return label_counts(self.partition, chosen, self.labels, self.num_classes)

    def with_synthetic(self, images: np.ndarray, amounts: np.ndarray) -> FederatedData:
        """The same with synthetic images at the clients, each image at one of them.

        Args:
            images: uint8 [sum of amounts, C, H, W], ordered by class and, within a class, by client.
            amounts: int64 [clients, classes].

        Raises:
            SettingError: the partition has no rows of its own for each client.
        """
        if not isinstance(self.partition, Partition):
            raise SettingError(
                "data.partition resampled: its clients share samples, and can't be given synthetic ones; take another"
            )
        by_class = amounts.T.ravel()  # class by class, client by client, as the images come
        labels = np.repeat(np.repeat(np.arange(amounts.shape[1]), len(amounts)), by_class)
        owners = np.repeat(np.tile(np.arange(len(amounts)), amounts.shape[1]), by_class)
        order, first = np.argsort(owners, kind="stable"), len(self.images)
        given = np.split(first + order, np.cumsum(amounts.sum(axis=1))[:-1])
        rows = [np.concatenate([self.partition.of(client), own]) for client, own in enumerate(given)]
        offsets = np.concatenate([[0], np.cumsum([len(own) for own in rows])])
        everything, all_labels = np.concatenate([self.images, images]), np.concatenate([self.labels, labels])
        return replace(
            self,
            source=replace(self.source, images=everything, labels=all_labels),
            images=everything,
            labels=all_labels,
            partition=Partition(np.concatenate(rows), offsets),
            synthetic_from=first,
        )

    @property
    def num_classes(self) -> int:
        return len(self.source.classes)

    def domains_of(self, client: int) -> np.ndarray | None:
        """Numbers of the domains that a client's training images are of; None where the data set has none."""
        domains = self.source.domains
        return None if domains is None else np.unique(domains[self.partition.of(client)])

    def client_name(self, client: int) -> str:
        """Its number, with its domain where it has one alone."""
        own, names = self.domains_of(client), self.source.domain_names
        one = own is not None and names is not None and len(own) == 1
        return f"client {client}, {names[own[0]]}" if one else f"client {client}"

    def tests_like(self, client: int) -> np.ndarray:
        """Test rows of the client's domains: what tells its own images from others is then not their domain."""
        own = self.domains_of(client)
        if own is None or self.test_domains is None:
            return np.arange(len(self.test_labels))
        return np.flatnonzero(np.isin(self.test_domains, own))

    def kinds(self, rows: np.ndarray, tests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A number for each training and each test row: the same where class and, where there are any, domain are."""
        labels, test_labels = self.labels[rows], self.test_labels[tests]
        if self.source.domains is None or self.test_domains is None:
            return labels, test_labels
        classes = self.num_classes
        return labels + classes * self.source.domains[rows], test_labels + classes * self.test_domains[tests]

    def public_like(self, client: int) -> np.ndarray:
        """Public rows of the client's domains."""
        own = self.domains_of(client)
        return self.public if own is None else self.public[np.isin(self.source.domains[self.public], own)]

    def server_part(self, name: Literal["public", "reserve", "none"]) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of a part that the server holds."""
        rows = np.empty(0, dtype=np.int64) if name == "none" else getattr(self, name)
        return self.images[rows], self.labels[rows]

    @property
    def public_images(self) -> np.ndarray:
        return self.images[self.public]

    @property
    def public_labels(self) -> np.ndarray:
        return self.labels[self.public]

    def public_digest(self) -> str:
        """A hash of the public images and labels."""
        return digest(self.public_images, self.public_labels)


def split(data: ImageData, config: DataConfig) -> Split:
    """Split by class (each class keeps its share in every part), from ``config.split_seed`` alone."""
    rng = numpy_generator(config.split_seed, "split")
    rows = np.arange(len(data.labels))
    if config.max_samples is not None and config.max_samples < len(rows):
        rows = np.sort(rng.permutation(rows)[: config.max_samples])
    public_from = _domains(data, config.public_domains)
    test_share = 0.0 if data.test_images is not None else config.test_fraction
    parts: dict[str, list[np.ndarray]] = {"clients": [], "public": [], "reserve": [], "test": []}
    for label in range(len(data.classes)):
        own = rng.permutation(rows[data.labels[rows] == label])
        tests = round(test_share * len(own))
        if public_from is None:
            fit = len(own) - tests
        else:  # those that may be public come first
            may = np.isin(data.domains[own[tests:]], public_from)
            own, fit = np.concatenate([own[:tests], own[tests:][may], own[tests:][~may]]), int(may.sum())
        publics = round(config.public_fraction * fit)
        if public_from is not None:  # no domain comes first in what is left
            own = np.concatenate([own[: tests + publics], rng.permutation(own[tests + publics :])])
        ends = np.cumsum([tests, publics, round(config.reserve_fraction * (len(own) - tests))])
        for name, chunk in zip(("test", "public", "reserve", "clients"), np.split(own, ends), strict=True):
            parts[name].append(chunk)
    made = Split(**{name: np.sort(np.concatenate(chunks)) for name, chunks in parts.items()})
    if data.test_images is None and len(made.test) == 0:
        raise SettingError(f"data.test_fraction is {config.test_fraction}, which leaves no test images; raise it")
    empty = sorted(set(range(len(data.classes))) - set(np.unique(data.labels[made.clients]).tolist()))
    if empty:
        raise SettingError(
            f"data: the split leaves the clients no samples of class {', '.join(data.classes[c] for c in empty)}; "
            "lower data.public_fraction, data.reserve_fraction and data.test_fraction, or raise data.max_samples"
        )
    return made


def _domains(data: ImageData, names: list[str] | None) -> list[int] | None:
    """Domains by number."""
    if names is None:
        return None
    known = data.domain_names or []
    unknown = sorted(set(names) - set(known))
    if unknown or not names:
        raise SettingError(f"data.public_domains is {names}, but the data's domains are {', '.join(known) or 'none'}")
    return [known.index(name) for name in names]


def prepare(config: DataConfig, seed: int) -> FederatedData:
    """Load, split and partition.

    Args:
        config: the recipe's ``data``.
        seed: of the run; it fixes the partition, not the split.
    """
    data = load(config.name, config.root, config.download, config.settings)
    if config.classes is not None:
        data = keep_classes(data, config.classes)
    rows = split(data, config)
    partitioner = build("partition", config.partition)
    needs = getattr(partitioner, "needs", None)
    groups = getattr(data, needs) if needs else None
    if needs and groups is None:
        raise SettingError(
            f"data.partition {config.partition.name}: the data set {config.name} has no {needs}; use "
            "image_folder (data.owners gives natural clients), or another partition"
        )
    if isinstance(partitioner, Resampled):
        train, held_out = partitioner.rows(rows.clients, config.clients, seed, config.client_test_fraction)
    else:
        labels = data.labels[rows.clients]
        local = partition(partitioner, labels, config.clients, seed, groups[rows.clients] if needs else None)
        owned = replace(local, indices=rows.clients[local.indices])
        train, held_out = _hold_out(owned, config.client_test_fraction, seed)
    if data.test_images is not None and data.test_labels is not None:
        test_images, test_labels, domains = data.test_images, data.test_labels, data.test_domains
    else:
        test_images, test_labels = data.images[rows.test], data.labels[rows.test]
        domains = None if data.domains is None else data.domains[rows.test]
    parts = train, held_out, rows.public, rows.reserve, domains
    return FederatedData(data, data.images, data.labels, test_images, test_labels, *parts)


def _hold_out(owned: Partition, fraction: float, seed: int) -> tuple[Partition, Partition]:
    """Each client's samples in a training and a test part; every client keeps at least one for training."""
    if fraction == 0:
        return owned, Partition(np.empty(0, dtype=np.int64), np.zeros(len(owned) + 1, dtype=np.int64))
    rng = numpy_generator(seed, "client_test")
    rank = np.concatenate([rng.permutation(size) for size in owned.sizes])
    tests = np.minimum(np.round(fraction * owned.sizes), np.maximum(owned.sizes - 1, 0)).astype(np.int64)
    is_test = rank < np.repeat(tests, owned.sizes)

    def pick(mask: np.ndarray, sizes: np.ndarray) -> Partition:
        return Partition(owned.indices[mask], np.concatenate([[0], np.cumsum(sizes)]))

    return pick(~is_test, owned.sizes - tests), pick(is_test, tests)
