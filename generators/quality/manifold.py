"""Improved precision and recall: k-nearest-neighbour manifolds (Kynkäänniemi et al., arXiv 1904.06991), by class."""

from __future__ import annotations

import numpy as np

from generators.quality.distances import squared_distances

__all__ = ["NEIGHBOURS", "precision_recall", "precision_recall_by_class"]

NEIGHBOURS = 3  # k of the paper


def precision_recall(real: np.ndarray, synthetic: np.ndarray, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Precision: the share of synthetic features that lie in the real manifold; recall: that of real ones in the
    synthetic manifold. A manifold is the union of balls around its points, each as large as the
    distance to the point's k-th nearest neighbour, itself not counted.

    Raises:
        ValueError: a side has no more than k rows.
    """
    least = min(len(real), len(synthetic))
    if least <= k:
        raise ValueError(f"{least} images, but precision and recall with k = {k} neighbours need at least {k + 1}")
    across = squared_distances(real, synthetic)
    return _inside(across, _radii(real, k)), _inside(across.T, _radii(synthetic, k))


def _radii(features: np.ndarray, k: int) -> np.ndarray:
    own = squared_distances(features, features)
    np.fill_diagonal(own, np.inf)
    return np.partition(own, k - 1, axis=1)[:, k - 1]


def _inside(across: np.ndarray, radii: np.ndarray) -> float:
    return float((across <= radii[:, None]).any(axis=0).mean())


def precision_recall_by_class(
    real: np.ndarray, real_labels: np.ndarray, synthetic: np.ndarray, labels: np.ndarray, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of every class by itself, float [classes] each.

    Raises:
        ValueError: a class has too few images.
    """
    found = []
    for label in range(classes):
        try:
            found.append(precision_recall(real[real_labels == label], synthetic[labels == label]))
        except ValueError as error:
            raise ValueError(f"class {label} has {error}") from error
    precision, recall = np.array(found).T
    return precision, recall
