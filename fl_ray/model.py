"""The model of a run: the LightningModule that a recipe names, and its weights as one flat vector."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn

from fl_ray.config import Component, TrainingConfig
from fl_ray.data.datasets import ImageData
from fl_ray.errors import SettingError
from fl_ray.randomness import seeded_torch
from fl_ray.recipes import build, start_of
from fl_ray.start_weights import load_start
from lightning_modules.classifier import Classifier, OptimizerSettings

__all__ = ["ImageShape", "WeightLayout", "build_module", "initial_module", "initial_weights", "optimizer_settings"]


@dataclass(frozen=True)
class ImageShape:
    """What a model must know of the data, and how images become its input."""

    channels: int
    size: int
    classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, data: ImageData) -> ImageShape:
        _, channels, size, _ = data.images.shape
        return cls(channels, size, len(data.classes), tuple(data.mean), tuple(data.std))

    def unit(self) -> ImageShape:
        """The same, whose ``normalise`` gives images in [0, 1]."""
        return replace(self, mean=(0.0,) * self.channels, std=(1.0,) * self.channels)

    def normalise(self, images: np.ndarray, device: torch.device) -> torch.Tensor:
        """uint8 [N, C, H, W] to float32 on ``device``, scaled to [0, 1], then to the set's mean and deviation."""
        x = torch.from_numpy(np.ascontiguousarray(images)).to(device).float().div_(255)
        mean = torch.tensor(self.mean, device=device).view(1, -1, 1, 1)
        std = torch.tensor(self.std, device=device).view(1, -1, 1, 1)
        return x.sub_(mean).div_(std)


def optimizer_settings(training: TrainingConfig) -> OptimizerSettings:
    """The optimiser that a recipe's ``training`` asks for."""
    return OptimizerSettings(training.optimizer, training.lr, training.momentum, training.weight_decay)


def build_module(model: Component, shape: ImageShape, training: TrainingConfig) -> pl.LightningModule:
    """The LightningModule that ``model`` names.

    A plain network is wrapped in ``Classifier`` with the recipe's optimiser. A LightningModule of the user's own is
    taken as it is, with its own ``configure_optimizers``; its constructor is handed what it asks for of
    ``in_channels``, ``image_size``, ``num_classes`` and ``optimizer``. With an attribute ``wants_unit_images`` that is
    true its images are in [0, 1], not normalised; with a method ``evaluation(x, y)`` it is no classifier.
    """
    optimizer = optimizer_settings(training)
    made = build(
        "model",
        model,
        in_channels=shape.channels,
        image_size=shape.size,
        num_classes=shape.classes,
        optimizer=optimizer,
    )
    if isinstance(made, pl.LightningModule):
        if not made.automatic_optimization:
            raise SettingError(f"model.name {model.name}: client training needs automatic optimisation")
        return made
    if isinstance(made, nn.Module):
        return Classifier(made, optimizer)
    raise SettingError(f"model.name {model.name} makes a {type(made).__name__}, which is no torch module")


class WeightLayout:
    """A module's whole state (parameters and buffers) as one float32 vector; integer buffers are rounded back."""

    def __init__(self, module: nn.Module) -> None:
        self._tensors = list(module.state_dict(keep_vars=True).values())
        self.names = list(module.state_dict())
        sizes = [tensor.numel() for tensor in self._tensors]
        self._ends = np.cumsum(sizes).tolist()
        self.size = int(sum(sizes))
        parameters = list(module.parameters())
        trained = {id(parameter) for parameter in parameters}
        flags = [id(tensor) in trained for tensor in self._tensors]
        self.is_parameter = np.repeat(np.array(flags, dtype=bool), sizes)
        places = {id(tensor): index for index, tensor in reversed(list(enumerate(self._tensors)))}
        starts = [0, *self._ends[:-1]]
        own = [places[id(parameter)] for parameter in parameters]
        self._places = [(starts[i], self._ends[i], self._tensors[i].shape) for i in own]

    def read(self) -> torch.Tensor:
        """The module's state as a new float32 CPU vector [size]."""
        return torch.cat([tensor.detach().reshape(-1).float().cpu() for tensor in self._tensors])

    @torch.no_grad()
    def write(self, flat: torch.Tensor) -> None:
        """Copy a vector [size] into the module."""
        start = 0
        for tensor, end in zip(self._tensors, self._ends, strict=True):
            values = flat[start:end].view(tensor.shape)
            tensor.copy_(values if tensor.is_floating_point() else values.round())
            start = end

    def parameters(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Views of vectors [..., size], shaped [..., *shape] and ordered as ``module.parameters()``."""
        ahead = flat.shape[:-1]
        return [flat[..., a:b].unflatten(-1, shape or (1,)).view(*ahead, *shape) for a, b, shape in self._places]

    def named(self, flat: np.ndarray) -> dict[str, torch.Tensor]:
        """The vector as named tensors, as a state dict holds them."""
        vector = torch.from_numpy(np.array(flat, dtype=np.float32))
        starts = [0, *self._ends[:-1]]
        parts = zip(self.names, self._tensors, starts, self._ends, strict=True)
        return {
            name: vector[start:end].view(tensor.shape).to(tensor.dtype).clone() for name, tensor, start, end in parts
        }


def initial_module(
    model: Component, shape: ImageShape, training: TrainingConfig, notes: dict[str, Any] | None = None
) -> pl.LightningModule:
    """A model as it starts: with drawn weights, or those of the file that ``model.start`` names.

    Args:
        notes: gets the file's hash (``starts_from``).

    Raises:
        SettingError: see ``load_start``.
    """
    module, file = build_module(model, shape, training), start_of(model)
    if file is not None:
        found = load_start(module, file, model.name, shape.classes)
        if notes is not None:
            notes["starts_from"] = {**notes.get("starts_from", {}), file: found}
    return module


def initial_weights(
    model: Component, shape: ImageShape, training: TrainingConfig, seed: int, notes: dict[str, Any] | None = None
) -> np.ndarray:
    """The flat weights that every backend and method starts from; see ``initial_module``."""
    with seeded_torch(seed, "init"):
        module = initial_module(model, shape, training, notes)
    return WeightLayout(module).read().numpy()
