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
_FASTER = 2.0  # the discriminator's step by the generator's (arXiv 1706.08500: it must keep ahead)


class _ClassNorm(nn.Module):
    """Batch norm with a scale and a shift of each class, then ReLU."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.scale, self.shift = nn.Embedding(num_classes, channels), nn.Embedding(num_classes, channels)
        nn.init.ones_(self.scale.weight)
        nn.init.zeros_(self.shift.weight)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        scale, shift = (values(y)[:, :, None, None] for values in (self.scale, self.shift))
        return torch.relu(scale * self.norm(x) + shift)


class ImageGenerator(nn.Module):
    """Noise, through transposed convolutions that double the resolution, to images in [-1, 1].

    The label comes in by the batch norms alone, as in arXiv 1802.05637: an embedding beside the noise drowned it, so
    that all images of a class became the same. Where a resolution is no half of the next (28 pixels: 4, 7, 14, 28) what
    is too much is cut off.

    Args:
        width: channels below the image's resolution; doubled at each resolution below.
        noise: size of the noise.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, width: int = 16, noise: int = 64) -> None:
        super().__init__()
        self.num_classes, self.noise = num_classes, noise
        self.sizes = [image_size]
        while self.sizes[0] > _SMALLEST:
            self.sizes.insert(0, -(-self.sizes[0] // 2))
        widths = [width * 2**level for level in reversed(range(len(self.sizes) - 1))]
        self.first = nn.Sequential(
            nn.Linear(noise, widths[0] * self.sizes[0] ** 2),
            nn.Unflatten(1, (widths[0], self.sizes[0], self.sizes[0])),
        )
        self.norms = nn.ModuleList(_ClassNorm(channels, num_classes) for channels in widths)
        pairs = itertools.pairwise([*widths, in_channels])
        self.blocks = nn.ModuleList(nn.ConvTranspose2d(before, after, 4, 2, 1) for before, after in pairs)

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        """Images of noise [N, noise] and labels [N]."""
        x = self.first(z)
        for norm, block, size in zip(self.norms, self.blocks, self.sizes[1:], strict=True):
            x = block(norm(x, y))[..., :size, :size]
        return torch.tanh(x)


class Discriminator(nn.Module):
    """Strided convolutions, then a logit plus the inner product of features and the label's embedding.

    Spectral normalisation (arXiv 1802.05957) takes the place of DCGAN's batch norm.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, width: int = 16) -> None:
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
        lr: of the generator (Adam with DCGAN's betas); the discriminator's is twice that.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        discriminator: Discriminator,
        loss: Literal["hinge", "bce"] = "hinge",
        lr: float = 1e-3,
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
        steps = (self.generator, self.lr), (self.discriminator, _FASTER * self.lr)
        return [torch.optim.Adam(net.parameters(), lr=lr, betas=_BETAS, fused=True) for net, lr in steps]
