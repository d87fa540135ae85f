"""The classifier LightningModule around any network that maps images to logits."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

__all__ = ["Classifier", "OptimizerSettings"]


@dataclass(frozen=True)
class OptimizerSettings:
    """Which optimiser, with what step: ``momentum`` is read by ``sgd`` alone."""

    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    lr: float = 0.05
    momentum: float = 0.0
    weight_decay: float = 0.0

    def make(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """The optimiser of ``parameters``."""
        common = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": True}  # fused: one pass over a tensor
        if self.optimizer == "sgd":
            return torch.optim.SGD(parameters, momentum=self.momentum, **common)
        kind = torch.optim.Adam if self.optimizer == "adam" else torch.optim.AdamW
        return kind(parameters, **common)


class Classifier(pl.LightningModule):
    """Cross-entropy training of ``network`` ([N, C, H, W] floats to [N, classes] logits)."""

    def __init__(self, network: nn.Module, optimizer: OptimizerSettings | None = None) -> None:
        super().__init__()
        self.network = network
        self.optimizer_settings = optimizer or OptimizerSettings()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """Mean cross-entropy of one batch of images and integer labels."""
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser that the settings name, over all parameters."""
        return self.optimizer_settings.make(self.parameters())
