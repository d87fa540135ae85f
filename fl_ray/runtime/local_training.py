"""Local training: a LightningModule's own hooks, called by a loop that costs next to nothing."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fl_ray.config import TrainingConfig
from fl_ray.errors import SettingError
from fl_ray.randomness import seeded_torch, torch_generator

__all__ = [
    "Correction",
    "Key",
    "batches_of",
    "count_batches",
    "has_batch_norm",
    "loss_of",
    "lr_factor",
    "only_optimizer",
    "scale_lr",
    "train_epoch",
    "train_locally",
]

Key = tuple[int, str, int, int]
"""(seed, purpose, round, client): fixes the order of the data and every draw inside the module."""


@dataclass(frozen=True)
class Correction:
    """What a method adds to each parameter's gradient: ``offset + proximal * (w - start)``.

    Tensors are in the order of ``module.parameters()``; in the batched path each has a leading client dimension.
    """

    proximal: float = 0.0
    start: Sequence[Tensor] = ()
    offset: Sequence[Tensor] = ()

    def add_to(self, parameters: Sequence[Tensor]) -> None:
        """Add it to the gradients in place."""
        for index, parameter in enumerate(parameters):
            if parameter.grad is None:
                continue
            if self.offset:
                parameter.grad.add_(self.offset[index])
            if self.proximal:
                parameter.grad.add_(parameter.detach() - self.start[index], alpha=self.proximal)


def lr_factor(training: TrainingConfig, round_number: int, rounds: int) -> float:
    """What the step of round ``round_number`` (from 0) is multiplied by."""
    if training.lr_schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * round_number / rounds))
    if training.lr_schedule == "step":
        return training.lr_gamma ** (round_number // training.lr_step_rounds)
    return 1.0


def train_locally(
    module: pl.LightningModule,
    x: Tensor,
    y: Tensor,
    training: TrainingConfig,
    epochs: int,
    factor: float,
    key: Key,
    correction: Correction | None = None,
    head: nn.Module | None = None,
) -> float:
    """Train ``module`` in place on all of (x, y) and return the mean loss over all batches, weighted by their size.

    Args:
        x, y: inputs [N, ...] and labels [N] on the module's device.
        epochs: passes over the data, each in a new order.
        factor: the optimiser's step is multiplied by it.
        head: the part of the module that is trained, where the rest is frozen (``fl_ray.head``): that stays in
            evaluation mode.
    """
    module.train(head is None)
    if head is not None:
        head.train()
    optimizer = only_optimizer(module)
    scale_lr(optimizer, factor)
    batches = batches_of(len(x), training.batch_size, epochs, key, has_batch_norm(module))
    with seeded_torch(key[0], f"{key[1]}/module", *key[2:]):
        total = _take_steps(module, x, y, enumerate(batches), optimizer, training, correction)
    return total / (epochs * len(x))


def train_epoch(
    module: pl.LightningModule,
    x: Tensor,
    y: Tensor,
    training: TrainingConfig,
    epoch: int,
    key: Key,
    left: bytes | None = None,
    training_mode: bool = True,
) -> tuple[bytes, float]:
    """One epoch of ``train_locally``: all of them, one after the other, come out as if they had been trained at once.

    That holds for what is in the module's weights (float32 here), in the optimiser's ``state_dict`` and in torch's
    generators; a module of the user's own that counts steps in an attribute, say, begins again.

    Args:
        epoch: which, from 0.
        left: what the epoch before has returned; None for the first.
        training_mode: of the module; otherwise it stays in evaluation mode.

    Returns:
        What the next epoch needs beside the module's weights (the state of the optimiser and of torch's generators),
        and the mean loss.

    Raises:
        SettingError: the optimiser's state holds more than tensors, numbers and names.
    """
    module.train(training_mode)
    optimizer = only_optimizer(module)
    batches = batches_of(len(x), training.batch_size, epoch + 1, key, has_batch_norm(module))
    first = len(batches) // (epoch + 1) * epoch
    with seeded_torch(key[0], f"{key[1]}/module", *key[2:]):
        if left is not None:
            try:
                before = torch.load(io.BytesIO(left), weights_only=True, map_location="cpu")
            except pickle.UnpicklingError as error:
                raise SettingError(
                    f"model {type(module).__name__}: its optimiser {type(optimizer).__name__} keeps more in its state "
                    "than tensors and numbers, so a training can't go on after an epoch; use one of torch's"
                ) from error
            optimizer.load_state_dict(before["optimizer"])
            torch.set_rng_state(before["generator"])
            if x.is_cuda and "cuda" in before:
                torch.cuda.set_rng_state(before["cuda"], x.device)
        total = _take_steps(module, x, y, enumerate(batches[first:], first), optimizer, training)
        state = {"optimizer": _plain(optimizer.state_dict()), "generator": torch.get_rng_state()}
        if x.is_cuda:
            state["cuda"] = torch.cuda.get_rng_state(x.device)
    stream = io.BytesIO()
    torch.save(state, stream)
    return stream.getvalue(), total / len(x)


def _plain(state: object) -> object:
    """An optimiser's state without numpy's numbers: what is read back may hold no objects of other packages."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return [_plain(value) for value in state]
    return state.item() if isinstance(state, np.generic) else state


