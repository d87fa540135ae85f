"""Data sets, held in memory as uint8 images. A loader takes ``root`` and ``download`` and returns ``ImageData``."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl_ray.errors import DataMissingError, SettingError

__all__ = [
    "ImageData",
    "cifar10",
    "cifar100",
    "data_root",
    "digits",
    "fashion_mnist",
    "gtsrb",
    "load",
    "mnist",
    "random",
    "read_image",
    "resized",
]


@dataclass
class ImageData:
    """A data set in memory.

    Attributes:
        images, labels: uint8 [N, C, H, W] and int64 [N]; the training part, or everything where there is no test part.
        test_images, test_labels: the same for the set's own test part, or None.
        classes: names by label.
        mean, std: per channel, of images scaled to [0, 1].
        domains, test_domains: int64 domain of each image, or None; ``domain_names`` by number.
        owners: int64 natural client of each training image, or None.
    """

    images: np.ndarray
    labels: np.ndarray
    classes: list[str]
    mean: list[float]
    std: list[float]
    test_images: np.ndarray | None = None
    test_labels: np.ndarray | None = None
    domains: np.ndarray | None = None
    test_domains: np.ndarray | None = None
    domain_names: list[str] | None = None
    owners: np.ndarray | None = None


def data_root(root: str | None) -> Path:
    """Where data sets are looked for: ``root``, else $FL_RAY_DATA, else the cache folder."""
    return Path(root or os.environ.get("FL_RAY_DATA") or Path("~/.cache/fl_ray/data")).expanduser()


def load(name: str, root: str | None, download: bool, settings: dict[str, Any]) -> ImageData:
    """Load a data set by registered name or import path, and check that every class has training images.

    Raises:
        DataMissingError: the files are not there and ``data.download`` is off.
        SettingError: unknown name, bad settings, or a class without images.
    """
    from fl_ray.registry import resolve_name

    data = resolve_name("data", name)(root=data_root(root), download=download, **settings)
    present = np.bincount(data.labels, minlength=len(data.classes))
    empty = [data.classes[label] for label in np.flatnonzero(present == 0)]
    if empty:
        raise SettingError(f"data {name}: no training images of class {', '.join(empty)}; remove or fill the class")
    return data


def digits(root: Path, download: bool) -> ImageData:
    """scikit-learn's digits (1,797 of 8x8), grey values 0..16 spread to 0..255; no test part of its own."""
    from sklearn.datasets import load_digits

    source = load_digits()
    images = np.round(source.images * (255 / 16)).astype(np.uint8)[:, None]
    return ImageData(images, source.target.astype(np.int64), [str(i) for i in range(10)], [0.305], [0.376])


def random(
    root: Path,
    download: bool,
    samples: int = 1000,
    test_samples: int = 100,
    channels: int = 1,
    size: int = 8,
    num_classes: int = 10,
) -> ImageData:
    """Random images with random labels: nothing to learn, for timing at any size."""
    rng = np.random.default_rng(0)
    counts = (samples, test_samples)
    images, tests = (rng.integers(0, 256, (count, channels, size, size), dtype=np.uint8) for count in counts)
    labels, test_labels = (rng.permutation(np.arange(count) % num_classes) for count in counts)
    names = [str(label) for label in range(num_classes)]
    return ImageData(images, labels, names, [0.5] * channels, [0.29] * channels, tests, test_labels)


def mnist(root: Path, download: bool, binarise: bool = False) -> ImageData:
    """MNIST from ``root/MNIST/raw``; ``binarise``: pixels rounded to black or white and handed to models as 0 or 1."""
    data = _torchvision("MNIST", root, download, [0.1307], [0.3081])
    return _binarised(data) if binarise else data


def fashion_mnist(root: Path, download: bool, binarise: bool = False) -> ImageData:
    """Fashion-MNIST from ``root/FashionMNIST/raw``; ``binarise`` as for MNIST."""
    data = _torchvision("FashionMNIST", root, download, [0.2860], [0.3530])
    return _binarised(data) if binarise else data


