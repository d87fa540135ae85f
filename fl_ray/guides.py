"""Clients' uploaded classifiers, kept as files so that the actors that make images can load them."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file, save
from torch import nn

from fl_ray.config import Component, TrainingConfig
from fl_ray.model import ImageShape, WeightLayout, build_module
from fl_ray.randomness import seeded_torch
from generators.cache import write_whole
from generators.guidance.losses import ClassifierGuide, Statistics

__all__ = ["UploadedClassifier", "guide_of", "keep_upload"]


@dataclass(frozen=True)
class UploadedClassifier:
    """A client's classifier as a guide (``generators.guidance.generator.GuideSource``).

    Attributes:
        digest: of its weights and running statistics.
        norm_weight: lambda of L_CE + lambda L_BN.
        seed: of the run, with which modules are built.
    """

    path: Path
    digest: str
    model: Component
    shape: ImageShape
    norm_weight: float
    statistics: Statistics
    seed: int

    def key(self) -> dict[str, Any]:
        return {
            "weights": self.digest,
            "model": asdict(self.model),
            "norm_weight": self.norm_weight,
            "statistics": self.statistics,
            "seed": self.seed,
        }

    def load(self, device: torch.device) -> ClassifierGuide:
        with seeded_torch(self.seed, "init"):  # for buffers that are drawn and not sent
            module = build_module(self.model, self.shape, TrainingConfig()).to(device)
        WeightLayout(module).write(torch.from_numpy(load_file(self.path)["weights"]))
        return guide_of(module, self.shape, self.norm_weight, self.statistics)


def guide_of(module: nn.Module, shape: ImageShape, norm_weight: float, statistics: Statistics) -> ClassifierGuide:
    """A classifier of images of this shape as a guide, with lambda ``norm_weight``."""
    if getattr(module, "wants_unit_images", False):
        shape = shape.unit()
    mean, std = list(shape.mean), list(shape.std)
    return ClassifierGuide(module, norm_weight, shape.size, shape.channels, mean, std, statistics)


def keep_upload(
    folder: Path,
    weights: np.ndarray,
    model: Component,
    shape: ImageShape,
    norm_weight: float,
    statistics: Statistics,
    seed: int,
) -> UploadedClassifier:
    """Write a client's weights (float32 [size]) into ``folder`` under their hash, unless they are there."""
    digest = hashlib.sha256(weights.tobytes()).hexdigest()[:16]
    path = folder / f"{digest}.safetensors"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"weights": weights}))
    return UploadedClassifier(path, digest, model, shape, norm_weight, statistics, seed)
