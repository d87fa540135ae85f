"""Diffusion models that know no classes, as diffusers stores them: FedLMG's classifiers alone say what they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMPipeline, DDPMPipeline, DiffusionPipeline, LDMPipeline
from torch import Tensor

from generators.base import Block, Sampler
from generators.pipelines import (
    Precision,
    SchedulerName,
    check_recurrence,
    dtype_of,
    for_gradients,
    noise_of_velocity,
    refuse_half,
    step_arguments,
    swap_scheduler,
    to_pixels,
)
from generators.pretrained import PretrainedGenerator, PretrainedSampler

__all__ = ["Unconditional", "UnconditionalDenoiser"]

_KINDS = [kind.__name__ for kind in (DDIMPipeline, DDPMPipeline, LDMPipeline)]


class UnconditionalDenoiser:
    """A UNet2D pipeline, in pixel space or in the latents of a VQ model, as ``generators.guidance`` samples with it.

    The VQ model's decoder is in the loop; through its quantisation the gradient goes straight (arXiv 1711.00937).

    Raises:
        ValueError: the UNet predicts what a noise does not follow from.
    """

    def __init__(self, pipeline: DiffusionPipeline) -> None:
        self.pipeline, self.unet, self.scheduler = pipeline, pipeline.unet, pipeline.scheduler
        self.decoder = getattr(pipeline, "vqvae", None)
        for_gradients(self.unet, *([self.decoder] if self.decoder is not None else []))
        config = self.unet.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        self._predicts = self.scheduler.config.prediction_type
        if self._predicts not in ("epsilon", "v_prediction", "sample"):
            raise ValueError(f"the model predicts {self._predicts}, but epsilon, v_prediction or sample are known")
        # The schedule is given the noise; a clipped estimate would go on with the noise of the unclipped one.
        self.scheduler.register_to_config(prediction_type="epsilon", clip_sample=False)

    def predict(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """The noise; the labels say nothing here."""
        found = self.unet(s.to(self.unet.dtype), t).sample.float()[:, : s.shape[1]]  # behind it, a learned variance
        if self._predicts == "epsilon":
            return found
        alpha_bar = self.scheduler.alphas_cumprod.to(s.device)[t.long()]
        if self._predicts == "v_prediction":
            return noise_of_velocity(found, s, alpha_bar)
        return (s - alpha_bar.sqrt() * found) / (1 - alpha_bar).sqrt()

    def decode(self, s: Tensor) -> Tensor:
        if self.decoder is not None:
            s = self.decoder.decode(s.to(self.decoder.dtype) / self.decoder.config.scaling_factor).sample.float()
        return (s + 1) / 2


class Unconditional(PretrainedGenerator):
    """Images of a diffusers pipeline without classes: DDPMPipeline, DDIMPipeline (pixels), LDMPipeline (VQ latents).

    With ``method: fedlmg`` the clients' classifiers guide them to classes; where images must have one, it is refused.

    Args:
        model: local folder, or id on the hub.
        steps: sampler steps.
        scheduler: ``ddim``, ``ddpm`` or ``dpmpp``.
        precision: of the weights; ``auto`` is fp16 on GPUs (bf16 where classifiers guide), fp32 elsewhere.
        block_size: images made together.
    """

    knows_classes = False

    def __init__(
        self,
        model: str,
        steps: int = 50,
        scheduler: SchedulerName = "ddim",
        precision: Precision = "auto",
        block_size: int = 8,
    ) -> None:
        super().__init__(model, steps, 1.0, scheduler, precision, block_size)

    def sampling_settings(self) -> dict[str, Any]:
        return {name: value for name, value in super().sampling_settings().items() if name != "guidance"}

    def check(self, weights: Path, classes: list[str]) -> None:
        kind = self.config(weights, "model_index.json").get("_class_name")
        if kind not in _KINDS:
            raise ValueError(f"model is {self.model}, a {kind}, but unconditional takes a {', '.join(_KINDS)}")

    def sampler(self, pipeline: DiffusionPipeline, classes: list[str], shape: tuple[int, int, int]) -> Sampler:
        return _UnconditionalSampler(self, pipeline, classes, shape)

    def denoiser(self, folder: Path, device: torch.device) -> UnconditionalDenoiser:
        """For guided sampling; bf16 instead of fp16, whose first steps overflow."""
        with self.unchanged():
            pipeline = self.pipeline(folder, device, dtype_of(self.precision, device, torch.bfloat16))
        swap_scheduler(pipeline, self.scheduler)
        return UnconditionalDenoiser(pipeline)

    def check_guidable(self, recurrence: int) -> None:
        refuse_half(self.precision)
        check_recurrence("scheduler", self.scheduler, recurrence)


class _UnconditionalSampler(PretrainedSampler):
    """The pipelines' own loop, with noise of its own for every image in every step."""

    settings: Unconditional

    def __init__(
        self, settings: Unconditional, pipeline: DiffusionPipeline, classes: list[str], shape: tuple[int, int, int]
    ) -> None:
        super().__init__(settings, pipeline, classes, shape)
        self.model = UnconditionalDenoiser(pipeline)

    @torch.no_grad()
    def sample(self, block: Block) -> np.ndarray:
        noise, scheduler = self.noise(block), self.pipeline.scheduler
        drawn = [torch.randn(self.model.shape, generator=generator) for generator in noise]
        x = torch.stack(drawn).to(self.model.unet.device)
        labels = torch.full((len(x),), block.label, device=x.device)
        scheduler.set_timesteps(self.settings.steps, device=x.device)
        options = step_arguments(scheduler, noise)
        for t in scheduler.timesteps:
            x = scheduler.step(self.model.predict(x, t, labels), t, x, **options).prev_sample
        return to_pixels(self.model.decode(x).clamp(0, 1), self.shape)
