"""Networks that measure must give the same number whenever they are asked, on a GPU, too."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch

__all__ = ["repeatable_convolutions"]


def repeatable_convolutions() -> AbstractContextManager[None]:
    """In the block cuDNN adds up in a fixed order, and in float32, of which it otherwise keeps ten bits (TF32)."""
    return torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
