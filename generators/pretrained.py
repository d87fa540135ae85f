"""Generators whose weights others have trained: a diffusers pipeline in a local folder, or on the Hugging Face hub."""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.util
import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import constants, snapshot_download
from safetensors import SafetensorError, safe_open

from generators.base import Block, Generator, Sampler, TrainingImages, check_class, image_seeds, require_positive
from generators.pipelines import Precision, SchedulerName, dtype_of, swap_scheduler

__all__ = ["PretrainedGenerator", "PretrainedSampler", "wanted"]

_NO_VOCABULARY = {"tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}  # of a tokenizer's files
_DECIDING = (".safetensors", ".json", ".txt", ".model")  # weights, configurations, vocabularies


def _weights_digest(folder: Path) -> str:
    """A hash of the files below a folder that decide what a pipeline makes."""
    files = sorted(path for path in folder.rglob("*") if path.suffix in _DECIDING and path.is_file())
    states = [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _digest(folder, tuple(states))


@functools.cache
def _digest(folder: Path, files: tuple[tuple[str, int, int], ...]) -> str:
    """Gigabytes, so once in a process; sizes and times of change tell whether a file is still the same."""
    made = hashlib.sha256()
    for name, size, _ in files:
        made.update(f"{name} {size} ".encode())
        with (folder / name).open("rb") as stream:
            made.update(hashlib.file_digest(stream, "sha256").digest())
    return made.hexdigest()


class PretrainedGenerator(Generator):
    """Loads a diffusers pipeline; it learns from no real images. Pickled weights are refused.

    Args:
        model: a local folder, or an id on the hub. Of an id, the version in the hub's cache is taken without a question
            for a newer one; otherwise the newest is downloaded.
        steps: sampler steps.
        guidance: classifier-free guidance weight, at least 0; 1 is none.
        scheduler: ``ddim``, ``ddpm``, ``dpmpp``, or null: the pipeline's own.
        precision: of the weights; ``auto`` is fp16 on GPUs, fp32 elsewhere.
        block_size: images made together.
    """

    learns_from = "none"
    pipeline_class: type[DiffusionPipeline] = DiffusionPipeline

    def __init__(
        self,
        model: str,
        steps: int,
        guidance: float,
        scheduler: SchedulerName | None,
        precision: Precision,
        block_size: int,
    ) -> None:
        require_positive(steps=steps, block_size=block_size)
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}, but it must be at least 0 and finite")
        # Whole, since an actor may work in another folder.
        self.model = str(Path(model).expanduser().absolute()) if Path(model).expanduser().is_dir() else model
        self.steps, self.guidance = steps, guidance
        self.scheduler, self.precision, self.block_size = scheduler, precision, block_size

    @property
    def _local(self) -> Path | None:
        return Path(self.model) if Path(self.model).is_dir() else None

    def folders(self) -> dict[str, Path]:
        """The local folders whose files decide what it makes, by setting."""
        return {} if self._local is None else {"model": self._local}

    @functools.cached_property
    def digests(self) -> dict[str, str]:
        """Of the files in ``folders``, as they were when they were looked at first."""
        return self._digests_now()

    def _digests_now(self) -> dict[str, str]:
        return {setting: f"sha256:{_weights_digest(folder)}" for setting, folder in self.folders().items()}

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Refuse, before and after what is loaded within, files that are no longer those of ``digests``: their images
        would be kept as those of the files of before.
        """
        self._check_unchanged()
        yield
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        for setting, digest in self._digests_now().items():
            if digest != self.digests.get(setting):
                folder = self.folders()[setting]
                raise ValueError(f"{setting} is {folder}, whose files have changed since they were hashed; run again")

    def training_settings(self) -> dict[str, Any]:
        """The weights: a hash of a folder's files, or the hub's commit."""
        return {"weights": self.digests.get("model") or f"{self.model}@{self._commit()}"}

    def content(self) -> dict[str, str]:
        return {"model": self.training_settings()["weights"]}

    def sampling_settings(self) -> dict[str, Any]:
        names = ("steps", "guidance", "scheduler", "precision", "block_size")
        return {name: getattr(self, name) for name in names}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        """See that the weights are on this machine, and keep what the images are to be like."""
        weights = self._folder()
        self._check_whole(weights)
        self._check_fitting(weights)
        self.check(weights, data.classes)
        kept = {"classes": list(data.classes), "shape": list(data.images.shape[1:]), "weights": str(weights)}
        (folder / "wanted.json").write_text(json.dumps(kept), encoding="utf-8")

    def _check_whole(self, weights: Path) -> None:
        """Refuse a folder without the parts that its index names, or with parts that are not whole: some pipelines load
        without them and fail later, and loading gigabytes to find out takes its time.
        """
        index, given = self.config(weights, "model_index.json"), self.components(weights)
        if "_class_name" not in index:
            raise ValueError(
                f"model is {self.model}, but {weights / 'model_index.json'} names no pipeline (_class_name); complete "
                "the folder, or name another model"
            )
        for name, kind in index.items():
            is_part = isinstance(kind, list) and len(kind) == 2 and all(isinstance(word, str) for word in kind)
            if not is_part or name in given:
                continue
            lacks = _lacks(weights / name)
            if lacks is not None:
                raise ValueError(
                    f"model is {self.model}, but {weights / name}, which its model_index.json names, {lacks}; "
                    "complete the folder, or name another model"
                )

    def _check_fitting(self, weights: Path) -> None:
        """Refuse a UNet that does not denoise what the pipeline's VAE decodes."""
        index = self.config(weights, "model_index.json")
        if not {"unet", "vae"} <= index.keys():
            return
        takes = self.config(weights, "unet/config.json").get("in_channels")
        decodes = self.config(weights, "vae/config.json").get("latent_channels")
        if None not in (takes, decodes) and takes != decodes:
            raise ValueError(
                f"model is {self.model}, but its unet takes {takes} channels and its vae decodes {decodes}; take the "
                "parts of one pipeline, one that makes images from text or classes alone"
            )

    def check(self, weights: Path, classes: list[str]) -> None:
        """Refuse, with a ValueError, what settings and data set don't allow with these weights."""
        return

    @abstractmethod
    def sampler(self, pipeline: DiffusionPipeline, classes: list[str], shape: tuple[int, int, int]) -> Sampler:
        """A sampler of a loaded pipeline, for a data set of these classes and images [C, H, W]."""

    def config(self, weights: Path, name: str) -> dict[str, Any]:
        """A JSON file of the weights' folder."""
        try:
            return json.loads((weights / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            what = "is no JSON file of a pipeline" if (weights / name).exists() else "is not there"
            raise ValueError(
                f"model is {self.model}, but {weights / name} {what}; name the folder of a diffusers pipeline"
            ) from error

    def components(self, weights: Path) -> dict[str, Any]:
        """Components that take the place of the pipeline's own."""
        return {}

    def load(self, folder: Path, device: torch.device) -> Sampler:
        kept = wanted(folder)
        with self.unchanged():
            pipeline = self.pipeline(folder, device, dtype_of(self.precision, device, torch.float16))
            swap_scheduler(pipeline, self.scheduler)
            return self.sampler(pipeline, kept["classes"], tuple(kept["shape"]))

    def pipeline(self, folder: Path, device: torch.device, dtype: torch.dtype) -> DiffusionPipeline:
        """The pipeline on a device, with its own scheduler."""
        found = Path(wanted(folder)["weights"])
        weights = found if self._local is None and found.is_dir() else self._folder()  # the hub is asked once, by fit
        try:
            with _quiet():
                pipeline = self.pipeline_class.from_pretrained(
                    str(weights),
                    torch_dtype=dtype,
                    use_safetensors=True,
                    local_files_only=True,
                    **self.components(weights),
                )
        except (OSError, ImportError, ValueError, AttributeError) as error:
            raise ValueError(
                f"model is {self.model}, but {weights} can't be loaded as a diffusers pipeline with safetensors "
                f"({' '.join(str(error).split())}); complete the folder, or name another model"
            ) from error
        most = pipeline.scheduler.config.get("num_train_timesteps")
        if most is not None and self.steps > most:  # not all schedulers refuse: some repeat steps, or begin at the last
            raise ValueError(f"steps is {self.steps}, but it can't exceed the {most} steps of {self.model}'s scheduler")
        pipeline.set_progress_bar_config(disable=True)
        return pipeline.to(device)

    def _commit(self) -> str:
        """The version in the hub's cache, or else the hub's newest."""
        index = {"allow_patterns": "model_index.json"}
        try:
            return Path(snapshot_download(self.model, local_files_only=True, **index)).name
        except FileNotFoundError:
            return self._fetch(snapshot_download, **index).name
        except ValueError as error:  # HFValidationError: this can be no id
            raise ValueError(
                f"model is {self.model}, which is neither a folder nor an id on the hub; "
                "give the folder of a diffusers pipeline, or an id as owner/name"
            ) from error

    def _folder(self) -> Path:
        """The folder with the weights; what the hub's cache lacks of them is downloaded."""
        if self._local is not None:
            return self._local
        return self._fetch(self.pipeline_class.download, revision=self._commit(), use_safetensors=True)

    def _fetch(self, get: Callable[..., str], **options: Any) -> Path:
        try:
            return Path(get(self.model, **options))
        except OSError as error:
            offline = "set (unset it to download them)" if constants.HF_HUB_OFFLINE else "not set"
            raise ValueError(
                f"model is {self.model}: there is no folder {Path(self.model).absolute()}, the hub's cache "
                f"{constants.HF_HUB_CACHE} does not hold its weights, and they can't be downloaded "
                f"({' '.join(str(error).split())}). HF_HUB_OFFLINE is {offline}. Correct the folder's name; or, of an "
                f"id on the hub, fetch the weights on a machine with access (hf download {self.model}) and set HF_HOME "
                "to that cache"
            ) from error


def _lacks(part: Path) -> str | None:
    """What a part of a pipeline lacks to be whole; None: nothing that can be seen without loading it."""
    if not part.is_dir():
        return "is not there"
    names = {path.name for path in part.iterdir() if path.is_file()}
    weights = sorted(name for name in names if name.endswith(".safetensors"))
    if not names:
        return "is empty"
    if "config.json" in names and not weights:  # a network; schedulers and tokenizers have other files
        return "has no safetensors"
    if weights and "config.json" not in names:
        return "has no config.json"
    if "tokenizer_config.json" in names and names <= _NO_VOCABULARY:
        return "has no vocabulary"
    for name in weights:
        try:
            with safe_open(part / name, "pt"):  # reads the header, and compares its sizes with the file's
                pass
        except (SafetensorError, OSError) as error:
            return f"has a damaged {name} ({error})"
    return None


def wanted(folder: Path) -> dict[str, Any]:
    """What ``fit`` has kept."""
    return json.loads((folder / "wanted.json").read_text(encoding="utf-8"))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the libraries' progress bars, and without a word on ``torch_dtype``, which diffusers is renaming."""
    packages = [name for name in ("diffusers", "transformers") if importlib.util.find_spec(name) is not None]
    for name in packages:
        importlib.import_module(f"{name}.utils.logging").disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch_dtype.* is deprecated.*")
        yield


class PretrainedSampler(Sampler):
    """What the samplers share: noise for each image, classes by number."""

    def __init__(
        self,
        settings: PretrainedGenerator,
        pipeline: DiffusionPipeline,
        classes: list[str],
        shape: tuple[int, int, int],
    ) -> None:
        self.settings, self.pipeline, self.classes, self.shape = settings, pipeline, classes, shape

    def noise(self, block: Block) -> list[torch.Generator]:
        """A generator for each image of a block, on the CPU: a seed means the same noise on every device."""
        check_class(block.label, len(self.classes))
        return [torch.Generator().manual_seed(seed) for seed in image_seeds(block, self.settings.block_size)]
