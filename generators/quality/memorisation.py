"""Memorisation: are synthetic images nearer to what a generator was trained on than to images that it never saw?

After the three-sample test of Meehan et al., arXiv 2004.05675, with plain shares instead of its statistic.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from generators.quality.distances import nearest

__all__ = ["Memorisation", "equal_counts", "memorisation"]


@dataclass(frozen=True)
class Memorisation:
    """Distances of synthetic images to their nearest neighbours in two real sets of ``compared`` images each.

    Distances are root mean square differences of pixels in [0, 1]; median and 5 % quantile.

    Attributes:
        closer: share of synthetic images that are nearer to a training image than to any held-out one, ties as half:
            0.5 where nothing is memorised, 1 where everything is.
    """

    compared: int
    train_median: float
    train_p05: float
    held_out_median: float
    held_out_p05: float
    closer: float


def equal_counts(first: np.ndarray, second: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Random rows of two sets of labels, so that both have the same number of each: a larger set lies nearer to
    anything by its size alone.
    """
    rows: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
    for label in np.union1d(first, second):
        own = [np.flatnonzero(labels == label) for labels in (first, second)]
        count = min(map(len, own))
        for kept, found in zip(rows, own, strict=True):
            kept.append(rng.permutation(found)[:count])
    return np.sort(np.concatenate(rows[0])), np.sort(np.concatenate(rows[1]))


def memorisation(synthetic: np.ndarray, train: np.ndarray, held_out: np.ndarray) -> Memorisation:
    """Compare the nearest neighbours of uint8 [N, C, H, W] in two sets of images.

    Raises:
        ValueError: the sets are empty, or not equally large.
    """
    if len(train) != len(held_out) or len(train) == 0:
        raise ValueError(f"memorisation: {len(train)} training and {len(held_out)} held-out images; use equal counts")
    to_train, to_held_out = nearest(synthetic, train), nearest(synthetic, held_out)
    closer = (to_train < to_held_out).mean() + 0.5 * (to_train == to_held_out).mean()
    pixels = synthetic[0].size
    summary = [
        float(np.quantile(np.sqrt(squares / pixels) / 255, quantile))
        for squares in (to_train, to_held_out)
        for quantile in (0.5, 0.05)
    ]
    return Memorisation(len(train), *summary, float(closer))
