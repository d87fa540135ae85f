"""Digits in three domains: feature skew at a size for two CPU cores."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fl_ray.data.datasets import ImageData, mnist, resized
from fl_ray.data.folders import image_folder
from fl_ray.data.shift import Shift, shifted
from fl_ray.errors import DataMissingError, SettingError, require

__all__ = ["digit_domains"]

_DIGITS = [str(digit) for digit in range(10)]
_KNOWN = ("mnist", "mnist_m", "usps")


def digit_domains(
    root: Path,
    download: bool,
    image_size: int = 32,
    domains: list[str] | None = None,
    per_domain: int = 5000,
    test_per_domain: int = 2000,
    shift_domain: str | None = None,
    shift: Shift = "rotate",
    shift_level: float = 0.0,
) -> ImageData:
    """MNIST from ``root/MNIST/raw``, MNIST-M and USPS from ``root/digit_domains/<domain>/<split>/<digit>/*``; RGB.

    Args:
        root, download: of MNIST; the folders are not downloaded.
        image_size: pixels.
        domains: which, in this order; default: all three.
        per_domain, test_per_domain: at most so many training and test images of each, chosen at random once and for
            all, so that no domain outweighs the others.
        shift_domain, shift, shift_level: which domain's images are changed, how, and how far, see
            ``fl_ray.data.shift``.
    """
    names = list(_KNOWN if domains is None else domains)
    unknown = sorted(set(names) - set(_KNOWN))
    if unknown or not names:
        raise SettingError(f"data.domains is {names}, but it must list some of {', '.join(_KNOWN)}")
    if len(set(names)) < len(names):
        raise SettingError(f"data.domains is {names}, but each may stand there once")
    for setting, count in {"per_domain": per_domain, "test_per_domain": test_per_domain}.items():
        require(count >= 1, f"data.{setting}", count, "at least 1")
    if shift_level and shift_domain is None:
        raise SettingError(f"data.shift_level is {shift_level}, but data.shift_domain names no domain; give it")
    if shift_domain not in (None, *names):
        raise SettingError(f"data.shift_domain is {shift_domain}, but the domains are {', '.join(names)}")
    parts: dict[str, list[np.ndarray]] = {name: [] for name in ("images", "labels", "domains")}
    tests: dict[str, list[np.ndarray]] = {name: [] for name in ("images", "labels", "domains")}
    for number, name in enumerate(names):
        if name == "mnist":
            found = mnist(root, download)
        else:
            found = image_folder(root, download, "digit_domains", image_size, domains=[name])
            if found.classes != _DIGITS or found.test_images is None:
                raise DataMissingError(
                    f"data digit_domains: {root / 'digit_domains' / name} must hold train/0 to train/9 and test/0 to "
                    f"test/9, but it has the classes {', '.join(found.classes)}"
                    + ("" if found.test_images is not None else " and no test part")
                )
        pairs = (
            (parts, found.images, found.labels, per_domain),
            (tests, found.test_images, found.test_labels, test_per_domain),
        )
        for kept, images, labels, most in pairs:
            chosen = np.sort(np.random.default_rng(0).permutation(len(labels))[:most])
            made = resized(images[chosen], image_size)
            kept["images"].append(shifted(made, shift, shift_level) if name == shift_domain else made)
            kept["labels"].append(labels[chosen])
            kept["domains"].append(np.full(len(chosen), number, dtype=np.int64))
    train, test = ({name: np.concatenate(found) for name, found in part.items()} for part in (parts, tests))
    return ImageData(
        train["images"],
        train["labels"],
        _DIGITS,
        [0.5] * 3,
        [0.5] * 3,
        test["images"],
        test["labels"],
        train["domains"],
        test["domains"],
        names,
    )
