"""CAS, the classification accuracy score (Ravuri and Vinyals, arXiv 1905.10887)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

__all__ = ["classification_accuracy"]

Predict = Callable[[np.ndarray], np.ndarray]


def classification_accuracy(
    fit: Callable[[np.ndarray, np.ndarray], Predict],
    synthetic: np.ndarray,
    labels: np.ndarray,
    real: np.ndarray,
    real_labels: np.ndarray,
    classes: int,
) -> tuple[float, np.ndarray]:
    """Accuracy on real images of a classifier that has seen synthetic ones alone: over all, and by class [classes].

    The paper's classifier is a ResNet-50; here it is what ``fit`` trains.

    Args:
        fit: trains on images and labels; what it returns names the likeliest class of images.
        synthetic, real: uint8 [N, C, H, W]; ``labels``, ``real_labels``: int64 [N].

    Raises:
        ValueError: a class has no images on one side.
    """
    for side, own in (("synthetic", labels), ("real", real_labels)):
        missing = sorted(set(range(classes)) - set(np.unique(own).tolist()))
        if missing:
            raise ValueError(f"CAS: class {missing[0]} has no {side} images")
    right = fit(synthetic, labels)(real) == real_labels
    return float(right.mean()), np.array([right[real_labels == label].mean() for label in range(classes)])
