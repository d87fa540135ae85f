"""The conditional VAE of TU Delft's GenFL (after that project's public code)."""

from __future__ import annotations

import itertools

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_modules.classifier import OptimizerSettings

__all__ = ["CVAE", "kl_to_standard_normal"]

_LEAST_SIGMA = 1e-6


class CVAE(pl.LightningModule):
    """Fully connected; the label is given to the decoder alone. 1,072,150 parameters at 1x28x28 and 10 classes.

    Encoder flat-512-256-2*latent (ReLU), mu and sigma = 1e-6 + softplus; decoder (latent + one-hot)-256-512-flat (ReLU,
    sigmoid). The loss is the squared error plus KL(N(mu, sigma^2) || N(0, I)), both summed over the batch.

    Args:
        hidden: the encoder's widths (default [512, 256]); the decoder has them backwards.
        latent: size of the code.
        binarise: round the images to 0 and 1.
        optimizer: default: Adam with 1e-3.
    """

    wants_unit_images = True  # [0, 1], not normalised by the data set's mean and deviation

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        hidden: list[int] | None = None,
        latent: int = 3,
        binarise: bool = True,
        optimizer: OptimizerSettings | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.num_classes = (in_channels, image_size, image_size), num_classes
        self.latent, self.binarise = latent, binarise
        self.optimizer_settings = optimizer or OptimizerSettings("adam", lr=1e-3)
        flat, widths = in_channels * image_size**2, hidden if hidden is not None else [512, 256]
        self.encoder = nn.Sequential(nn.Flatten(), *_layers([flat, *widths, 2 * latent]))
        self.decoder = nn.Sequential(*_layers([latent + num_classes, *reversed(widths), flat]), nn.Sigmoid())

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of the code, [N, latent] each."""
        mu, raw = self.encoder(x).chunk(2, dim=1)
        return mu, _LEAST_SIGMA + functional.softplus(raw)

    def decode(self, z: Tensor, y: Tensor) -> Tensor:
        """Images in [0, 1], [N, C, H, W], of codes [N, latent] and labels [N]."""
        one_hot = functional.one_hot(y, self.num_classes).to(z.dtype)
        return self.decoder(torch.cat([z, one_hot], dim=1)).unflatten(1, self.shape)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Reconstructions by the code's mean."""
        return self.decode(self.encode(self._input(x))[0], y)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """The loss of images in [0, 1] and labels, with a code that is drawn."""
        return self._loss(*batch, draw=True)

    def evaluation(self, x: Tensor, y: Tensor) -> tuple[int, Tensor]:
        """No right answers, and the summed loss with the code's mean."""
        return 0, self._loss(x, y, draw=False)

    def _loss(self, x: Tensor, y: Tensor, draw: bool) -> Tensor:
        x = self._input(x)
        mu, sigma = self.encode(x)
        z = mu + sigma * torch.randn_like(sigma) if draw else mu
        return functional.mse_loss(self.decode(z, y), x, reduction="sum") + kl_to_standard_normal(mu, sigma)

    def _input(self, x: Tensor) -> Tensor:
        return x.round() if self.binarise else x

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The optimiser that the settings name, over all parameters."""
        return self.optimizer_settings.make(self.parameters())


def kl_to_standard_normal(mu: Tensor, sigma: Tensor) -> Tensor:
    """KL(N(mu, sigma^2) || N(0, I)), summed over all entries."""
    return 0.5 * (mu.square() + sigma.square() - 1 - 2 * sigma.log()).sum()


def _layers(widths: list[int]) -> list[nn.Module]:
    """Linear layers with ReLU between."""
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]
