"""A domain made step by step less like itself: rotated, blurred, noised or inverted."""

from __future__ import annotations

from typing import Literal

import numpy as np

from fl_ray.errors import SettingError

__all__ = ["Shift", "shifted"]

Shift = Literal["rotate", "blur", "noise", "invert"]
_BLOCK = 1000  # images at a time


def shifted(images: np.ndarray, kind: Shift, level: float) -> np.ndarray:
    """Images uint8 [N, C, H, W] as they are at a level of the shift; 0 is as they were.

    Args:
        kind: ``rotate`` by ``level`` degrees; ``blur`` with a Gaussian of ``level`` pixels; ``noise`` of standard
            deviation ``level`` on images in [0, 1], the same at every call; ``invert``: ``level`` of the way to the
            negative, at half of which nothing but grey is left.

    Raises:
        SettingError: the level does not go with the kind.
    """
    import torch
    from torchvision.transforms.v2 import functional

    most = {"rotate": 360.0, "invert": 1.0, "blur": (min(images.shape[2:]) - 1) / 4}.get(kind, np.inf)
    least = -360.0 if kind == "rotate" else 0.0
    if not least <= level <= most:
        raise SettingError(f"data.shift_level is {level}, but for {kind} it must be in [{least:g}, {most:g}]")
    if level == 0:
        return images
    rng, made = np.random.default_rng(0), np.empty_like(images)
    for start in range(0, len(images), _BLOCK):
        x = torch.from_numpy(images[start : start + _BLOCK]).float()
        if kind == "rotate":
            x = functional.rotate(x, level, functional.InterpolationMode.BILINEAR)
        elif kind == "blur":
            x = functional.gaussian_blur(x, [2 * int(np.ceil(2 * level)) + 1] * 2, [level] * 2)
        elif kind == "noise":
            x = x + torch.from_numpy(rng.normal(0, 255 * level, x.shape)).float()
        else:
            x = (1 - level) * x + level * (255 - x)
        made[start : start + _BLOCK] = x.round().clamp(0, 255).to(torch.uint8).numpy()
    return made
