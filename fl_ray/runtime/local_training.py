"""Local training: a LightningModule's own hooks, called by a loop that costs next to nothing."""

from __future__ import annotations

import math

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from fl_ray.config import TrainingConfig
from fl_ray.errors import SettingError
from fl_ray.randomness import seeded_torch, torch_generator

__all__ = ["has_batch_norm", "lr_factor", "train_locally"]


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
    key: tuple[int, str, int, int],
) -> float:
    """Train ``module`` in place on all of (x, y) and return the mean loss over all batches, weighted by their size.

    Args:
        x, y: inputs [N, ...] and labels [N] on the module's device.
        epochs: passes over the data, each in a new order.
        factor: the optimiser's step is multiplied by it.
        key: (seed, purpose, round, client) fixes the order of the data and every draw inside the module.
    """
    module.train()
    optimizer = _only_optimizer(module)
    for group in optimizer.param_groups:
        group["lr"] *= factor
    normalises = has_batch_norm(module)
    orders = torch_generator(key[0], f"{key[1]}/order", *key[2:])
    total = torch.zeros((), device=x.device, dtype=torch.float64)
    batch_idx = 0
    with seeded_torch(key[0], f"{key[1]}/module", *key[2:]):
        for _ in range(epochs):
            order = torch.randperm(len(x), generator=orders).to(x.device)
            for rows in _batches(order, training.batch_size, normalises):
                optimizer.zero_grad(set_to_none=True)
                output = module.training_step((x[rows], y[rows]), batch_idx)
                loss = output["loss"] if isinstance(output, dict) else output
                loss.backward()
                if training.clip_norm is not None:
                    nn.utils.clip_grad_norm_(module.parameters(), training.clip_norm)
                optimizer.step()
                total += loss.detach().double() * len(rows)
                batch_idx += 1
    return float(total) / (epochs * len(x))


def has_batch_norm(module: nn.Module) -> bool:
    """Whether a batch of one sample can't train the module."""
    return any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in module.modules())


def _batches(order: Tensor, size: int, normalises: bool) -> list[Tensor]:
    """The order in batches. Batch norm can't train on one sample: a last batch of one then joins the one before."""
    batches = list(order.split(size))
    if normalises and len(batches) > 1 and len(batches[-1]) == 1:
        batches[-2:] = [torch.cat(batches[-2:])]
    return batches


def _only_optimizer(module: pl.LightningModule) -> torch.optim.Optimizer:
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
