"""What a generator is: classes and counts in, images and labels out, every image fixed by (seed, class, index).

Images come in *blocks*: block b of a class holds its images b * size ... (b + 1) * size - 1, always made together. So a
sample does not depend on how many are asked for, in which order, or by how many actors they are made.
"""

from __future__ import annotations

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

if TYPE_CHECKING:  # an actor that only samples need not wait for it
    import pytorch_lightning as pl

    from generators.guidance.sampling import Denoiser

__all__ = [
    "LUMINANCE",
    "Block",
    "FederatedTraining",
    "Generator",
    "RealImages",
    "Sampler",
    "TrainingImages",
    "block_seed",
    "check_class",
    "class_words",
    "image_seeds",
    "key_seed",
    "require_positive",
    "settings_digest",
    "to_uint8",
]

LUMINANCE = (0.299, 0.587, 0.114)  # of RGB, ITU-R BT.601, as PIL's "L"
RealImages = Literal["public", "reserve", "none"]


@dataclass(frozen=True)
class TrainingImages:
    """What a generator is trained on: uint8 [N, C, H, W], int64 [N], and class names.

    N is 0 where the generator learns from no real images: the shape still says what size is wanted.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]


@dataclass(frozen=True, order=True)
class Block:
    """Block ``number`` of class ``label``, for sampling seed ``seed``."""

    seed: int
    label: int
    number: int


@dataclass(frozen=True)
class FederatedTraining:
    """How the clients train a generator together (FedAvg of its whole state), instead of ``Generator.fit``.

    Attributes:
        model: a registered model or ``package.module:Class`` of a LightningModule, with its ``settings``.
        sample_fraction: of a client's images that it trains on, drawn anew each round.
    """

    model: str
    settings: dict[str, Any]
    rounds: int
    local_epochs: int
    batch_size: int
    optimizer: Literal["sgd", "adam", "adamw"]
    lr: float
    sample_fraction: float = 1.0


class Sampler(ABC):
    """A loaded generator on one device."""

    @abstractmethod
    def sample(self, block: Block) -> np.ndarray:
        """The block's images, uint8 [block size, C, H, W]; fewer where ``Generator.available`` ends within the block.

        Raises:
            ValueError: the class is unknown, or the block lies behind the last image that there is.
        """

    def report(self) -> dict[str, float]:
        """What it has counted so far, to be added up over samplers."""
        return {}


class Generator(ABC):
    """Settings of a generator, and how to train and load it. Constructor arguments are the recipe's settings.

    Attributes:
        block_size: images made together.
        knows_classes: an image is of the class that it is asked for (as far as the generator is good).
        learns_from: which real images ``fit`` is given: the server's ``public`` ones, the ``reserve`` that nobody else
            sees (``data.reserve_fraction``), or none.
        more_from: where there are only so many images (``available``), what to change to have more.
    """

    block_size: int
    knows_classes: bool = True
    learns_from: RealImages = "public"
    more_from: str = ""

    def check_classes(self, classes: list[str]) -> None:
        """Refuse settings that don't go with a data set of these classes, whether or not anything is trained or made.

        Raises:
            ValueError: the message says which and the way out.
        """
        return

    @abstractmethod
    def training_settings(self) -> dict[str, Any]:
        """The settings that decide the trained weights."""

    @abstractmethod
    def sampling_settings(self) -> dict[str, Any]:
        """The settings that decide the images, given the weights."""

    def part_of(self, label: int) -> int:
        """Classes of one part have the same sampling settings; parts are kept apart in the cache."""
        return 0

    def settings_of(self, part: int) -> dict[str, Any]:
        """Of ``sampling_settings`` those that decide the images of a part."""
        return self.sampling_settings()

    def content(self) -> dict[str, str]:
        """A hash of the content of each setting that names files: who goes on with a run must find it as it was."""
        return {}

    @abstractmethod
    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        """Train on ``data`` and store into ``folder``; ``progress(step, steps, loss)`` is told how far it is.

        ``folder`` exists and may hold what an interrupted call left there: a long training goes on from it, and takes
        it away at its end.

        Raises:
            ValueError: the data or the settings can't be used; the message says which and the way out.
        """

    def federated(self) -> FederatedTraining | None:
        """How clients train it together, where the settings ask for that; then ``store`` takes the place of ``fit``."""
        return None

    def store(self, module: pl.LightningModule, data: TrainingImages, folder: Path) -> None:
        """Keep a module that clients have trained; ``data`` holds no images, only their shape and the classes."""
        raise TypeError(f"{type(self).__name__} is not trained by clients")

    def available(self, data: TrainingImages) -> np.ndarray | None:
        """How many images of each class there are, int64 [classes]; None: any number. ``data`` as for ``fit``."""
        return None

    @abstractmethod
    def load(self, folder: Path, device: torch.device) -> Sampler:
        """A sampler of the weights stored in ``folder``."""

    def denoiser(self, folder: Path, device: torch.device) -> Denoiser:
        """The diffusion model stored in ``folder``, for samplers that guide it."""
        raise TypeError(f"{type(self).__name__} has no diffusion model to guide")

    def check_guidable(self, recurrence: int) -> None:
        """Refuse to be guided. What can be has a ``denoiser``, and a setting ``steps`` of its sampling.

        Args:
            recurrence: guided steps at each time step.

        Raises:
            ValueError: there is no diffusion model, or its settings don't allow it.
        """
        raise ValueError(
            "it has no diffusion model that classifiers could guide; use diffusion, text_to_image or unconditional"
        )

    def prompt(self, classes: Sequence[str], label: int, index: int) -> str | None:
        """The words that image ``index`` of class ``label`` is made from; None where there are none."""
        return None


def key_seed(*key: int) -> int:
    """A seed of 63 bits for a key of numbers that are at least 0."""
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> 1)


def block_seed(block: Block) -> int:
    """The seed of noise that is drawn for a block as a whole, from (seed, class, number)."""
    return key_seed(block.seed, block.label, block.number)


def image_seeds(block: Block, block_size: int) -> list[int]:
    """The seeds of noise that is drawn image by image, from (seed, class, index): the same for any block size."""
    first = block.number * block_size
    return [key_seed(block.seed, block.label, index) for index in range(first, first + block_size)]


def settings_digest(*parts: Any) -> str:
    """A hash of settings (JSON values), the same in every process."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def check_class(label: int, classes: int) -> None:
    """Refuse a class that a generator of so many classes does not know."""
    if not 0 <= label < classes:
        raise ValueError(f"class {label} is unknown to the generator, which knows 0..{classes - 1}")


def class_words(name: str) -> str:
    """A class's name in a sentence: torchvision's digits are called ``7 - seven``."""
    return re.sub(r"^\d+ - (?=.)", "", name)


def require_positive(**settings: float | None) -> None:
    """Refuse settings that are not positive; None is one that is not set."""
    for name, value in settings.items():
        if value is not None and value <= 0:
            raise ValueError(f"{name} is {value}, but it must be positive")


def to_uint8(images: torch.Tensor) -> np.ndarray:
    """Images in [0, 1] as bytes.

    Raises:
        ValueError: a value is not finite; it would become black.
    """
    if not torch.isfinite(images).all():
        raise ValueError(
            "its images are not finite: its training has diverged (lower lr), or a pipeline's number format overflows "
            "(set precision to bf16 or fp32)"
        )
    return images.mul(255).round().to(torch.uint8).cpu().numpy()
