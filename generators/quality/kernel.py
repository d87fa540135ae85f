"""KID: the squared maximum mean discrepancy of features under a cubic kernel (Bińkowski et al., arXiv 1801.01401)."""

from __future__ import annotations

import numpy as np

__all__ = ["kid", "mmd2"]


def mmd2(first: np.ndarray, second: np.ndarray) -> float:
    """The unbiased estimate of MMD^2 with k(x, y) = (x.y / D + 1)^3; it may be negative.

    Args:
        first, second: features [N, D] and [M, D] with N, M > 1.
    """

    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(first), len(second)
    own_1, own_2 = kernel(first, first), kernel(second, second)
    within = (own_1.sum() - np.trace(own_1)) / (n * (n - 1)) + (own_2.sum() - np.trace(own_2)) / (m * (m - 1))
    return float(within - 2 * kernel(first, second).mean())


def kid(real: np.ndarray, synthetic: np.ndarray, rng: np.random.Generator, subsets: int = 10) -> tuple[float, float]:
    """The mean of MMD^2 over disjoint random subsets of both sides, and its standard error.

    Disjoint, so that the values are independent and the standard error is one.

    Args:
        real, synthetic: features [N, D] and [M, D].
        subsets: how many; each has N // subsets and M // subsets rows.

    Raises:
        ValueError: a subset would have fewer than two rows, or the widths differ.
    """
    if real.shape[1] != synthetic.shape[1]:
        raise ValueError(f"KID of features of {real.shape[1]} and {synthetic.shape[1]} numbers: use one extractor")
    least = min(len(real), len(synthetic))
    if least < 2 * subsets:
        raise ValueError(f"KID needs at least {2 * subsets} images on each side, but has {least}")
    parts = []
    for features in (real, synthetic):
        size = len(features) // subsets
        parts.append(features[rng.permutation(len(features))[: size * subsets]].reshape(subsets, size, -1))
    values = np.array([mmd2(first, second) for first, second in zip(*parts, strict=True)])
    return float(values.mean()), float(values.std(ddof=1) / np.sqrt(subsets))