def cifar10(root: Path, download: bool) -> ImageData:
    """CIFAR-10 from ``root/cifar-10-batches-py``."""
    return _torchvision("CIFAR10", root, download, [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616])


def cifar100(root: Path, download: bool) -> ImageData:
    """CIFAR-100 (fine labels) from ``root/cifar-100-python``."""
    return _torchvision("CIFAR100", root, download, [0.5071, 0.4866, 0.4409], [0.2673, 0.2564, 0.2762])


def gtsrb(root: Path, download: bool, image_size: int = 32) -> ImageData:
    """German traffic signs from ``root/gtsrb``, resized to ``image_size`` pixels square."""
    from torchvision.datasets import GTSRB

    parts = {}
    for split in ("train", "test"):
        found = _found("gtsrb", root, download, lambda split=split: GTSRB(str(root), split, download=download))
        pairs = [(read_image(image, image_size), label) for image, label in found]
        parts[split] = _stack(pairs, channels=3)
    (images, labels), (test_images, test_labels) = parts["train"], parts["test"]
    names = [str(label) for label in range(43)]
    mean, std = [0.3403, 0.3121, 0.3214], [0.2724, 0.2608, 0.2669]
    return ImageData(images, labels, names, mean, std, test_images, test_labels)


def _binarised(data: ImageData) -> ImageData:
    def rounded(images: np.ndarray) -> np.ndarray:
        return np.where(images > 127, np.uint8(255), np.uint8(0))

    found = replace(data, images=rounded(data.images), mean=[0.0], std=[1.0])
    if data.test_images is not None:
        found.test_images = rounded(data.test_images)
    return found


def _torchvision(kind: str, root: Path, download: bool, mean: list[float], std: list[float]) -> ImageData:
    from torchvision import datasets

    def read(train: bool) -> Any:
        return getattr(datasets, kind)(str(root), train=train, download=download)

    train = _found(kind, root, download, lambda: read(True))
    test = _found(kind, root, download, lambda: read(False))
    parts = []
    for part in (train, test):
        images = np.asarray(part.data)
        images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
        parts += [np.ascontiguousarray(images), np.asarray(part.targets, dtype=np.int64)]
    return ImageData(parts[0], parts[1], [str(c) for c in train.classes], mean, std, parts[2], parts[3])


def _found(kind: str, root: Path, download: bool, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (RuntimeError, OSError) as error:
        if download:
            why = " ".join(str(error).split())
            raise DataMissingError(
                f"data {kind}: the download to {root} failed ({why}). Fetch it on a machine with access, and give its "
                "folder as --data.root DIR or $FL_RAY_DATA"
            ) from error
        if isinstance(error, OSError):
            raise
        raise DataMissingError(  # torchvision's RuntimeError is for missing or damaged files
            f"data {kind}: not found or not complete in {root}. Give the folder as --data.root DIR or "
            "$FL_RAY_DATA, or let torchvision fetch it with --data.download true"
        ) from error


def read_image(source: Any, size: int) -> np.ndarray:
    """An image file (or an image of PIL's) as RGB of ``size`` pixels square, uint8 [3, size, size]."""
    from PIL import Image

    image = source if isinstance(source, Image.Image) else Image.open(source)
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR)).transpose(2, 0, 1)


def resized(images: np.ndarray, size: int) -> np.ndarray:
    """Images uint8 [N, C, H, W], grey or RGB, as RGB of ``size`` pixels square."""
    from PIL import Image

    if images.shape[1:] == (3, size, size):
        return images
    shown = images[:, 0] if images.shape[1] == 1 else images.transpose(0, 2, 3, 1)
    return np.stack([read_image(Image.fromarray(image), size) for image in shown])


def _stack(pairs: list[tuple[np.ndarray, int]], channels: int) -> tuple[np.ndarray, np.ndarray]:
    images = np.empty((len(pairs), channels, *pairs[0][0].shape[1:]), dtype=np.uint8)
    for row, (image, _) in enumerate(pairs):
        images[row] = image
    return images, np.array([label for _, label in pairs], dtype=np.int64)
