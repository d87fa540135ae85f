"""Nearest neighbours: copies are found, sizes are balanced, a brute-force count agrees."""

import numpy as np
import pytest

from generators.quality.memorisation import equal_counts, memorisation


def images(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 1, 4, 4), dtype=np.uint8)


def test_copies_of_either_side_and_ties() -> None:
    train, held_out = images(30, 0), images(30, 1)
    copied = memorisation(train[:10], train, held_out)
    assert (copied.closer, copied.train_median, copied.train_p05) == (1.0, 0.0, 0.0)
    assert copied.held_out_p05 > 0
    assert memorisation(held_out, train, held_out).closer == 0.0
    assert memorisation(images(5, 2), train, train).closer == 0.5


def test_against_a_brute_force_count() -> None:
    synthetic, train, held_out = images(40, 3), images(15, 4), images(15, 5)
    to_train, to_held_out = (
        np.array([min(np.sqrt(np.mean((a / 255 - b / 255) ** 2)) for b in side) for a in synthetic])
        for side in (train, held_out)
    )
    found = memorisation(synthetic, train, held_out)
    assert found.closer == (to_train < to_held_out).mean()
    assert found.train_median == pytest.approx(np.median(to_train))
    assert found.held_out_p05 == pytest.approx(np.quantile(to_held_out, 0.05))
    assert found.compared == 15


def test_a_larger_set_must_not_win_by_its_size() -> None:
    synthetic, train, held_out = images(400, 6), images(900, 7), images(90, 8)
    labels, held_labels = np.arange(900) % 3, np.arange(90) % 3
    rows, held_rows = equal_counts(labels, held_labels, np.random.default_rng(0))
    assert np.bincount(labels[rows]).tolist() == np.bincount(held_labels[held_rows]).tolist() == [30, 30, 30]
    assert abs(memorisation(synthetic, train[rows], held_out[held_rows]).closer - 0.5) < 0.15
    with pytest.raises(ValueError, match="900 training and 90 held-out"):
        memorisation(synthetic, train, held_out)
    from generators.quality.distances import nearest

    assert (nearest(synthetic, train) < nearest(synthetic, held_out)).mean() > 0.7  # what is kept from happening


def test_counts_are_cut_class_by_class() -> None:
    first, second = np.array([0, 0, 0, 1]), np.array([0, 1, 1, 2])
    rows, others = equal_counts(first, second, np.random.default_rng(0))
    assert first[rows].tolist() == second[others].tolist() == [0, 1]
