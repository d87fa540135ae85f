"""Which rows of the data belong to which client: in compact arrays, or computed where a population is of any size."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["Partition", "Rows", "Windows"]

_MASK = 2**64 - 1


class Rows(ABC):
    """Which rows of the data belong to which client."""

    @abstractmethod
    def __len__(self) -> int:
        """Clients."""

    @abstractmethod
    def of(self, client: int) -> np.ndarray:
        """The sample indices of one client."""

    @property
    @abstractmethod
    def sizes(self) -> np.ndarray:
        """Samples per client, int64 [clients]."""

    @abstractmethod
    def owned(self) -> np.ndarray:
        """All rows that clients own, each once, ascending."""

    @abstractmethod
    def digest(self) -> str:
        """A short hash: equal for equal partitions."""


@dataclass(frozen=True)
class Partition(Rows):
    """Samples of all clients in two compact arrays: client i owns ``indices[offsets[i]:offsets[i + 1]]``."""

    indices: np.ndarray
    offsets: np.ndarray

    @classmethod
    def from_owners(cls, owners: np.ndarray, clients: int) -> Partition:
        """From the owner of every sample (-1: nobody's)."""
        order = np.argsort(owners, kind="stable")
        sizes = np.bincount(owners[owners >= 0], minlength=clients)
        return cls(order[len(owners) - sizes.sum() :], np.concatenate([[0], np.cumsum(sizes)]))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def of(self, client: int) -> np.ndarray:
        return self.indices[self.offsets[client] : self.offsets[client + 1]]

    @cached_property
    def sizes(self) -> np.ndarray:
        return np.diff(self.offsets)

    def owned(self) -> np.ndarray:
        return np.sort(self.indices)

    def digest(self) -> str:
        return hashlib.sha256(self.indices.tobytes() + self.offsets.tobytes()).hexdigest()[:12]


@dataclass(frozen=True)
class Windows(Rows):
    """Every client owns a window of ``samples`` rows in one random ``order``, at a place hashed from its number.

    Nothing is stored per client, so a population may be of any size; clients' windows overlap.
    """

    order: np.ndarray
    clients: int
    samples: int
    seed: int
    skip: int = 0
    """The window begins so many rows behind the hashed place."""

    def __len__(self) -> int:
        return self.clients

    def of(self, client: int) -> np.ndarray:
        place = _mix(self.seed, client) + self.skip
        return self.order[np.arange(place, place + self.samples) % len(self.order)]

    @property
    def sizes(self) -> np.ndarray:
        return np.broadcast_to(np.int64(self.samples), (self.clients,))

    def owned(self) -> np.ndarray:
        return np.sort(self.order)

    def digest(self) -> str:
        parts = f"windows {self.clients} {self.samples} {self.seed} {self.skip}".encode()
        return hashlib.sha256(parts + self.order.tobytes()).hexdigest()[:12]


def _mix(seed: int, client: int) -> int:
    """A 40-bit hash of (seed, client): SplitMix64's finaliser."""
    z = (seed * 0x9E3779B97F4A7C15 + client * 0xD1B54A32D192ED03 + 0x632BE59BD9B4E019) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return (z ^ (z >> 31)) >> 24
