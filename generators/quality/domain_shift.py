"""Domain shift as a classifier sees it: how well it tells synthetic images from real ones.

The measure that GenFL (arXiv 2503.20166) asks about; as a two-sample test: Lopez-Paz and Oquab, arXiv 1610.06545.
"""

from __future__ import annotations

import numpy as np

from generators.quality.classifier import SmallClassifier

__all__ = ["domain_shift"]

_STEPS = 200


def domain_shift(real: np.ndarray, synthetic: np.ndarray, seed: int, folds: int = 3) -> tuple[float, float]:
    """Accuracy of the small classifier on images that it was not trained on (cross-validation), and the standard error.

    0.5: it can't tell them apart; 1: it always can. Both sides are cut to the same count, at random.

    Args:
        real, synthetic: uint8 [N, C, H, W].
        seed: of the cut, the folds and the training.

    Raises:
        ValueError: a side has fewer images than folds.
    """
    count = min(len(real), len(synthetic))
    if count < folds:
        raise ValueError(f"domain shift over {folds} folds needs as many images on each side, but has {count}")
    rng = np.random.default_rng(seed)
    images = np.concatenate([side[rng.permutation(len(side))[:count]] for side in (real, synthetic)])
    is_synthetic = np.repeat([0, 1], count)
    fold = np.concatenate([rng.permutation(count) % folds for _ in range(2)])
    right = np.zeros(2 * count, dtype=bool)
    for number in range(folds):
        held = fold == number
        classifier = SmallClassifier(images[~held], is_synthetic[~held], 2, seed, _STEPS)
        right[held] = classifier.predict(images[held]) == is_synthetic[held]
    accuracy = right.mean()
    return float(accuracy), float(np.sqrt(accuracy * (1 - accuracy) / len(right)))
