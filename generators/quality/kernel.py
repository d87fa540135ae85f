"""KID: the squared maximum mean discrepancy of features under a cubic kernel (Bińkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

import numpy as np

__all__ = ["kid", "mmd2"]


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a @ b.T / a.shape[1] + 1) ** 3


def mmd2(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate of MMD^2 with k(x, y) = (x.y / D + 1)^3; it may be negative.

    Args:
        first, second: features [N, D] and [M, D] with N, M > 1.
    """

    def within(side: np.ndarray) -> float:
        own = _kernel(side, side)
        return (own.sum() - np.trace(own)) / (len(side) * (len(side) - 1))

    return float(within(first) + within(second) - 2 * _kernel(first, second).mean())


def kid(real: np.ndarray, synthetic: np.ndarray, rng: np.random.Generator, groups: int = 10) -> tuple[float, float]:
    """MMD^2 of all rows, and its standard error by the jackknife over random groups.

    The paper averages over random subsets of 1,000 rows. Where there are hundreds, all pairs of rows tell more than
    those within small subsets: the estimate is unbiased either way. Memory is that of a pair of groups.

    Args:
        real, synthetic: features [N, D] and [M, D].
        groups: left out one at a time, of both sides at once.

    Raises:
        ValueError: a group would have fewer than two rows, or the widths differ.
    """
    if real.shape[1] != synthetic.shape[1]:
        raise ValueError(f"KID of features of {real.shape[1]} and {synthetic.shape[1]} numbers: use one extractor")
    least = min(len(real), len(synthetic))
    if least < 2 * groups:
        raise ValueError(f"KID needs at least {2 * groups} images on each side, but has {least}")
    parts = [np.array_split(side[rng.permutation(len(side))], groups) for side in (real, synthetic)]
    sizes = np.array([[len(group) for group in side] for side in parts])

    def sums(one: list[np.ndarray], other: list[np.ndarray], own: bool) -> np.ndarray:
        """Of the kernel over pairs of rows of each pair of groups, a row with itself left out."""
        found = np.array([[_kernel(a, b).sum() for b in other] for a in one])
        if own:
            found[np.diag_indices(groups)] -= [np.trace(_kernel(a, a)) for a in one]
        return found

    first, second = parts
    pairs = sums(first, first, True), sums(second, second, True), sums(first, second, False)

    def estimate(kept: np.ndarray) -> float:
        (n, m), grid = sizes[:, kept].sum(axis=1), np.ix_(kept, kept)
        in_first, in_second, across = (found[grid].sum() for found in pairs)
        return float(in_first / (n * (n - 1)) + in_second / (m * (m - 1)) - 2 * across / (n * m))

    every = np.arange(groups)
    without = np.array([estimate(np.delete(every, group)) for group in every])
    error = np.sqrt((groups - 1) / groups * ((without - without.mean()) ** 2).sum())
    return estimate(every), float(error)
