"""What guides: cross-entropy of a classifier, and the distance of its batch norms' inputs from what they have seen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from generators.base import LUMINANCE

__all__ = ["ClassifierGuide", "Statistics", "batch_norms", "norm_distance"]

Statistics = Literal["image", "batch"]


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """The module's batch norms that keep running statistics."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm) and part.running_mean is not None]


def norm_distance(inputs: Tensor, layer: _BatchNorm, statistics: Statistics) -> Tensor:
    """||var(x) - running_var||_2 + ||mean(x) - running_mean||_2 of a batch norm's input, one number for each image [N].

    The norms are not squared and the variance is biased, as train mode normalises with (running_var itself gathers the
    unbiased one): FedLMG's L_BN for one layer.

    Args:
        inputs: [N, C, ...].
        statistics: ``image``: over an image's own places, as the released code has it, which makes single images;
            ``batch``: over images and places, the same number for all images.
    """
    precise = inputs if inputs.dtype == torch.float64 else inputs.float()  # half formats lose the variance
    flat = precise.flatten(2) if inputs.dim() > 2 else precise[..., None]
    over = (2,) if statistics == "image" else (0, 2)
    variance, mean = torch.var_mean(flat, dim=over, correction=0)
    norm = torch.linalg.vector_norm
    distance = norm(variance - layer.running_var, dim=-1) + norm(mean - layer.running_mean, dim=-1)
    return distance if statistics == "image" else distance.expand(len(inputs))


class ClassifierGuide:
    """L_CE + lambda L_BN of images under one classifier.

    With ``batch`` statistics every image's loss holds the whole batch's L_BN, so that the gradient of their sum is as
    large for each image as it is where the image stands alone.

    Args:
        classifier: logits of normalised images; it is put into evaluation mode. Without batch norms (VGG16) L_BN is 0.
        weight: lambda.
        size, channels: of the images that the classifier takes.
        mean, std: per channel, of images in [0, 1].
        statistics: see ``norm_distance``.
    """

    def __init__(
        self,
        classifier: nn.Module,
        weight: float,
        size: int,
        channels: int,
        mean: list[float],
        std: list[float],
        statistics: Statistics = "image",
    ) -> None:
        self.classifier = classifier.eval().requires_grad_(False)
        self.layers = batch_norms(classifier)
        self.has_norms = bool(weight and self.layers)  # whether there is an L_BN to guide by
        self.weight, self.size, self.channels, self.statistics = weight, size, channels, statistics
        self.mean, self.std = (torch.tensor(values)[:, None, None] for values in (mean, std))

    def inputs(self, images: Tensor) -> Tensor:
        """Images in [0, 1], [N, c, h, w], as the classifier takes them: resized, grey or RGB, normalised."""
        if images.shape[-2:] != (self.size, self.size):
            images = functional.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
        if images.shape[1] != self.channels:
            grey = images
            if images.shape[1] == 3:
                grey = (images * images.new_tensor(LUMINANCE)[:, None, None]).sum(dim=1, keepdim=True)
            images = grey if self.channels == 1 else grey.expand(-1, self.channels, -1, -1)
        return (images - self.mean.to(images)) / self.std.to(images)

    def losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """L_CE + lambda L_BN of each image [N], and its lambda L_BN alone."""
        logits, distance = self.look(images)
        norms = self.weight * distance
        return norms + functional.cross_entropy(logits, labels, reduction="none"), norms

    def look(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [N, classes], and L_BN of each image [N]: 0 where lambda is 0 or there are no norms."""
        with self._watched() as distances:
            logits = self.classifier(self.inputs(images))
        none = torch.zeros(len(images), device=images.device, dtype=logits.dtype)
        return logits, torch.stack(distances).sum(dim=0) if distances else none

    @contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        distances: list[Tensor] = []

        def watch(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            distances.append(norm_distance(inputs[0], layer, self.statistics))

        watching = self.layers if self.weight else []
        hooks = [layer.register_forward_pre_hook(watch) for layer in watching]
        try:
            yield distances
        finally:
            for hook in hooks:
                hook.remove()
