"""What clients tell the server of their labels, once in a run: counts, presence alone, or noisy counts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from fl_ray.data.parts import FederatedData
from fl_ray.data.statistics import emd
from fl_ray.randomness import numpy_generator

__all__ = ["LabelSharing", "SharedLabels", "add_laplace"]

LabelSharing = Literal["counts", "presence", "noisy"]
_COUNT_BYTES = 8


def add_laplace(counts: np.ndarray, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Counts with Laplace noise of scale 2/epsilon, rounded; int64 [classes], which may be negative.

    The Laplace mechanism (Dwork et al., TCC 2006). Neighbouring data sets have one sample replaced by another (their
    size is told besides, for FedAvg's shares, so a sample that is there or not could not be hidden): two counts change
    by 1, so the sensitivity of the vector (L1) is 2 and it is epsilon-differentially private as a whole. Rounding comes
    after the noise and costs nothing.
    """
    return np.rint(counts + rng.laplace(0.0, 2 / epsilon, counts.shape)).astype(np.int64)


@dataclass(frozen=True)
class SharedLabels:
    """The clients' label statistics as the server knows them. Nothing that it computes of labels may use others.

    - ``counts``: the training samples of each class; 8 bytes a class.
    - ``presence``: which classes a client has, one bit a class. For distances a class that is there counts as 1; in
      sums a client's size, which is told besides for FedAvg's shares, is spread evenly over the classes that it has.
    - ``noisy``: ``add_laplace`` of the counts, drawn by key; 8 bytes a class. A client shares once, and all that
      follows is made of that one answer, so ``epsilon`` is what a client has spent in the whole run, whatever its
      rounds; answers of runs with another seed or ``epsilon`` are further answers, and what they spend adds up. It
      covers these statistics alone: sizes (FedAvg's rho_n) and updates are sent as always. The noise is simulated: who
      knows the run's seed can take it off again.

    What is negative is set to zero where a client's counts are looked at by themselves, and of sums only after they are
    taken: clipped before, each absent class of each client would add half the noise's scale.
    """

    data: FederatedData
    level: LabelSharing
    epsilon: float
    seed: int

    def of(self, clients: np.ndarray) -> np.ndarray:
        """What the given clients have told, at least 0; int64 [clients, classes]."""
        return np.maximum(0, self._told(clients))

    def total(self, clients: np.ndarray) -> np.ndarray:
        """How many samples the given clients have of each class, by what they have told; int64 [classes], >= 0."""
        told = self._told(clients)
        if self.level == "presence":
            sizes = self.data.partition.sizes[clients]
            return np.rint((told * (sizes / np.maximum(1, told.sum(axis=1)))[:, None]).sum(axis=0)).astype(np.int64)
        return np.maximum(0, told.sum(axis=0))

    def _told(self, clients: np.ndarray) -> np.ndarray:
        counts = self.data.counts(clients)
        if self.level == "presence":
            return (counts > 0).astype(np.int64)
        if self.level == "noisy":
            # By epsilon, too: of the same draws at two scales the counts themselves could be told.
            purpose = f"label_sharing/{float(self.epsilon)!r}"
            for place, client in enumerate(clients):
                rng = numpy_generator(self.seed, purpose, int(client))
                counts[place] = add_laplace(counts[place], self.epsilon, rng)
        return counts

    @cached_property
    def overall(self) -> np.ndarray:
        """What all clients together have told, at least 0; int64 [classes]."""
        return np.maximum(0, self._told(np.arange(len(self.data.partition))).sum(axis=0))

    def distances(self, clients: np.ndarray) -> np.ndarray:
        """EMD_n = sum_c |p_n(c) - p_g(c)| of each client, in [0, 2]."""
        return emd(self.of(clients), self.overall)

    @property
    def bytes_per_client(self) -> int:
        """What a client sends."""
        classes = self.data.num_classes
        return -(-classes // 8) if self.level == "presence" else _COUNT_BYTES * classes

    def note(self) -> dict[str, Any]:
        """For the summary; an ``epsilon_spent`` of None is no guarantee of privacy."""
        spent = self.epsilon if self.level == "noisy" else None
        note = {"level": self.level, "bytes_per_client": self.bytes_per_client, "epsilon_spent": spent}
        return note | ({"hides": "one sample replaced by another; not the size"} if spent is not None else {})
