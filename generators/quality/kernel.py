"""KID: the squared maximum mean discrepancy of features under a cubic kernel (Bińkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

import numpy as np

__all__ = ["kid"]


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def kid(
    real: tuple[np.ndarray, np.ndarray],
    synthetic: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    groups: int = 10,
) -> tuple[float, float]:
    """The unbiased estimate of MMD^2 with k(x, y) = (x.y / D + 1)^3 (it may be negative), and its standard error.

    Both sides have a share of images for each class, not one drawn at random, so the mean of the kernel is taken over
    pairs of classes, all with the same weight; a pair of an image with itself is left out. (Without that, images of
    the same class are too seldom paired, and the estimate is too low.) The paper averages over random subsets of 1,000
    rows; where there are hundreds, all pairs tell more. The standard error is the jackknife's, over random groups that
    have as much of each class as can be.

    Args:
        real, synthetic: features [N, D] and labels int64 [N].
        groups: left out one at a time, of both sides at once.

    Raises:
        ValueError: a class has fewer than three rows on a side, or none, or the widths differ.
    """
    if real[0].shape[1] != synthetic[0].shape[1]:
        widths = f"{real[0].shape[1]} and {synthetic[0].shape[1]}"
        raise ValueError(f"KID of features of {widths} numbers: use one extractor")
    classes = np.union1d(real[1], synthetic[1])
    sides = [_Side(*side, classes, groups, rng) for side in (real, synthetic)]
    first, second = sides
    sums = [_cell_sums(first, first), _cell_sums(second, second), _cell_sums(first, second)]

    def estimate(kept: np.ndarray) -> float:
        counts = [side.counts[:, kept].sum(axis=1) for side in sides]
        within = []
        for found, side, count in zip(sums, sides, counts, strict=False):
            pairs = np.multiply.outer(count, count).astype(np.float64)
            total = found[:, kept][:, :, :, kept].sum(axis=(1, 3))
            total[np.diag_indices(len(classes))] -= side.own[:, kept].sum(axis=1)
            pairs[np.diag_indices(len(classes))] -= count
            within.append((total / pairs).mean())
        across = sums[2][:, kept][:, :, :, kept].sum(axis=(1, 3)) / np.multiply.outer(*counts)
        return float(sum(within) - 2 * across.mean())

    every = np.arange(groups)
    without = np.array([estimate(np.delete(every, group)) for group in every])
    error = np.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum())
    return estimate(every), float(error)


class _Side:
    """Features by class and, within a class, by group.

    Attributes:
        features: [N, D], sorted so.
        counts: int64 [classes, groups].
        own: sum of k(x, x) in each, [classes, groups].
    """

    def __init__(
        self, features: np.ndarray, labels: np.ndarray, classes: np.ndarray, groups: int, rng: np.random.Generator
    ) -> None:
        rows, self.counts = [], np.zeros((len(classes), groups), dtype=np.int64)
        for place, label in enumerate(classes):
            own = rng.permutation(np.flatnonzero(labels == label))
            if len(own) < 3:
                raise ValueError(
                    f"KID needs at least 3 images of each class on each side, but class {label} has {len(own)}"
                )
            # From another group on for each class, so that groups are of one size.
            group = np.sort((np.arange(len(own)) + place) % groups)
            self.counts[place] = np.bincount(group, minlength=groups)
            rows.append(own)
        self.features = features[np.concatenate(rows)]
        cells = np.repeat(np.arange(self.counts.size), self.counts.ravel())
        own = (np.einsum("nd,nd->n", self.features, self.features) / features.shape[1] + 1) ** 3
        self.own = np.bincount(cells, own, self.counts.size).reshape(self.counts.shape)


def _cell_sums(first: _Side, second: _Side) -> np.ndarray:
    """Sums of the kernel over all pairs of rows, [classes, groups, classes, groups]. Memory is that of a class."""
    found = np.zeros((first.counts.size, second.counts.size))
    columns = np.flatnonzero(second.counts.ravel())
    starts = (np.cumsum(second.counts.ravel()) - second.counts.ravel())[columns]
    row = 0
    for cell, count in enumerate(first.counts.ravel()):
        if count:
            kernel = _kernel(first.features[row : row + count], second.features)
            found[cell, columns] = np.add.reduceat(kernel.sum(axis=0), starts)
            row += count
    return found.reshape(*first.counts.shape, *second.counts.shape)
