"""The conditional VAE of TU Delft's GenFL, trained on the public images or by the clients together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_lightning as pl
import torch

from generators.base import (
    Block,
    FederatedTraining,
    Generator,
    Sampler,
    TrainingImages,
    block_seed,
    check_class,
    require_positive,
    to_uint8,
)
from generators.module_files import read_module, write_module
from lightning_modules.classifier import OptimizerSettings
from lightning_modules.cvae import CVAE

__all__ = ["CVAEGenerator"]

_EPOCHS = 40  # as many passes as the clients make: 20 rounds of 2


class CVAEGenerator(Generator):
    """Images are decoded from z ~ N(0, I); where the training's were rounded they are scaled to a maximum of 1 each and
    rounded (TU Delft's code).

    Args:
        hidden, latent, binarise: of the network, see ``lightning_modules.cvae.CVAE``.
        training: ``central``, on the public images, or ``federated``: FedAvg of the whole state over the run's clients.
        epochs, train_steps: how long the central training is; one of them (default: 40 epochs). Batches are drawn with
            replacement; an epoch is as many as the images fill.
        train_seed: of the central training; the federated one goes by the run's seed.
        rounds, local_epochs, sample_fraction: of the federated training; the last: share of its images that a client
            trains on in a round.
        batch_size, lr: of either (Adam).
        block_size: images made together.
    """

    def __init__(
        self,
        hidden: list[int] | None = None,
        latent: int = 3,
        binarise: bool = True,
        training: Literal["central", "federated"] = "central",
        epochs: int | None = None,
        train_steps: int | None = None,
        train_seed: int = 0,
        rounds: int = 20,
        local_epochs: int = 2,
        sample_fraction: float = 1.0,
        batch_size: int = 32,
        lr: float = 1e-3,
        block_size: int = 100,
    ) -> None:
        if hidden is not None and (not hidden or min(hidden) < 1):
            raise ValueError(f"hidden is {hidden}, but it must list positive widths")
        require_positive(latent=latent, epochs=epochs, train_steps=train_steps, rounds=rounds)
        require_positive(local_epochs=local_epochs, batch_size=batch_size, lr=lr, block_size=block_size)
        if not 0 < sample_fraction <= 1:
            raise ValueError(f"sample_fraction is {sample_fraction}, but it must be in (0, 1]")
        central = {name: value for name, value in (("epochs", epochs), ("train_steps", train_steps)) if value}
        if training == "federated" and central:
            given = " and ".join(f"{name} is {value}" for name, value in central.items())
            raise ValueError(
                f"training is federated, but {given}, which is of the central one; give rounds and local_epochs, or "
                "set training to central"
            )
        if epochs and train_steps:
            raise ValueError(f"epochs is {epochs} and train_steps is {train_steps}; give one of them")
        self.hidden = list(hidden) if hidden is not None else [512, 256]
        self.latent, self.binarise, self.training = latent, binarise, training
        self.epochs, self.train_steps = epochs or (None if train_steps else _EPOCHS), train_steps
        self.train_seed, self.batch_size, self.lr, self.block_size = train_seed, batch_size, lr, block_size
        self.rounds, self.local_epochs, self.sample_fraction = rounds, local_epochs, sample_fraction

    def _network(self) -> dict[str, Any]:
        return {"hidden": self.hidden, "latent": self.latent, "binarise": self.binarise}

    def training_settings(self) -> dict[str, Any]:
        names = ["epochs", "train_steps", "train_seed"]
        if self.training == "federated":
            names = ["rounds", "local_epochs", "sample_fraction"]
        own = {name: getattr(self, name) for name in ("training", "batch_size", "lr", *names)}
        return {"kind": "cvae", **self._network(), **own}

    def sampling_settings(self) -> dict[str, Any]:
        return {"block_size": self.block_size}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        from generators.training import drop_checkpoint, fit_steps, seeded

        steps = self.train_steps or self.epochs * -(-len(data.images) // self.batch_size)
        with seeded(self.train_seed):
            module = CVAE(**self._module_settings(data), optimizer=OptimizerSettings("adam", self.lr))
            images, labels = torch.from_numpy(data.images).float().div(255), torch.from_numpy(data.labels)
            fit_steps(module, images, labels, self.batch_size, steps, progress, seed=self.train_seed, folder=folder)
        self.store(module.cpu(), data, folder)
        drop_checkpoint(folder)

    def federated(self) -> FederatedTraining | None:
        if self.training == "central":
            return None
        return FederatedTraining(
            model="lightning_modules.cvae:CVAE",
            settings=self._network(),
            rounds=self.rounds,
            local_epochs=self.local_epochs,
            batch_size=self.batch_size,
            optimizer="adam",
            lr=self.lr,
            sample_fraction=self.sample_fraction,
        )

    def store(self, module: pl.LightningModule, data: TrainingImages, folder: Path) -> None:
        write_module(folder, module, self._module_settings(data))

    def _module_settings(self, data: TrainingImages) -> dict[str, Any]:
        channels, size = data.images.shape[1], data.images.shape[2]
        return {"in_channels": channels, "image_size": size, "num_classes": len(data.classes), **self._network()}

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _CVAESampler(read_module(folder, CVAE).to(device), self.block_size)


class _CVAESampler(Sampler):
    def __init__(self, module: CVAE, block_size: int) -> None:
        self.module, self.block_size = module, block_size

    @torch.no_grad()
    def sample(self, block: Block) -> np.ndarray:
        check_class(block.label, self.module.num_classes)
        noise = torch.Generator().manual_seed(block_seed(block))
        z = torch.randn((self.block_size, self.module.latent), generator=noise).to(self.module.device)
        images = self.module.decode(z, torch.full((self.block_size,), block.label, device=z.device))
        if self.module.binarise:
            largest = images.amax(dim=(1, 2, 3), keepdim=True).clamp_min(torch.finfo(images.dtype).tiny)
            images = (images / largest).round()
        return to_uint8(images)
