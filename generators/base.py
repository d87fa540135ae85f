"""What a generator is: classes and counts in, images and labels out, every image fixed by (seed, class, index).

Images come in *blocks*: block b of a class holds its images b * size ... (b + 1) * size - 1, always made together. So a
sample does not depend on how many are asked for, in which order, or by how many actors they are made.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

__all__ = ["Block", "Generator", "Sampler", "TrainingImages", "block_seed", "settings_digest"]


@dataclass(frozen=True)
class TrainingImages:
    """What a generator is trained on: uint8 [N, C, H, W], int64 [N], class names, and a hash of it all."""

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    digest: str


@dataclass(frozen=True, order=True)
class Block:
    """Block ``number`` of class ``label``, for sampling seed ``seed``."""

    seed: int
    label: int
    number: int


class Sampler(ABC):
    """A loaded generator on one device."""

    @abstractmethod
    def sample(self, block: Block) -> np.ndarray:
        """The block's images, uint8 [block size, C, H, W]."""


class Generator(ABC):
    """Settings of a generator, and how to train and load it. Constructor arguments are the recipe's settings."""

    block_size: int

    @abstractmethod
    def training_settings(self) -> dict[str, Any]:
        """The settings that decide the trained weights."""

    @abstractmethod
    def sampling_settings(self) -> dict[str, Any]:
        """The settings that decide the images, given the weights."""

    @abstractmethod
    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        """Train on ``data`` and store into ``folder``; ``progress(step, steps, loss)`` is told how far it is."""

    @abstractmethod
    def load(self, folder: Path, device: torch.device) -> Sampler:
        """A sampler of the weights stored in ``folder``."""


def block_seed(block: Block) -> int:
    """The seed of the block's noise: 63 bits from (seed, class, number)."""
    sequence = np.random.SeedSequence([block.seed, block.label, block.number])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def settings_digest(*parts: Any) -> str:
    """A hash of settings (JSON values), the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
