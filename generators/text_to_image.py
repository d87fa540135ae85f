"""Text-to-image: a data set's classes as prompts for Stable Diffusion or any other diffusers pipeline that takes them.

The server of GenFL (arXiv 2503.20166) does that with Stable Diffusion v1-5; prompt, steps, guidance and size are our
reconstruction of its setting.
"""

from __future__ import annotations

import importlib.util
import inspect
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline

from generators.base import Block, Sampler, class_words, require_positive
from generators.guidance.latent import LatentDenoiser
from generators.pipelines import (
    Precision,
    SchedulerName,
    check_recurrence,
    dtype_of,
    refuse_half,
    swap_scheduler,
    to_pixels,
)
from generators.pretrained import PretrainedGenerator, PretrainedSampler, wanted

__all__ = ["TextToImage"]

_CLASS = "{class}"
_WORDS = 2  # raised when a class gets other words


class TextToImage(PretrainedGenerator):
    """Images from prompts. Needs the package transformers (extra ``text``).

    Args:
        model: id on the hub, or local folder, of a diffusers pipeline that takes prompts.
        prompts: templates with {class}; image i of a class is made with template i mod n.
        negative_prompt: what the images should not show.
        steps: sampler steps.
        guidance: classifier-free guidance weight, at least 0; 1 or less is none.
        scheduler: ``ddim``, ``ddpm``, ``dpmpp``, or null: the pipeline's own.
        precision: of the weights; ``auto`` is fp16 on GPUs, fp32 elsewhere.
        size: pixels of the images as they are generated, before they are resized to the data set's; default: the
            pipeline's.
        lora: folder of LoRA weights in safetensors. Needs the package peft (extra ``text``).
        class_names: words for the prompt, by class name, where they should differ from ``class_words``.
        safety_checker: a pipeline that comes with a checker makes what it objects to black (summary.json counts these
            images, of those that the run itself made, as ``blackened_images``); false leaves it away.
        block_size: images made together.
    """

    def __init__(
        self,
        model: str = "stable-diffusion-v1-5/stable-diffusion-v1-5",
        prompts: list[str] | None = None,
        negative_prompt: str | None = None,
        steps: int = 50,
        guidance: float = 7.5,
        scheduler: SchedulerName | None = None,
        precision: Precision = "auto",
        size: int | None = None,
        lora: str | None = None,
        class_names: dict[str, str] | None = None,
        safety_checker: bool = True,
        block_size: int = 8,
    ) -> None:
        super().__init__(model, steps, guidance, scheduler, precision, block_size)
        self.prompts = ["a photo of a {class}"] if prompts is None else list(prompts)
        if not self.prompts:
            raise ValueError("prompts is an empty list; give at least one template, as 'a photo of a {class}'")
        for template in self.prompts:
            if _CLASS not in template:
                raise ValueError(f"prompts: {template!r} has no {_CLASS}, so it is the same for every class; add it")
            for other in re.findall(r"\{[^{}]*\}", template.replace(_CLASS, "")):
                raise ValueError(f"prompts: {template!r} has {other}, but only {_CLASS} is filled in; take it out")
        require_positive(size=size)
        self.negative_prompt, self.size = negative_prompt, size
        self.lora = None if lora is None else str(Path(lora).expanduser().absolute())
        self.class_names, self.safety_checker = dict(class_names or {}), safety_checker

    def folders(self) -> dict[str, Path]:
        return super().folders() | ({} if self.lora is None else {"lora": self._lora_folder()})

    def training_settings(self) -> dict[str, Any]:
        return {**super().training_settings(), "lora": self.digests.get("lora")}

    def content(self) -> dict[str, str]:
        lora = self.training_settings()["lora"]
        return super().content() | ({} if lora is None else {"lora": lora})

    def sampling_settings(self) -> dict[str, Any]:
        names = ("prompts", "negative_prompt", "size", "class_names", "safety_checker")
        return {**super().sampling_settings(), **{name: getattr(self, name) for name in names}, "words": _WORDS}

    def prompt(self, classes: Sequence[str], label: int, index: int) -> str:
        name = classes[label]
        return self.prompts[index % len(self.prompts)].replace(_CLASS, self.class_names.get(name, class_words(name)))

    def check_classes(self, classes: list[str]) -> None:
        unknown = sorted(set(self.class_names) - set(classes))
        if unknown:
            raise ValueError(f"class_names: the data have no class {', '.join(unknown)}; known: {', '.join(classes)}")
        needed = {"transformers": True, "peft": self.lora is not None}
        missing = [name for name, needs in needed.items() if needs and importlib.util.find_spec(name) is None]
        if missing:
            raise ValueError(f"text_to_image needs {' and '.join(missing)}; pip install '.[text]' in fl_ray's checkout")

    def components(self, weights: Path) -> dict[str, Any]:
        if self.safety_checker or "safety_checker" not in self.config(weights, "model_index.json"):
            return {}
        return {"safety_checker": None, "requires_safety_checker": False}

    def check(self, weights: Path, classes: list[str]) -> None:
        kind = getattr(diffusers, str(self.config(weights, "model_index.json").get("_class_name")), None)
        if kind is not None:  # a pipeline of the folder's own shows when it is loaded
            self._arguments(kind)

    def _arguments(self, kind: type[DiffusionPipeline]) -> dict[str, Any]:
        """What a pipeline is called with beside prompts, as far as it is the same for all blocks.

        Raises:
            ValueError: this kind of pipeline takes no such argument.
        """
        known = inspect.signature(kind.__call__).parameters
        options: dict[str, Any] = {"num_inference_steps": self.steps, "guidance_scale": self.guidance}
        if self.size is not None:
            options |= {"height": self.size, "width": self.size}
        if self.negative_prompt is not None:
            options["negative_prompt"] = [self.negative_prompt] * self.block_size
        settings = {"num_inference_steps": "steps", "guidance_scale": "guidance", "height": "size", "width": "size"}
        for argument in ("prompt", *options):
            if argument not in known:
                setting = settings.get(argument, argument)
                raise ValueError(
                    f"model is {self.model}, a {kind.__name__}, which takes no {argument} ({setting}); use a "
                    "text-to-image pipeline"
                )
        return options

    def sampler(self, pipeline: DiffusionPipeline, classes: list[str], shape: tuple[int, int, int]) -> Sampler:
        options = self._arguments(type(pipeline))
        self.add_lora(pipeline)
        return _TextSampler(self, pipeline, classes, shape, options)

    def add_lora(self, pipeline: DiffusionPipeline) -> None:
        """The recipe's LoRA weights on top of the pipeline's, where it names some."""
        if self.lora is not None:
            kind = type(pipeline).__name__
            if not hasattr(pipeline, "load_lora_weights"):
                raise ValueError(f"lora is {self.lora}, but {kind} of {self.model} takes no LoRA weights")
            folder = self._lora_folder()
            try:
                pipeline.load_lora_weights(str(folder), use_safetensors=True, local_files_only=True)
            except (OSError, ValueError, KeyError, RuntimeError) as error:
                reason = " ".join(str(error).split())
                raise ValueError(f"lora is {self.lora}, but its weights don't fit {self.model}: {reason}") from error

    def denoiser(self, folder: Path, device: torch.device) -> LatentDenoiser:
        """For guided sampling: each class's first prompt, bf16 instead of fp16 (whose first steps overflow), and DDPM
        where the recipe names no scheduler (as FedLMG's code).
        """
        self.check_guidable(1)
        with self.unchanged():
            pipeline = self.pipeline(folder, device, dtype_of(self.precision, device, torch.bfloat16))
            self.add_lora(pipeline)
        swap_scheduler(pipeline, self.scheduler or "ddpm")
        classes = wanted(folder)["classes"]
        prompts = [self.prompt(classes, label, 0) for label in range(len(classes))]
        return LatentDenoiser(pipeline, prompts, self.negative_prompt, self.guidance, self.size)

    def check_guidable(self, recurrence: int) -> None:
        refuse_half(self.precision)
        check_recurrence("scheduler", self.scheduler, recurrence)

    def _lora_folder(self) -> Path:
        folder = Path(self.lora)
        if not list(folder.glob("*.safetensors")):
            raise ValueError(
                f"lora is {self.lora}, but there is no such folder with safetensors in it; name the folder of the LoRA "
                "weights, or leave lora out"
            )
        return folder