def _take_steps(
    module: pl.LightningModule,
    x: Tensor,
    y: Tensor,
    batches: Iterable[tuple[int, Tensor]],
    optimizer: torch.optim.Optimizer,
    training: TrainingConfig,
    correction: Correction | None = None,
) -> float:
    """A step on each batch, given by its number and its rows; the sum of the samples' losses."""
    parameters = list(module.parameters())
    total = torch.zeros((), device=x.device, dtype=torch.float64)
    for batch_idx, rows in batches:
        rows = rows.to(x.device)
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(module.training_step((x[rows], y[rows]), batch_idx))
        loss.backward()
        if correction is not None:
            correction.add_to(parameters)
        if training.clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, training.clip_norm)
        optimizer.step()
        total += loss.detach().double() * len(rows)
    return float(total)


def batches_of(samples: int, size: int, epochs: int, key: Key, normalises: bool = False) -> list[Tensor]:
    """The row numbers of every batch of all epochs, each epoch in an order of its own.

    Args:
        normalises: batch norm can't train on one sample: a last batch of one then joins the one before.
    """
    orders = torch_generator(key[0], f"{key[1]}/order", *key[2:])
    found: list[Tensor] = []
    for _ in range(epochs):
        batches = list(torch.randperm(samples, generator=orders).split(size))
        if normalises and len(batches) > 1 and len(batches[-1]) == 1:
            batches[-2:] = [torch.cat(batches[-2:])]
        found += batches
    return found


def count_batches(samples: int, size: int, normalises: bool = False) -> int:
    """How many batches an epoch of ``batches_of`` has."""
    batches = -(-samples // size)
    last = samples - (batches - 1) * size
    return batches - 1 if normalises and batches > 1 and last == 1 else batches


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a batch of one sample can't train the module."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def loss_of(output: Tensor | dict[str, Tensor]) -> Tensor:
    """The loss in what a ``training_step`` returned."""
    return output["loss"] if isinstance(output, dict) else output


def scale_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Multiply every group's step."""
    for group in optimizer.param_groups:
        group["lr"] *= factor


def only_optimizer(module: pl.LightningModule) -> torch.optim.Optimizer:
    """The one optimiser that the module configures.

    Raises:
        SettingError: it configures several, or a schedule.
    """
    made = module.configure_optimizers()
    if isinstance(made, dict) and "lr_scheduler" not in made:
        made = made.get("optimizer")
    if isinstance(made, list) and len(made) == 1:
        made = made[0]
    if not isinstance(made, torch.optim.Optimizer):
        raise SettingError(
            f"model {type(module).__name__}: configure_optimizers must return one optimizer, without a schedule "
            "(training.lr_schedule sets one over rounds)"
        )
    return made
