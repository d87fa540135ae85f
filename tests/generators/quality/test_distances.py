"""Distances against plain loops, in one piece and in many."""

import numpy as np
import pytest

from generators.quality import distances
from generators.quality.distances import nearest, squared_distances


def test_against_plain_loops() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(7, 5)), rng.normal(size=(4, 5))
    expected = [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in second] for x in first]
    assert np.allclose(squared_distances(first, second), expected)


def test_the_nearest_is_exact_in_any_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    images, among = (rng.integers(0, 256, (count, 3, 4, 4), dtype=np.uint8) for count in (11, 23))
    expected = [min(int(((a.astype(int) - b) ** 2).sum()) for b in among) for a in images]
    assert nearest(images, among).tolist() == expected
    monkeypatch.setattr(distances, "_ELEMENTS", 48 * 4)  # four rows at once
    assert nearest(images, among).tolist() == expected
    assert nearest(images, images).tolist() == [0] * 11
