"""Precision and recall against a brute-force count, and at their extremes."""

import numpy as np
import pytest

from generators.quality.manifold import precision_recall, precision_recall_by_class


def brute(manifold: np.ndarray, points: np.ndarray, k: int) -> float:
    inside = 0
    for point in points:
        for number, centre in enumerate(manifold):
            others = sorted(np.linalg.norm(centre - other) for i, other in enumerate(manifold) if i != number)
            if np.linalg.norm(point - centre) <= others[k - 1]:
                inside += 1
                break
    return inside / len(points)


def test_against_a_brute_force_count() -> None:
    rng = np.random.default_rng(0)
    real, synthetic = rng.normal(size=(12, 2)), rng.normal(0.8, 0.5, (9, 2))
    for k in (1, 3):
        found = precision_recall(real, synthetic, k)
        assert found == (pytest.approx(brute(real, synthetic, k)), pytest.approx(brute(synthetic, real, k)))
        assert 0 < found[1] < found[0] <= 1  # narrower: precise, and not all is covered


def test_extremes() -> None:
    features = np.random.default_rng(1).normal(size=(20, 4))
    assert precision_recall(features, features) == (1.0, 1.0)
    assert precision_recall(features, features + 100) == (0.0, 0.0)
    one_mode = np.repeat(features[:1], 10, axis=0)  # every image the same: in the manifold, and covering one point
    assert precision_recall(features, one_mode) == (1.0, 1 / 20)


def test_classes_are_measured_by_themselves() -> None:
    rng = np.random.default_rng(2)
    features, labels = rng.normal(size=(40, 3)), np.arange(40) % 2
    moved = features + 50 * (labels == 1)[:, None]
    precision, recall = precision_recall_by_class(features, labels, moved, labels, 2)
    assert precision.tolist() == recall.tolist() == [1.0, 0.0]
    few = np.array([0] * 37 + [1] * 3)
    with pytest.raises(ValueError, match=r"class 1 has 3 images.*k = 3 neighbours need at least 4"):
        precision_recall_by_class(features, labels, features, few, 2)
    with pytest.raises(ValueError, match="class 2 has 0 images"):
        precision_recall_by_class(features, labels, features, labels, 3)
