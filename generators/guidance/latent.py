"""Stable Diffusion as a denoiser that can be guided: latents, a prompt for each class, the decoder in the loop."""

from __future__ import annotations

import torch
from diffusers import StableDiffusionPipeline
from torch import Tensor

from generators.pipelines import for_gradients

__all__ = ["LatentDenoiser"]


class LatentDenoiser:
    """A Stable Diffusion pipeline as ``generators.guidance.sampling`` samples with it (FedLMG's own setting).

    Args:
        prompts: of each class.
        guidance: classifier-free guidance weight; 1 is none.
        size: pixels of the images; default: the pipeline's.

    Raises:
        ValueError: the pipeline is of another kind, or does not predict noise.
    """

    def __init__(
        self,
        pipeline: StableDiffusionPipeline,
        prompts: list[str],
        negative_prompt: str | None,
        guidance: float,
        size: int | None,
    ) -> None:
        if not isinstance(pipeline, StableDiffusionPipeline):
            raise ValueError(
                f"{type(pipeline).__name__} can't be guided by classifiers; take a StableDiffusionPipeline, as of v1-5"
            )
        if pipeline.scheduler.config.prediction_type != "epsilon":
            raise ValueError(
                f"the model predicts {pipeline.scheduler.config.prediction_type}, but guidance needs epsilon; take v1-5"
            )
        self.pipeline, self.guidance, self.scheduler = pipeline, guidance, pipeline.scheduler
        unet, factor = pipeline.unet, pipeline.vae_scale_factor
        for_gradients(unet, pipeline.vae)
        pixels = size or unet.config.sample_size * factor
        if pixels % factor:
            raise ValueError(f"size is {size}, but it must be a multiple of {factor}, the decoder's scale")
        self.shape = (unet.config.in_channels, pixels // factor, pixels // factor)
        with torch.no_grad():
            negative = None if negative_prompt is None else [negative_prompt] * len(prompts)
            words, free = pipeline.encode_prompt(prompts, pipeline.device, 1, guidance != 1.0, negative)
        self._words, self._free = words, free

    def predict(self, s: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        unet, words = self.pipeline.unet, self._words[labels]
        s = s.to(unet.dtype)
        if self.guidance == 1.0:
            return unet(s, t, encoder_hidden_states=words).sample.float()
        hidden = torch.cat([words, self._free[labels]])
        given, free = unet(torch.cat([s, s]), t, encoder_hidden_states=hidden).sample.float().chunk(2)
        return free + self.guidance * (given - free)

    def decode(self, s: Tensor) -> Tensor:
        vae = self.pipeline.vae
        images = vae.decode(s.to(vae.dtype) / vae.config.scaling_factor).sample
        return (images.float() + 1) / 2
