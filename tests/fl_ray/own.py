"""Components of a user's own, named by import path in tests; and a progress that keeps what it is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fl_ray.aggregation import combine
from fl_ray.context import RunContext
from fl_ray.data.datasets import ImageData
from fl_ray.data.partitioners import Partitioner
from fl_ray.methods.fedavg import FedAvg
from fl_ray.progress import Progress
from fl_ray.runtime.base import RoundResult


class Heard(Progress):
    """Keeps the messages."""

    def __init__(self) -> None:
        super().__init__(enabled=False)
        self.told: list[str] = []

    def message(self, text: str) -> None:
        self.told.append(text)


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


class Fixed(nn.Sequential):
    """A network of images of ``channels`` with so many ``logits``, whatever the data are."""

    def __init__(self, channels: int = 1, logits: int = 10) -> None:
        super().__init__(nn.Conv2d(channels, logits, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


class Headless(nn.Sequential):
    """A network whose logits come of a convolution."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__(nn.Conv2d(in_channels, num_classes, image_size), nn.Flatten())


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
