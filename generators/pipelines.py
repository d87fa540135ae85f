"""What generators on top of diffusers have in common: schedulers by name, precision, images from tensors."""

from __future__ import annotations

import inspect
from typing import Any, Literal

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiffusionPipeline, DPMSolverMultistepScheduler, SchedulerMixin
from torch import Tensor, nn

from generators.base import LUMINANCE, to_uint8

__all__ = [
    "SCHEDULERS",
    "Precision",
    "SchedulerName",
    "check_recurrence",
    "dtype_of",
    "for_gradients",
    "noise_of_velocity",
    "refuse_half",
    "step_arguments",
    "swap_scheduler",
    "to_pixels",
]

SchedulerName = Literal["ddim", "ddpm", "dpmpp"]
SCHEDULERS = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler, "dpmpp": DPMSolverMultistepScheduler}
Precision = Literal["auto", "bf16", "fp16", "fp32"]
_LARGE = 100_000_000  # parameters of a UNet
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def dtype_of(precision: Precision, device: torch.device, auto: torch.dtype) -> torch.dtype:
    """The number format that a ``precision`` means; ``auto`` is the given one on GPUs and fp32 elsewhere."""
    if precision == "auto":
        return auto if device.type == "cuda" else torch.float32
    return _DTYPES[precision]


def for_gradients(*networks: nn.Module) -> None:
    """Get a UNet, and what decodes its samples, ready for gradients of their input: none are kept of the weights, and
    behind a large UNet activations are computed again rather than kept.
    """
    large = sum(parameter.numel() for parameter in networks[0].parameters()) > _LARGE
    for network in networks:
        network.requires_grad_(False)
        if large and getattr(network, "_supports_gradient_checkpointing", False):
            network.enable_gradient_checkpointing()


def noise_of_velocity(velocity: Tensor, s: Tensor, alpha_bar: Tensor) -> Tensor:
    """The noise in a sample ``s``, from the velocity v = sqrt(a) noise - sqrt(1 - a) s0: sqrt(a) v + sqrt(1 - a) s."""
    return alpha_bar.sqrt() * velocity + (1 - alpha_bar).sqrt() * s


def refuse_half(precision: Precision) -> None:
    """Refuse to be guided in fp16."""
    if precision == "fp16":
        raise ValueError("precision is fp16, whose range guided sampling overflows; set it to bf16, fp32 or auto")


def swap_scheduler(pipeline: DiffusionPipeline, name: SchedulerName | None) -> None:
    """Give a pipeline another scheduler with its own noise schedule; None leaves its own, but for a learned variance.

    Raises:
        ValueError: the pipeline's kind of scheduler (flow matching, for one) can't be exchanged for it.
    """
    own = pipeline.scheduler
    if name is None and not str(own.config.get("variance_type", "")).startswith("learned"):
        return
    kind = type(own) if name is None else SCHEDULERS[name]
    if kind is not type(own) and kind not in own.compatibles:
        raise ValueError(
            f"scheduler is {name}, but the pipeline's own {type(own).__name__} can't be exchanged for it; leave "
            "scheduler out"
        )
    # The pipelines here hand on the noise alone, never a learned variance.
    config = {key: value for key, value in own.config.items() if key != "variance_type"}
    # Latents reach beyond [-1, 1], and schedulers that can't clip them leave the setting to another's default: to clip.
    config.setdefault("clip_sample", False)
    pipeline.scheduler = kind.from_config(config)


def check_recurrence(setting: str, name: SchedulerName | None, recurrence: int) -> None:
    """Refuse to repeat steps of a scheduler that looks back several of them."""
    if recurrence > 1 and name == "dpmpp":
        raise ValueError(
            f"{setting} is dpmpp, which looks back several steps, but recurrence is {recurrence}; take ddim or ddpm"
        )


def step_arguments(scheduler: SchedulerMixin, generators: list[torch.Generator]) -> dict[str, Any]:
    """The generators, for schedulers whose step can draw noise."""
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {"generator": generators} if takes else {}


def to_pixels(images: Tensor, shape: tuple[int, int, int]) -> np.ndarray:
    """Images in [0, 1], [N, c, h, w], as uint8 [N, *shape]: resized with antialiasing, grey to RGB or the reverse.

    Raises:
        ValueError: a value is not finite, or the channels are neither grey nor RGB.
    """
    channels, size = shape[0], shape[1:]
    images = images.float()
    if images.shape[-2:] != size:
        images = torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True)
    if images.shape[1] == 3 and channels == 1:
        images = (images * images.new_tensor(LUMINANCE)[:, None, None]).sum(dim=1, keepdim=True)
    elif images.shape[1] != channels:
        if images.shape[1] != 1:
            raise ValueError(
                f"its images have {images.shape[1]} channels, but the data have {channels}; set model to a pipeline of "
                "grey or RGB images"
            )
        images = images.expand(-1, channels, -1, -1)
    return to_uint8(images.clamp(0, 1))  # which keeps what is not finite
