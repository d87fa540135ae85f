"""A class-conditional DCGAN (arXiv 1511.06434) with a projection discriminator (arXiv 1802.05637)."""

from __future__ import annotations

import itertools
from typing import Literal

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import spectral_norm

__all__ = ["ConditionalGAN", "Discriminator", "ImageGenerator"]

_SMALLEST = 4  # pixels: the lowest resolution of either network
_BETAS = (0.5, 0.999)  # of Adam, as in DCGAN


class ImageGenerator(nn.Module):
    """Noise and a label's embedding, through transposed convolutions that double the resolution, to images in [-1, 1].

    Where a resolution is no half of the next (28 pixels: 4, 7, 14, 28) what is too much is cut off.

    Args:
        width: channels below the image's resolution; doubled at each resolution below.
        noise: size of the noise, and of a label's embedding.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, width: int = 32, noise: int = 64) -> None:
        super().__init__()
        self.num_classes, self.noise = num_classes, noise
        self.sizes = [image_size]
        while self.sizes[0] > _SMALLEST:
            self.sizes.insert(0, -(-self.sizes[0] // 2))
        widths = [width * 2**level for level in reversed(range(len(self.sizes) - 1))]
        self.embedding = nn.Embedding(num_classes, noise)
        self.first = nn.Sequential(
            nn.Linear(2 * noise, widths[0] * self.sizes[0] ** 2),
            nn.Unflatten(1, (widths[0], self.sizes[0], self.sizes[0])),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.ConvTranspose2d(before, after, 4, 2, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in itertools.pairwise(widths)
        )
        self.blocks.append(nn.Sequential(nn.ConvTranspose2d(widths[-1], in_channels, 4, 2, 1), nn.Tanh()))

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Images of noise [N, noise] and labels [N]."""
        x = self.first(torch.cat([z, self.embedding(y)], dim=1))
        for block, size in zip(self.blocks, self.sizes[1:], strict=True):
            x = block(x)[..., :size, :size]
        return x


class Discriminator(nn.Module):
    """Strided convolutions, then a logit plus the inner product of features and the label's embedding.

    Spectral normalisation (arXiv 1802.05957) takes the place of DCGAN's batch norm.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before, size = in_channels, image_size
        while size > _SMALLEST:
            layers += [spectral_norm(nn.Conv2d(before, width, 4, 2, 1)), nn.LeakyReLU(0.2)]
            before, width, size = width, 2 * width, size // 2
        self.features = nn.Sequential(*layers, nn.Flatten())
        flat = before * size**2
        self.logit = spectral_norm(nn.Linear(flat, 1))
        self.embedding = spectral_norm(nn.Embedding(num_classes, flat))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Logits [N] of images [N, C, H, W] and labels [N]; high for real ones."""
        features = self.features(x)
        return self.logit(features).squeeze(1) + (features * self.embedding(y)).sum(dim=1)


class ConditionalGAN(pl.LightningModule):
    """Both networks in turns, a step of each per batch of images in [-1, 1] and labels.

    Args:
        loss: ``hinge`` (arXiv 1705.02894) or ``bce``, DCGAN's non-saturating one.
        lr: of both (Adam with DCGAN's betas).
    """

    def __init__(
        self,
        generator: ImageGenerator,
        discriminator: Discriminator,
        loss: Literal["hinge", "bce"] = "hinge",
        lr: float = 2e-4,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.discriminator = generator, discriminator
        self.loss, self.lr = loss, lr

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step of the discriminator, then one of the generator; the discriminator's loss."""
        images, labels = batch
        for_generator, for_discriminator = self.optimizers()
        made = self.generator(torch.randn(len(labels), self.generator.noise, device=self.device), labels)
        wrong = self.discriminator_loss(self.discriminator(images, labels), self.discriminator(made.detach(), labels))
        self._step(for_discriminator, wrong)
        self.toggle_optimizer(for_generator)  # no gradients of the discriminator's weights
        self._step(for_generator, self.generator_loss(self.discriminator(made, labels)))
        self.untoggle_optimizer(for_generator)
        return wrong.detach()

    def _step(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def discriminator_loss(self, real: Tensor, made: Tensor) -> Tensor:
        """Of logits of real and of made images."""
        if self.loss == "hinge":
            return functional.relu(1 - real).mean() + functional.relu(1 + made).mean()
        return functional.softplus(-real).mean() + functional.softplus(made).mean()

    def generator_loss(self, made: Tensor) -> Tensor:
        """Of the logits of made images."""
        return -made.mean() if self.loss == "hinge" else functional.softplus(-made).mean()

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        """The generator's and the discriminator's."""
        networks = (self.generator, self.discriminator)
        return [torch.optim.Adam(net.parameters(), lr=self.lr, betas=_BETAS, fused=True) for net in networks]
