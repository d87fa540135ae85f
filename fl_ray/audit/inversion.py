"""Plain model inversion: images out of a classifier alone, the attacker's baseline to a guided diffusion model.

The losses of DeepInversion (arXiv 1912.08795) without its adaptive part: cross-entropy, the distance of the batch
norms' inputs from their running statistics, and total variation.
"""

from __future__ import annotations

import numpy as np
import torch

from generators.base import to_uint8
from generators.guidance.losses import ClassifierGuide

__all__ = ["invert"]

_LR, _VARIATION = 0.05, 1e-2


def invert(guide: ClassifierGuide, labels: np.ndarray, steps: int, seed: int) -> np.ndarray:
    """Images that the classifier takes for ``labels``, uint8 [N, channels, size, size].

    Args:
        guide: the classifier; its statistics should be those of the ``batch``.
        labels: int64 [N].
        steps: of Adam, on the pixels.
    """
    drawn = torch.Generator().manual_seed(seed)
    shape = len(labels), guide.channels, guide.size, guide.size
    images = torch.rand(shape, generator=drawn).requires_grad_()
    wanted = torch.from_numpy(labels)
    optimiser = torch.optim.Adam([images], lr=_LR)
    for _ in range(steps):
        optimiser.zero_grad()
        smooth = (images.diff(dim=2).abs().mean(dim=(1, 2, 3)) + images.diff(dim=3).abs().mean(dim=(1, 2, 3))).sum()
        (guide.losses(images, wanted)[0].sum() + _VARIATION * images[0].numel() * smooth).backward()
        optimiser.step()
        with torch.no_grad():
            images.clamp_(0, 1)
    return to_uint8(images.detach())
