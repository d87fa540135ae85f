"""Real images as if they were generated: the control that says what a perfect generator would bring."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

from generators.base import TrainingImages
from generators.stored import StoredGenerator, store_images

__all__ = ["RealGenerator"]


class RealGenerator(StoredGenerator):
    """Images of a part of the data, each at most once for a seed, in an order drawn by class.

    Args:
        block_size: images read together.
        part: ``reserve``, which nobody else sees: what a perfect generator would bring; or ``public``, which other
            generators learn from: what their training images bring as they are.
    """

    def __init__(self, block_size: int = 100, part: Literal["reserve", "public"] = "reserve") -> None:
        super().__init__(block_size)
        self.learns_from, self.more_from = part, f"raise data.{part}_fraction"

    def training_settings(self) -> dict[str, Any]:
        return {"kind": "real"}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        counts = self.available(data)
        classes = (data.images[data.labels == label] for label in range(len(counts)))
        store_images(folder, classes, counts, data.images.shape[1:])

    def available(self, data: TrainingImages) -> np.ndarray:
        return np.bincount(data.labels, minlength=len(data.classes))

    def order(self, seed: int, label: int, count: int) -> np.ndarray:
        return np.random.default_rng(np.random.SeedSequence([seed, label])).permutation(count)
