"""How the server trains its model in one-shot methods: its SGD, where it starts from, and how much of it moves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file

from fl_ray.config import Component, TrainingConfig
from fl_ray.context import RunContext
from fl_ray.errors import SettingError, require
from fl_ray.model import ImageShape, WeightLayout, build_module
from fl_ray.randomness import seeded_torch
from fl_ray.runtime.head import head_name, need_head

__all__ = ["AS_FEDLMG", "ServerTraining", "Trained", "read_start", "refuse_headless", "refuse_random_features"]

Trained = Literal["full", "head"]
_TOLD = 3  # names of tensors in a message


@dataclass(frozen=True)
class ServerTraining:
    """The server's SGD; its defaults are FedLMG's.

    Attributes:
        train: the ``full`` model, or its ``head`` alone, the last linear layer: the encoder then stays as it starts,
            batch norm statistics included (FedLMG's released code trains so, on an encoder trained on ImageNet).
        start: a safetensors file of the server's model to start from, see ``read_start``; default: as drawn (FedDF may
            have better).
    """

    lr: float = 0.005
    momentum: float = 0.9
    weight_decay: float = 1e-5
    batch_size: int = 256
    epochs: int = 20
    train: Trained = "full"
    start: str | None = None

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


def refuse_random_features(train: Trained, start: str | None, section: str) -> None:
    """Refuse to train a head on an encoder that nobody has trained."""
    if train == "head" and start is None:
        raise SettingError(
            f"{section}.train is head, but {section}.start names no file, so that the head would be trained on random "
            f"features; give {section}.start, or set {section}.train to full"
        )


def refuse_headless(run: RunContext) -> None:
    """Refuse to train the head of a model that has none."""
    config, shape = run.config, ImageShape.of(run.data.source)
    need_head(build_module(config.model, shape, config.training), shape.classes)


def read_start(run: RunContext, model: Component, file: str, setting: str) -> np.ndarray:
    """A model's weights [size] of a safetensors file, as ``model.safetensors`` of a run of the same model.

    The head is taken where the file has it for as many classes, else it is as drawn; all other tensors must be there.
    ``summary.json`` names the file's hash and says which it was (``starts_from``).

    Args:
        setting: that names the file.

    Raises:
        SettingError: it is no such file, or its tensors are not those of the model.
    """
    config, shape = run.config, ImageShape.of(run.data.source)
    path = Path(file).expanduser()
    with seeded_torch(config.seed, "init"):
        module = build_module(model, shape, config.training)
    head = head_name(module, shape.classes)
    if not path.is_file():
        raise SettingError(f"{setting} is {file}, but there is no such file; give a safetensors file, or leave it out")
    try:
        found = load_file(path)
    except SafetensorError as error:
        raise SettingError(f"{setting} is {file}, which is no safetensors file ({error}); give one") from error
    drawn = module.state_dict()
    of_head = [name for name in drawn if head is not None and name.rpartition(".")[0] == head]
    has_head = bool(of_head) and all(name in found and found[name].shape == drawn[name].shape for name in of_head)
    rest, given = set(drawn) - set(of_head), set(found) - set(of_head)
    if rest != given:
        apart = {"it lacks": rest - given, "the model lacks": given - rest}
        told = "; ".join(f"{whose} {_some(names)}" for whose, names in apart.items() if names)
        raise SettingError(
            f"{setting} is {file}, whose tensors are not those of model {model.name} ({told}); give a file of this "
            "model"
        )
    for name in sorted(rest):
        if found[name].shape != drawn[name].shape:
            raise SettingError(
                f"{setting} is {file}, whose {name} has the shape {list(found[name].shape)}, but that of model "
                f"{model.name} has {list(drawn[name].shape)}; give a file of this model, with its settings, for "
                f"images of {shape.channels} x {shape.size} x {shape.size}"
            )
    module.load_state_dict({name: found[name] if name in rest or has_head else drawn[name] for name in drawn})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    note = {"file": file, "sha256": digest, "head": "of the file" if has_head else "as drawn"}
    run.notes["starts_from"] = {**run.notes.get("starts_from", {}), setting: note}
    return WeightLayout(module).read().numpy()


def _some(names: Iterable[str]) -> str:
    told = sorted(names)
    return ", ".join(told[:_TOLD]) + (f" and {len(told) - _TOLD} more" if len(told) > _TOLD else "")
