"""Generators of a user's own: a file that costs an actor no more than torch to import."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from generators.base import Block, Generator, Sampler, TrainingImages


class FlatGenerator(Generator):
    """A generator: images of one tone, a tone per class, learned as the class's mean."""

    def __init__(self, block_size: int = 4, offset: int = 0) -> None:
        self.block_size, self.offset = block_size, offset

    def training_settings(self) -> dict[str, Any]:
        return {}

    def sampling_settings(self) -> dict[str, Any]:
        return {"block_size": self.block_size, "offset": self.offset}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        tones = [data.images[data.labels == label].mean() for label in range(len(data.classes))]
        np.save(folder / "tones.npy", np.array([*data.images.shape[1:], *tones]))

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _FlatSampler(self, np.load(folder / "tones.npy"))


class UntaughtGenerator(FlatGenerator):
    """A generator that knows its classes beforehand: the tone of class c is 20 c."""

    learns_from = "none"

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        np.save(folder / "tones.npy", np.array([*data.images.shape[1:], *(20 * np.arange(len(data.classes)))]))


class SlowGenerator(FlatGenerator):
    """A generator that needs no training, and a tenth of a second for a block."""

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _SlowSampler(self, np.array([1, 4, 4, 100, 200]))


class RaisingGenerator(SlowGenerator):
    """A generator that can't make a class, or can't be loaded, or finds no room on the GPU."""

    def __init__(self, label: int = -1, loads: bool = True, room: bool = True) -> None:
        super().__init__()
        self.label, self.loads, self.room = label, loads, room

    def load(self, folder: Path, device: torch.device) -> Sampler:
        if not self.loads:
            raise ValueError("no weights here")
        return _RaisingSampler(self, np.array([1, 8, 8, *range(10)]))


class UnfitGenerator(FlatGenerator):
    """A generator whose images are no bytes, or fewer than a block has, or none at all."""

    def __init__(self, kind: str = "uint8", count: int = 4) -> None:
        super().__init__()
        self.kind, self.count = kind, count

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _UnfitSampler(self, np.load(folder / "tones.npy"))


class HungryGenerator(SlowGenerator):
    """A generator that takes 32 MiB for a block and frees them, and reports what its process has grown by since."""

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _HungrySampler(self, np.array([1, 8, 8, *range(10)]))


class _FlatSampler(Sampler):
    def __init__(self, generator: FlatGenerator, stored: np.ndarray) -> None:
        self.generator, self.shape, self.tones = generator, stored[:3].astype(int), stored[3:]

    def sample(self, block: Block) -> np.ndarray:
        tone = round(self.tones[block.label]) + self.generator.offset
        return np.full((self.generator.block_size, *self.shape), tone, dtype=np.uint8)


class _UnfitSampler(_FlatSampler):
    def sample(self, block: Block) -> np.ndarray:
        if self.generator.kind == "nothing":
            return None  # a forgotten return
        return super().sample(block)[: self.generator.count].astype(self.generator.kind)


class _SlowSampler(_FlatSampler):
    def sample(self, block: Block) -> np.ndarray:
        time.sleep(0.1)
        return super().sample(block) + np.uint8(block.number)


class _HungrySampler(_FlatSampler):
    grown_mb = 0.0

    def sample(self, block: Block) -> np.ndarray:
        memory = psutil.Process().memory_info
        before = memory().rss
        tensors = [torch.ones(2**20) for _ in range(8)]
        del tensors
        self.grown_mb += (memory().rss - before) / 2**20
        return super().sample(block)

    def report(self) -> dict[str, float]:
        return {"grown_mb": self.grown_mb}


class _RaisingSampler(_FlatSampler):
    def sample(self, block: Block) -> np.ndarray:
        if not self.generator.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee the documentation")
        if block.label == self.generator.label:
            raise ValueError(f"class {block.label} has run dry")
        return super().sample(block)
