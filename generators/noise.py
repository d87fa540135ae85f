"""Uniform noise as images: the control that says what labels and amounts alone bring."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from generators.base import Block, Generator, Sampler, TrainingImages, block_seed, check_class, require_positive

__all__ = ["NoiseGenerator"]

_FILE = "shape.json"


class NoiseGenerator(Generator):
    """Every pixel is uniform over 0..255, whatever the class.

    Args:
        block_size: images made together.
    """

    learns_from = "none"

    def __init__(self, block_size: int = 100) -> None:
        require_positive(block_size=block_size)
        self.block_size = block_size

    def training_settings(self) -> dict[str, Any]:
        return {"kind": "noise"}

    def sampling_settings(self) -> dict[str, Any]:
        return {"block_size": self.block_size}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        known = {"shape": data.images.shape[1:], "classes": len(data.classes)}
        (folder / _FILE).write_text(json.dumps(known), encoding="utf-8")

    def load(self, folder: Path, device: torch.device) -> Sampler:
        known = json.loads((folder / _FILE).read_text(encoding="utf-8"))
        return _NoiseSampler((self.block_size, *known["shape"]), known["classes"])


class _NoiseSampler(Sampler):
    def __init__(self, shape: tuple[int, ...], classes: int) -> None:
        self.shape, self.classes = shape, classes

    def sample(self, block: Block) -> np.ndarray:
        check_class(block.label, self.classes)
        return np.random.default_rng(block_seed(block)).integers(0, 256, self.shape, dtype=np.uint8)