class _TextSampler(PretrainedSampler):
    settings: TextToImage

    def __init__(
        self,
        settings: TextToImage,
        pipeline: DiffusionPipeline,
        classes: list[str],
        shape: tuple[int, int, int],
        options: dict[str, Any],
    ) -> None:
        super().__init__(settings, pipeline, classes, shape)
        self.options = options
        self._blackened = 0

    def sample(self, block: Block) -> np.ndarray:
        noise, first = self.noise(block), block.number * self.settings.block_size
        prompts = [self.settings.prompt(self.classes, block.label, first + offset) for offset in range(len(noise))]
        try:
            made = self.pipeline(prompt=prompts, generator=noise, output_type="pt", **self.options)
        except ValueError as error:  # it names its own arguments
            given = {name: getattr(self.settings, name) for name in ("steps", "scheduler", "size")}
            told = ", ".join(f"{name} is {value}" for name, value in given.items() if value is not None)
            kind = type(self.pipeline).__name__
            raise ValueError(f"{told}, but the {kind} of {self.settings.model} refuses: {error}") from error
        self._blackened += sum(getattr(made, "nsfw_content_detected", None) or [])
        return to_pixels(made.images, self.shape)

    def report(self) -> dict[str, float]:
        return {"blackened_images": self._blackened} if self._blackened else {}
