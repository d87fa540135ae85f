"""How the server trains its model in one-shot methods: its SGD, and how much of the model moves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fl_ray.config import RunConfig, TrainingConfig
from fl_ray.context import RunContext
from fl_ray.errors import SettingError, require
from fl_ray.head import need_head
from fl_ray.model import ImageShape, build_module
from fl_ray.recipes import start_of

__all__ = ["AS_FEDLMG", "ServerTraining", "Trained", "refuse_headless", "refuse_random_features"]

Trained = Literal["full", "head"]


@dataclass(frozen=True)
class ServerTraining:
    """The server's SGD; its defaults are FedLMG's.

    Attributes:
        train: the ``full`` model, or its ``head`` alone, the last linear layer: the encoder then stays as it starts
            (``model.start``), batch norm statistics included. FedLMG's released code trains so, on an encoder that was
            trained on ImageNet.
    """

    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 1e-5
    batch_size: int = 256
    epochs: int = 20
    train: Trained = "full"

    def __post_init__(self) -> None:
        require(self.lr > 0, "method.server.lr", self.lr, "positive")
        require(self.momentum >= 0, "method.server.momentum", self.momentum, "at least 0")
        require(self.weight_decay >= 0, "method.server.weight_decay", self.weight_decay, "at least 0")
        require(self.batch_size >= 1, "method.server.batch_size", self.batch_size, "at least 1")
        require(self.epochs >= 1, "method.server.epochs", self.epochs, "at least 1")

    @property
    def head_only(self) -> bool:
        return self.train == "head"

    def training(self) -> TrainingConfig:
        """As the runtime takes it."""
        return TrainingConfig("sgd", self.lr, self.momentum, self.weight_decay, self.batch_size)


AS_FEDLMG = ServerTraining()


def refuse_random_features(config: RunConfig, setting: str) -> None:
    """Refuse to train a head on an encoder that nobody has trained; a user's own model may have loaded weights itself.

    Args:
        setting: that asks for the head.
    """
    if start_of(config.model) is None and ":" not in config.model.name:
        raise SettingError(
            f"{setting} is head, but model.start names no file, so that the head would be trained on random features; "
            f"give model.start, or set {setting} to full"
        )


def refuse_headless(run: RunContext) -> None:
    """Refuse to train the head of a model that has none."""
    config, shape = run.config, ImageShape.of(run.data.source)
    need_head(build_module(config.model, shape, config.training), shape.classes)
