"""FID, the Fréchet distance of feature distributions taken as Gaussians (Heusel et al., arXiv 1706.08500)."""

from __future__ import annotations

import numpy as np

__all__ = ["fid", "frechet_distance"]


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """|m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)) of two Gaussians (eq. 6 there).

    Args:
        mean_1, mean_2: [D].
        cov_1, cov_2: [D, D], symmetric, without negative eigenvalues.
    """
    # C1 C2 and S C2 S with S = C1^(1/2) have the same eigenvalues; the second is symmetric, so that none gets complex.
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ cov_2 @ root)
    cross = np.sqrt(np.maximum(product, 0)).sum()
    distance = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross
    return float(max(distance, 0.0))


def fid(real: np.ndarray, synthetic: np.ndarray) -> float:
    """FID of features [N, D] and [M, D]. It falls with N and M: compare equal counts only.

    Raises:
        ValueError: fewer than two rows, or another width.
    """
    for features in (real, synthetic):
        if len(features) < 2:
            raise ValueError(f"FID needs at least 2 images on each side, but has {len(features)}")
    if real.shape[1] != synthetic.shape[1]:
        raise ValueError(f"FID of features of {real.shape[1]} and {synthetic.shape[1]} numbers: use one extractor")
    moments = [(features.mean(axis=0), np.cov(features, rowvar=False)) for features in (real, synthetic)]
    return frechet_distance(*moments[0], *moments[1])
