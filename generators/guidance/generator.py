"""Images guided by classifiers (FedLMG, arXiv 2311.08870), as a generator: classifier and class in, images out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from generators.base import Block, Generator, Sampler, TrainingImages, block_seed, image_seeds, require_positive
from generators.guidance.losses import ClassifierGuide
from generators.guidance.sampling import Denoiser, GuidanceSettings, GuidedSampler
from generators.pipelines import to_pixels

__all__ = ["LOSSES", "GuideSource", "GuidedGenerator"]

LOSSES = ("loss_first", "loss_last", "cross_entropy_first", "cross_entropy_last")  # summed over the blocks in a report
_SCALES = (1.0, 0.5, 0.25, 0.125, 0.0)  # of eta, for an image whose gradient is not finite; at last, none
_KEPT = 2  # guides on the device: jobs come guide by guide


class GuideSource(Protocol):
    """A classifier that can be loaded where images are made."""

    def key(self) -> dict[str, Any]:
        """What decides its gradients (JSON values): its weights' hash and its part of the losses."""

    def load(self, device: torch.device) -> ClassifierGuide:
        """The classifier on a device."""


class GuidedGenerator(Generator):
    """The diffusion model of another generator, guided. Label ``k * classes + c`` is class c under client k's guide.

    An image's starting noise is fixed by (seed, client, class, index). Noise that the scheduler draws, and the losses
    under ``batch`` statistics, are those of its block.

    Args:
        inner: the generator; its ``denoiser`` is what samples.
        guides: by client; an image of one does not depend on which others there are.
        classes: of the data set.
        shape: [C, H, W] of the images wanted.
        settings: of the guidance, its steps those of the inner generator.
        block_size: images made together, all of one guide and class.
    """

    def __init__(
        self,
        inner: Generator,
        guides: Mapping[int, GuideSource],
        classes: int,
        shape: tuple[int, int, int],
        settings: GuidanceSettings,
        block_size: int,
    ) -> None:
        require_positive(block_size=block_size)
        self.inner, self.guides, self.classes, self.shape = inner, dict(guides), classes, shape
        self.settings, self.block_size = settings, block_size
        self.learns_from, self.more_from = inner.learns_from, inner.more_from

    def training_settings(self) -> dict[str, Any]:
        return self.inner.training_settings()

    def sampling_settings(self) -> dict[str, Any]:
        return self._guided_by(self.guides)

    def part_of(self, label: int) -> int:
        return label // self.classes

    def settings_of(self, part: int) -> dict[str, Any]:
        return self._guided_by([part])

    def _guided_by(self, clients: Iterable[int]) -> dict[str, Any]:
        keys = {str(client): self.guides[client].key() for client in clients}
        guided = {"settings": asdict(self.settings), "guides": keys}
        return {**self.inner.sampling_settings(), "guidance_by": guided, "block_size": self.block_size}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        self.inner.fit(data, folder, progress)

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _GuidedSampler(self, self.inner.denoiser(folder, device), device)


class _GuidedSampler(Sampler):
    def __init__(self, settings: GuidedGenerator, model: Denoiser, device: torch.device) -> None:
        self.settings, self.model, self.device = settings, model, device
        self._guides: dict[int, ClassifierGuide] = {}
        self._counts = {"blocks": 0, **dict.fromkeys(LOSSES, 0.0), "made_again": 0, "unguided": 0}

    def sample(self, block: Block) -> np.ndarray:
        client, label = divmod(block.label, self.settings.classes)
        if client not in self.settings.guides:
            raise ValueError(
                f"there is no guide of client {client}, only of {', '.join(map(str, self.settings.guides))}"
            )
        if client not in self._guides:
            if len(self._guides) >= _KEPT:
                del self._guides[next(iter(self._guides))]
            self._guides[client] = self.settings.guides[client].load(self.device)
        seeds = image_seeds(block, self.settings.block_size)
        drawn = [torch.randn(self.model.shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        noise = torch.stack(drawn).to(self.device)
        labels = torch.full((len(seeds),), label, device=self.device)
        return to_pixels(self._images(block, noise, labels, self._guides[client]), self.settings.shape)

    def _images(self, block: Block, noise: Tensor, labels: Tensor, guide: ClassifierGuide) -> Tensor:
        """The block's images; those with a gradient that is not finite made again with half the step, and half of that;
        where that is still too much, without guidance.
        """
        settings, made = self.settings.settings, torch.empty(0)
        missing = torch.ones(len(noise), dtype=torch.bool, device=noise.device)
        for scale in _SCALES:
            if scale < 1:
                self._counts["made_again"] += int(missing.sum())
            if scale == 0:
                self._counts["unguided"] += int(missing.sum())
            sampler = GuidedSampler(self.model, guide, replace(settings, eta=scale * settings.eta))
            found = sampler(noise, labels, torch.Generator().manual_seed(block_seed(block)))
            made = torch.where(missing[:, None, None, None], found, made) if scale < 1 else found
            told = (sampler.losses, sampler.cross_entropies)
            ends = [losses[at] for losses in told for at in (0, -1) if losses]
            if scale == 1 and ends and np.isfinite(ends).all():
                self._counts["blocks"] += 1
                for name, loss in zip(LOSSES, ends, strict=True):
                    self._counts[name] += loss
            missing = missing & (sampler.broken | ~found.isfinite().flatten(1).all(dim=1))
            if not missing.any():
                break
        return made

    def report(self) -> dict[str, float]:
        return dict(self._counts)
