"""Class amounts by water-filling: synthetic images go to the scarcest classes first."""

from __future__ import annotations

import numpy as np

__all__ = ["water_fill"]


def water_fill(counts: np.ndarray, amount: int) -> np.ndarray:
    """Integers g >= 0 that sum to ``amount`` and make ``counts + g`` as even as possible.

    Solves max entropy of (counts + g) / total: g_c = max(0, nu - counts_c) (FIMI's category problem, our
    reconstruction), rounded so that the sum is kept. What is left over by rounding goes to the lowest class numbers.

    Args:
        counts: int64 [classes], >= 0.
        amount: how many to hand out, >= 0.
    """
    counts = np.asarray(counts, dtype=np.int64)
    if amount < 0 or (counts < 0).any():
        raise ValueError(f"amount {amount} and counts {counts.tolist()} must not be negative")
    order = np.sort(counts)
    # With the k smallest classes filled to the level nu_k = (amount + their sum) / k, k is right when nu_k lies between
    # the k-th and the next count.
    levels = (amount + np.cumsum(order)) / np.arange(1, len(order) + 1)
    reached = int(np.flatnonzero(levels >= order).max())
    level = (amount + int(order[: reached + 1].sum())) // (reached + 1)
    given = np.maximum(0, level - counts)
    at_level = np.flatnonzero(counts <= level)
    given[at_level[: amount - int(given.sum())]] += 1
    return given
