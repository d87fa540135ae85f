"""A model as a client host keeps it: built once, then given other weights for each piece of work."""

from __future__ import annotations

from dataclasses import dataclass

import pytorch_lightning as pl
import torch
from torch import nn

from fl_ray.config import Component
from fl_ray.model import ImageShape, WeightLayout, build_module
from fl_ray.randomness import seeded_torch
from fl_ray.runtime.tasks import Job

__all__ = ["Resident", "make_resident"]


@dataclass(frozen=True)
class Resident:
    """A module on its device.

    Attributes:
        shape: how images become its input.
        format: the memory format that it is fastest with.
    """

    module: pl.LightningModule
    layout: WeightLayout
    shape: ImageShape
    format: torch.memory_format


def make_resident(job: Job, model: Component, device: torch.device) -> Resident:
    """Build ``model`` for the job's data."""
    with seeded_torch(job.seed, "init"):  # buffers that are drawn and not sent must be those of all other hosts
        module = build_module(model, job.shape, job.training).to(device)
    shape = job.shape.unit() if getattr(module, "wants_unit_images", False) else job.shape
    # Convolutions, and the pools behind them, are faster on channels that lie together.
    memory_format = torch.contiguous_format
    if any(isinstance(part, nn.Conv2d) for part in module.modules()):
        memory_format = torch.channels_last
        module.to(memory_format=memory_format)
    return Resident(module, WeightLayout(module), shape, memory_format)
