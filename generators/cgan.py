"""A conditional DCGAN, trained from scratch on the public images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from generators.base import (
    Block,
    Generator,
    Sampler,
    TrainingImages,
    block_seed,
    check_class,
    require_positive,
    to_uint8,
)
from generators.module_files import read_module, write_module
from lightning_modules.gan import ConditionalGAN, Discriminator, ImageGenerator

__all__ = ["CGANGenerator"]

_SIZES = (8, 64)  # pixels


class CGANGenerator(Generator):
    """See ``lightning_modules.gan``; images of 8 to 64 pixels.

    Args:
        width: channels of both networks at the highest resolution; doubled at each below.
        noise: size of the noise.
        loss: ``hinge`` or ``bce``.
        train_steps, batch_size: of pre-training; a step of each network per batch.
        lr: of the generator (Adam); the discriminator's is twice that.
        train_seed: of pre-training; independent of a run's seed, so that one generator serves all seeds.
        block_size: images made together.
    """

    def __init__(
        self,
        width: int = 16,
        noise: int = 64,
        loss: Literal["hinge", "bce"] = "hinge",
        train_steps: int = 2000,
        batch_size: int = 32,
        lr: float = 1e-3,
        train_seed: int = 0,
        block_size: int = 100,
    ) -> None:
        require_positive(width=width, noise=noise, train_steps=train_steps, lr=lr, block_size=block_size)
        if batch_size < 2:
            raise ValueError(f"batch_size is {batch_size}, but batch norm needs at least 2")
        self.width, self.noise, self.loss, self.train_steps = width, noise, loss, train_steps
        self.batch_size, self.lr, self.train_seed, self.block_size = batch_size, lr, train_seed, block_size

    def training_settings(self) -> dict[str, Any]:
        names = ("width", "noise", "loss", "train_steps", "batch_size", "lr", "train_seed")
        return {"kind": "cgan", **{name: getattr(self, name) for name in names}}

    def sampling_settings(self) -> dict[str, Any]:
        return {"block_size": self.block_size}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        from generators.training import drop_checkpoint, fit_steps, seeded

        channels, size = data.images.shape[1], data.images.shape[2]
        if not _SIZES[0] <= size <= _SIZES[1]:
            raise ValueError(f"the images are of {size} pixels, but cgan makes {_SIZES[0]} to {_SIZES[1]}; use another")
        shape = {"in_channels": channels, "image_size": size, "num_classes": len(data.classes), "width": self.width}
        with seeded(self.train_seed):
            generator = ImageGenerator(**shape, noise=self.noise)
            module = ConditionalGAN(generator, Discriminator(**shape), self.loss, self.lr)
            images = torch.from_numpy(data.images).float().div(127.5).sub(1)
            labels, seed = torch.from_numpy(data.labels), self.train_seed
            fit_steps(module, images, labels, self.batch_size, self.train_steps, progress, seed=seed, folder=folder)
        write_module(folder, generator.cpu(), {**shape, "noise": self.noise})
        drop_checkpoint(folder)

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _CGANSampler(read_module(folder, ImageGenerator).to(device), device, self.block_size)


class _CGANSampler(Sampler):
    def __init__(self, network: ImageGenerator, device: torch.device, block_size: int) -> None:
        self.network, self.device, self.block_size = network, device, block_size

    @torch.no_grad()
    def sample(self, block: Block) -> np.ndarray:
        check_class(block.label, self.network.num_classes)
        noise = torch.Generator().manual_seed(block_seed(block))
        z = torch.randn((self.block_size, self.network.noise), generator=noise).to(self.device)
        images = self.network(z, torch.full((self.block_size,), block.label, device=self.device))
        return to_uint8((images + 1) / 2)
