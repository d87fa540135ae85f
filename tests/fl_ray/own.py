"""Components of a user's own, named by import path in tests."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fl_ray.aggregation import combine
from fl_ray.context import RunContext
from fl_ray.data.datasets import ImageData
from fl_ray.data.partitioners import Partitioner
from fl_ray.methods.fedavg import FedAvg
from fl_ray.runtime.base import RoundResult
from generators.base import Block, Generator, Sampler, TrainingImages


class OwnModule(pl.LightningModule):
    """A LightningModule with its own optimiser, dropout, batch norm, logging and settings."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int, hidden: int = 8) -> None:
        super().__init__()
        flat = in_channels * image_size**2
        inner = [nn.Linear(flat, hidden), nn.BatchNorm1d(hidden), nn.Dropout(0.3)]
        self.layers = nn.Sequential(nn.Flatten(), *inner, nn.Linear(hidden, num_classes))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> dict[str, Tensor]:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("own_loss", loss)
        return {"loss": loss}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.01)


class NanOnNine(OwnModule):
    """Training goes wrong (NaN) for whoever holds class 9."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        return loss * float("nan") if (batch[1] == 9).any() else loss


class RaisesOnNine(OwnModule):
    """Training raises for whoever holds class 9."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if (batch[1] == 9).any():
            raise KeyError("nine")
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


class Hooked(pl.LightningModule):
    """A linear module that calls ``trouble`` with each batch's labels; torch.func can run it."""

    trouble: Callable[[Tensor], None] = staticmethod(lambda labels: None)

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__()
        self.layer = nn.Linear(in_channels * image_size**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.flatten(1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        type(self).trouble(batch[1])
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class OwnNetwork(nn.Linear):
    """A plain torch module; fl_ray wraps it."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__(in_channels * image_size**2, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.flatten(1))


def stripes(root: Path, download: bool, samples: int = 120) -> ImageData:
    """A data set: class 0 is dark, class 1 bright; two natural clients."""
    labels = np.arange(samples) % 2
    noise = np.random.default_rng(0).integers(0, 60, (samples, 1, 4, 4))
    images = (noise + 180 * labels[:, None, None, None]).astype(np.uint8)
    owners = np.arange(samples) // (samples // 2)
    return ImageData(images, labels.astype(np.int64), ["dark", "bright"], [0.5], [0.5], owners=owners)


class EvenOdd(Partitioner):
    """Sample i belongs to client i modulo the number of clients."""

    def __call__(
        self, labels: np.ndarray, clients: int, rng: np.random.Generator, groups: np.ndarray | None = None
    ) -> np.ndarray:
        return np.arange(len(labels)) % clients


class HalfStep(FedAvg):
    """A method: FedAvg that goes half the way."""

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        return combine([(0.5, weights), (0.5, super().aggregate(run, round_number, weights, result))])


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
    """A generator that can't make a class, or can't be loaded."""

    def __init__(self, label: int = -1, loads: bool = True) -> None:
        super().__init__()
        self.label, self.loads = label, loads

    def load(self, folder: Path, device: torch.device) -> Sampler:
        if not self.loads:
            raise ValueError("no weights here")
        return _RaisingSampler(self, np.array([1, 8, 8, *range(10)]))


class _FlatSampler(Sampler):
    def __init__(self, generator: FlatGenerator, stored: np.ndarray) -> None:
        self.generator, self.shape, self.tones = generator, stored[:3].astype(int), stored[3:]

    def sample(self, block: Block) -> np.ndarray:
        tone = round(self.tones[block.label]) + self.generator.offset
        return np.full((self.generator.block_size, *self.shape), tone, dtype=np.uint8)


class _SlowSampler(_FlatSampler):
    def sample(self, block: Block) -> np.ndarray:
        time.sleep(0.1)
        return super().sample(block) + np.uint8(block.number)


class _RaisingSampler(_FlatSampler):
    def sample(self, block: Block) -> np.ndarray:
        if block.label == self.generator.label:
            raise ValueError(f"class {block.label} has run dry")
        return super().sample(block)
