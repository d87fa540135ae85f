"""Randomness by key: (seed, purpose, round, client) fixes every draw, so placement and order can't change a result."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where it is used: a fleet or a cohort is drawn before torch is there
    import torch

__all__ = ["key_seed", "numpy_generator", "seeded_torch", "torch_generator"]


def _sequence(seed: int, purpose: str, *numbers: int) -> np.random.SeedSequence:
    return np.random.SeedSequence([seed, zlib.crc32(purpose.encode()), *numbers])


def key_seed(seed: int, purpose: str, *numbers: int) -> int:
    """A 63-bit seed for the key; equal keys give equal seeds on every machine. All numbers are non-negative."""
    return int(_sequence(seed, purpose, *numbers).generate_state(1, np.uint64)[0] >> 1)


def numpy_generator(seed: int, purpose: str, *numbers: int) -> np.random.Generator:
    """A numpy generator for the key."""
    return np.random.default_rng(_sequence(seed, purpose, *numbers))


def torch_generator(seed: int, purpose: str, *numbers: int) -> torch.Generator:
    """A CPU torch generator for the key."""
    import torch

    return torch.Generator().manual_seed(key_seed(seed, purpose, *numbers))


@contextmanager
def seeded_torch(seed: int, purpose: str, *numbers: int) -> Iterator[None]:
    """Seed torch's global generators (dropout, initialisation draw from them) by the key; restore them afterwards."""
    import torch

    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(key_seed(seed, purpose, *numbers))
        yield
