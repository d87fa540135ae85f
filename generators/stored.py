"""Generators that give out images which exist: kept class by class in the weights folder, and read from there."""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from generators.base import Block, Generator, Sampler, check_class, require_positive

__all__ = ["StoredGenerator", "store_images"]

_IMAGES, _COUNTS = "images.npy", "counts.npy"


class StoredGenerator(Generator):
    """Base of such generators; ``fit`` calls ``store_images``. ``block_size`` images are read together."""

    def __init__(self, block_size: int = 100) -> None:
        require_positive(block_size=block_size)
        self.block_size = block_size

    def sampling_settings(self) -> dict[str, Any]:
        return {"block_size": self.block_size}

    @abstractmethod
    def order(self, seed: int, label: int, count: int) -> np.ndarray:
        """The order in which a class's images 0..count-1 are given out, for a sampling seed."""

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _StoredSampler(self, folder)


class _StoredSampler(Sampler):
    def __init__(self, generator: StoredGenerator, folder: Path) -> None:
        self.generator = generator
        self.images = np.load(folder / _IMAGES, mmap_mode="r", allow_pickle=False)
        self.ends = np.cumsum(np.load(folder / _COUNTS, allow_pickle=False))

    def sample(self, block: Block) -> np.ndarray:
        check_class(block.label, len(self.ends))
        start = int(self.ends[block.label - 1]) if block.label else 0
        count, size = int(self.ends[block.label]) - start, self.generator.block_size
        first = block.number * size
        if first >= count:
            raise ValueError(f"class {block.label} has {count} images, so there is no image {first}")
        return self.images[start + self.generator.order(block.seed, block.label, count)[first : first + size]]


def store_images(
    folder: Path, classes: Iterable[Iterable[np.ndarray]], counts: np.ndarray, shape: tuple[int, ...]
) -> None:
    """Keep images in a weights folder.

    Args:
        classes: of each class, its images, uint8 ``shape`` ([C, H, W]).
        counts: how many of each class, int64 [classes].
    """
    whole = (int(counts.sum()), *shape)
    kept = np.lib.format.open_memmap(folder / _IMAGES, mode="w+", dtype=np.uint8, shape=whole)
    for row, image in enumerate(itertools.chain.from_iterable(classes)):
        kept[row] = image
    kept.flush()
    np.save(folder / _COUNTS, counts)
