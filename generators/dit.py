"""Class-conditional diffusion transformers (DiT, arXiv 2212.09748), as diffusers' DiTPipeline stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, DiTPipeline

from generators.base import Block, Sampler
from generators.pipelines import Precision, SchedulerName, step_arguments, to_pixels
from generators.pretrained import PretrainedGenerator, PretrainedSampler

__all__ = ["DiT"]


class DiT(PretrainedGenerator):
    """Images by the class ids that a DiT was trained with (ImageNet's, for the published ones).

    Args:
        model: local folder, or id on the hub, of a DiTPipeline.
        class_ids: the pipeline's id of each class name of the data; default: the names that the pipeline itself knows.
        steps: sampler steps.
        guidance: classifier-free guidance weight, at least 0; 1 is none.
        scheduler: ``ddim``, ``ddpm``, ``dpmpp``, or null: the pipeline's own.
        precision: of the weights; ``auto`` is fp16 on GPUs, fp32 elsewhere.
        block_size: images made together.
    """

    pipeline_class = DiTPipeline

    def __init__(
        self,
        model: str,
        class_ids: dict[str, int] | None = None,
        steps: int = 50,
        guidance: float = 4.0,
        scheduler: SchedulerName | None = None,
        precision: Precision = "auto",
        block_size: int = 8,
    ) -> None:
        super().__init__(model, steps, guidance, scheduler, precision, block_size)
        self.class_ids = None if class_ids is None else dict(class_ids)

    def sampling_settings(self) -> dict[str, Any]:
        return {**super().sampling_settings(), "class_ids": self.class_ids}

    def check_classes(self, classes: list[str]) -> None:
        unknown = sorted(set(self.class_ids or {}) - set(classes))
        if unknown:
            raise ValueError(f"class_ids: the data have no class {', '.join(unknown)}; known: {', '.join(classes)}")

    def check(self, weights: Path, classes: list[str]) -> None:
        index = self.config(weights, "model_index.json")
        if index.get("_class_name") != DiTPipeline.__name__:
            raise ValueError(f"model is {self.model}, a {index.get('_class_name')}, but dit takes a DiTPipeline")
        count = self.config(weights, "transformer/config.json").get("num_embeds_ada_norm")
        if count is None:
            raise ValueError(
                f"model is {self.model}, but {weights / 'transformer/config.json'} has no num_embeds_ada_norm, as a "
                "transformer that knows classes has; complete the folder, or name another model"
            )
        self._ids(classes, _names(index.get("id2label") or {}), count)

    def _ids(self, classes: list[str], known: dict[str, int], count: int) -> list[int]:
        ids = known if self.class_ids is None else self.class_ids
        missing = [name for name in classes if name not in ids]
        if missing:
            way = "give class_ids for all classes" if self.class_ids is None else "add them"
            raise ValueError(f"class_ids: no id of class {', '.join(missing)}; {way}, as {{{missing[0]}: 7}}")
        for name in classes:
            if not 0 <= ids[name] < count:
                raise ValueError(f"class_ids: {name} is {ids[name]}, but the pipeline knows 0..{count - 1}")
        return [ids[name] for name in classes]

    def sampler(self, pipeline: DiffusionPipeline, classes: list[str], shape: tuple[int, int, int]) -> Sampler:
        ids = self._ids(classes, pipeline.labels, pipeline.transformer.config.num_embeds_ada_norm)
        return _DiTSampler(self, pipeline, classes, shape, ids)


def _names(id2label: dict[str, str]) -> dict[str, int]:
    """Ids by name; a label may hold several names, divided by commas."""
    return {name.strip(): int(number) for number, names in id2label.items() for name in names.split(",")}


class _DiTSampler(PretrainedSampler):
    """DiTPipeline's own loop, but for two things: every image has noise of its own in every step, and the null class is
    the one after the last, whatever their number (diffusers takes ImageNet's 1,000).
    """

    settings: DiT

    def __init__(
        self, settings: DiT, pipeline: DiTPipeline, classes: list[str], shape: tuple[int, int, int], ids: list[int]
    ) -> None:
        super().__init__(settings, pipeline, classes, shape)
        self.ids = ids

    @torch.no_grad()
    def sample(self, block: Block) -> np.ndarray:
        noise = self.noise(block)
        transformer, vae, scheduler = self.pipeline.transformer, self.pipeline.vae, self.pipeline.scheduler
        config, device, dtype = transformer.config, transformer.device, transformer.dtype
        latent = (1, config.in_channels, config.sample_size, config.sample_size)
        x = torch.cat([torch.randn(latent, generator=generator) for generator in noise]).to(device, dtype)
        labels = torch.full((len(x),), self.ids[block.label], device=device)
        guided = self.settings.guidance != 1.0
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        scheduler.set_timesteps(self.settings.steps, device=device)
        x = x * scheduler.init_noise_sigma
        options = step_arguments(scheduler, noise)
        for t in scheduler.timesteps:
            scaled = scheduler.scale_model_input(torch.cat([x, x]) if guided else x, t)
            found = transformer(scaled, timestep=t.expand(len(scaled)), class_labels=labels).sample
            eps = found[:, : config.in_channels]  # what follows is a learned variance
            if guided:
                conditional, free = eps.chunk(2)
                eps = free + self.settings.guidance * (conditional - free)
            x = scheduler.step(eps, t, x, **options).prev_sample
        images = vae.decode(x / vae.config.scaling_factor).sample
        return to_pixels((images / 2 + 0.5).clamp(0, 1), self.shape)
