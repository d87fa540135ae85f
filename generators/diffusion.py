"""Class-conditional pixel diffusion: DDPM training, sampling with classifier-free guidance (arXiv 2207.12598)."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, UNet2DModel

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
from generators.pipelines import (
    SchedulerName,
    check_recurrence,
    dtype_of,
    for_gradients,
    noise_of_velocity,
    swap_scheduler,
)
from lightning_modules.diffusion import ClassConditionalDDPM, default_widths, make_unet

__all__ = ["ClassConditionalPipeline", "DiffusionGenerator", "PixelDenoiser"]


class ClassConditionalPipeline(DiffusionPipeline):
    """A diffusers pipeline, in pixel space, of a class-conditional ``unet``, which predicts velocities,
    and a ``scheduler``.

    ``schedule`` is what its samples are made with: it begins at pure noise, and is given the noise that follows from
    the velocity. Clean estimates are not clipped: the schedulers go on from the clipped estimate with the noise of the
    unclipped one, and guided samples get blotches.
    """

    def __init__(self, unet: UNet2DModel, scheduler: DDPMScheduler) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(
        self, labels: torch.Tensor, generator: torch.Generator, steps: int = 20, guidance: float = 2.0
    ) -> torch.Tensor:
        """Images in [0, 1], [N, C, H, W], one for each label.

        Args:
            labels: int64 [N].
            generator: draws all noise, on the CPU, so that a seed means the same noise on every device.
            steps: sampler steps.
            guidance: w of eps = eps_null + w (eps_class - eps_null); 1 is plain conditional sampling, 0 knows no class.
        """
        config = self.unet.config
        shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
        x = torch.randn(shape, generator=generator).to(self.device)
        labels = labels.to(self.device)
        self.scheduler.set_timesteps(steps, device=self.device)
        for t in self.scheduler.timesteps:
            eps = self.predict(x, t, labels, guidance)
            x = self.scheduler.step(eps, t, x, generator=generator).prev_sample
        return ((x + 1) / 2).clamp(0, 1)

    @staticmethod
    def schedule(trained: DDPMScheduler) -> DDPMScheduler:
        """The schedule of the training, for sampling."""
        return DDPMScheduler.from_config(
            trained.config, timestep_spacing="trailing", prediction_type="epsilon", clip_sample=False
        )

    def predict(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, guidance: float) -> torch.Tensor:
        """The noise in ``x`` at step ``t``."""
        alpha_bar = self.scheduler.alphas_cumprod.to(x.device)[t.long()]
        return noise_of_velocity(self._velocity(x, t, labels, guidance), x, alpha_bar)

    def _velocity(self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor, guidance: float) -> torch.Tensor:
        null = torch.full_like(labels, self.unet.config.num_class_embeds - 1)
        if guidance in (0.0, 1.0):
            return self.unet(x, t, class_labels=labels if guidance else null).sample.float()
        both = self.unet(torch.cat([x, x]), t, class_labels=torch.cat([labels, null])).sample.float()
        conditional, free = both.chunk(2)
        return free + guidance * (conditional - free)


def _steps_fit(trained: int, steps: int) -> bool:
    """Whether the schedulers' "trailing" spacing has as many steps. By rounding it may have one more, at -1, for which
    they read the noise of the last.
    """
    return len(np.arange(trained, 0, -trained / steps)) == steps


class PixelDenoiser:
    """A class-conditional pipeline as ``generators.guidance`` samples with it; mixed precision as for plain samples."""

    def __init__(self, pipeline: ClassConditionalPipeline, guidance: float, dtype: torch.dtype) -> None:
        self.pipeline, self.guidance, self.dtype = pipeline, guidance, dtype
        self.scheduler, config = pipeline.scheduler, pipeline.unet.config
        self.shape = (config.in_channels, config.sample_size, config.sample_size)
        for_gradients(pipeline.unet)

    def predict(self, s: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        check_class(int(labels.max()), self.pipeline.unet.config.num_class_embeds - 1)
        with torch.autocast(s.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.pipeline.predict(s, t, labels, self.guidance)

    def decode(self, s: torch.Tensor) -> torch.Tensor:
        return (s + 1) / 2


class DiffusionGenerator(Generator):
    """A small class-conditional diffusion model, trained from scratch on the public images.

    Args:
        widths: UNet channels per resolution; default: by the images' size, see ``default_widths``.
        layers: ResNet blocks per resolution.
        train_steps: optimiser steps of pre-training.
        batch_size, lr, label_dropout, ema: of pre-training (Adam, cosine fall; ema: decay of the averaged weights, at
            step s at most (1 + s) / (10 + s), which is 0.99 from step 890 on).
        diffusion_steps: length of the noising process.
        train_seed: of pre-training; independent of a run's seed, so that one generator serves all seeds.
        sampler: ``ddim`` (arXiv 2010.02502), ``ddpm`` (arXiv 2006.11239: noise in every step, best with many) or
            ``dpmpp`` (DPM-Solver++, arXiv 2211.01095).
        steps: sampler steps.
        guidance: classifier-free guidance weight; 1 is none; 0 leaves the class out, for FedLMG's guides to say it.
        precision: of training and sampling; ``bf16`` keeps weights and schedule in fp32 (mixed), ``auto`` is that on
            GPUs and fp32 elsewhere.
        block_size: images made together.
    """

    def __init__(
        self,
        widths: list[int] | None = None,
        layers: int = 1,
        train_steps: int = 2000,
        batch_size: int = 64,
        lr: float = 1e-3,
        label_dropout: float = 0.1,
        ema: float = 0.995,
        diffusion_steps: int = 1000,
        train_seed: int = 0,
        sampler: SchedulerName = "dpmpp",
        steps: int = 20,
        guidance: float = 2.0,
        precision: Literal["auto", "bf16", "fp32"] = "auto",
        block_size: int = 25,
    ) -> None:
        if widths is not None and (not widths or min(widths) < 1):
            raise ValueError(f"widths is {widths}, but it must list positive channel counts")
        require_positive(train_steps=train_steps, batch_size=batch_size, steps=steps, block_size=block_size)
        require_positive(lr=lr, layers=layers)
        if not 0 <= ema < 1:
            raise ValueError(f"ema is {ema}, but it must be in [0, 1): 1 would keep the weights as they were drawn")
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}, but it must be at least 0 and finite")
        if not 0 <= label_dropout < 1:
            raise ValueError(f"label_dropout is {label_dropout}, but it must be in [0, 1)")
        if not steps <= diffusion_steps:
            raise ValueError(f"steps is {steps}, but it can't exceed diffusion_steps ({diffusion_steps})")
        if sampler == "ddim" and diffusion_steps % steps:
            raise ValueError(
                f"steps is {steps}, but ddim's steps are even, so that it must divide diffusion_steps "
                f"({diffusion_steps}), as 20 or 50 divide 1000; take such a number, or sampler dpmpp"
            )
        if not _steps_fit(diffusion_steps, steps):
            near = [n for n in range(1, diffusion_steps + 1) if _steps_fit(diffusion_steps, n)]
            below, above = max(n for n in near if n < steps), min(n for n in near if n > steps)
            raise ValueError(
                f"steps is {steps}, but diffusers rounds that many steps of {diffusion_steps} (diffusion_steps) to one "
                f"too many; take {below} or {above}"
            )
        if label_dropout == 0 and guidance != 1.0:
            raise ValueError(
                f"label_dropout is 0, so that nothing is learned without a class, which guidance {guidance:g} needs; "
                "raise it, or set guidance to 1"
            )
        self.widths = list(widths) if widths is not None else None
        self.layers, self.train_steps, self.batch_size, self.lr = layers, train_steps, batch_size, lr
        self.label_dropout, self.ema, self.diffusion_steps = label_dropout, ema, diffusion_steps
        self.train_seed, self.sampler, self.steps, self.guidance = train_seed, sampler, steps, guidance
        self.precision: Literal["auto", "bf16", "fp32"] = precision
        self.block_size = block_size
        self.knows_classes = guidance != 0

    def training_settings(self) -> dict[str, Any]:
        network = ("widths", "layers", "label_dropout", "ema", "diffusion_steps")
        training = ("train_steps", "batch_size", "lr", "train_seed", "precision")
        return {"kind": "diffusion", **{name: getattr(self, name) for name in network + training}}

    def sampling_settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sampler", "steps", "guidance", "precision", "block_size")}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        from generators.training import drop_checkpoint, fit_steps, seeded

        channels, size = data.images.shape[1], data.images.shape[2]
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        mixed = dtype_of(self.precision, device, torch.bfloat16) is torch.bfloat16
        with seeded(self.train_seed):
            unet = make_unet(size, channels, len(data.classes), self.widths or default_widths(size), self.layers)
            scheduler = DDPMScheduler(
                num_train_timesteps=self.diffusion_steps,
                beta_schedule="squaredcos_cap_v2",
                prediction_type="v_prediction",
            )
            module = ClassConditionalDDPM(unet, scheduler, self.lr, self.label_dropout, self.ema)
            images = torch.from_numpy(data.images).float().div(127.5).sub(1)
            fit_steps(
                module,
                images,
                torch.from_numpy(data.labels),
                self.batch_size,
                self.train_steps,
                progress,
                seed=self.train_seed,
                folder=folder,
                precision="bf16-mixed" if mixed else "32-true",
            )
            pipeline = ClassConditionalPipeline(module.averaged_unet().cpu(), scheduler)
            pipeline.save_pretrained(str(folder))
        drop_checkpoint(folder)

    def load(self, folder: Path, device: torch.device) -> Sampler:
        return _DiffusionSampler(self._pipeline(folder, device), self)

    def denoiser(self, folder: Path, device: torch.device) -> PixelDenoiser:
        dtype = dtype_of(self.precision, device, torch.bfloat16)
        return PixelDenoiser(self._pipeline(folder, device), self.guidance, dtype)

    def check_guidable(self, recurrence: int) -> None:
        check_recurrence("sampler", self.sampler, recurrence)

    def _pipeline(self, folder: Path, device: torch.device) -> ClassConditionalPipeline:
        unet = UNet2DModel.from_pretrained(str(folder), subfolder="unet", low_cpu_mem_usage=False)
        trained = DDPMScheduler.from_pretrained(str(folder), subfolder="scheduler")
        pipeline = ClassConditionalPipeline(unet.eval(), ClassConditionalPipeline.schedule(trained))
        swap_scheduler(pipeline, self.sampler)
        return pipeline.to(device)


class _DiffusionSampler(Sampler):
    def __init__(self, pipeline: ClassConditionalPipeline, settings: DiffusionGenerator) -> None:
        self.pipeline, self.settings = pipeline, settings

    def sample(self, block: Block) -> np.ndarray:
        check_class(block.label, self.pipeline.unet.config.num_class_embeds - 1)
        noise = torch.Generator().manual_seed(block_seed(block))
        labels = torch.full((self.settings.block_size,), block.label)
        device = self.pipeline.device
        dtype = dtype_of(self.settings.precision, device, torch.bfloat16)
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            images = self.pipeline(labels, noise, self.settings.steps, self.settings.guidance)
        return to_uint8(images)
