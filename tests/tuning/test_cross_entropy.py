"""The cross-entropy method against a known optimum, and with constraints."""

import numpy as np
import pytest

from tuning.cross_entropy import CrossEntropy


def test_finds_the_minimum_of_a_quadratic() -> None:
    target = np.array([0.2, 0.7, 0.45])
    search = CrossEntropy(3, seed=1)
    rounds = 0
    while not search.done and rounds < 200:
        search.tell(((search.ask() - target) ** 2).sum(axis=1))
        rounds += 1
    assert search.done
    assert np.abs(search.center - target).max() < 5e-3


def test_feasible_candidates_come_before_better_but_infeasible_ones() -> None:
    search = CrossEntropy(1, population=4, elite=2, seed=0)
    asked = search.ask().copy()
    search.tell(values=np.array([0.0, 1.0, 2.0, 3.0]), violations=np.array([5.0, 0.0, 4.0, 0.0]))
    assert search.center[0] == pytest.approx(asked[[1, 3]].mean())


def test_without_feasible_candidates_it_follows_the_violation() -> None:
    search = CrossEntropy(1, population=50, elite=5, low=0.0, high=1.0, seed=0)
    for _ in range(60):
        asked = search.ask()[:, 0]
        search.tell(np.full(50, np.inf), violations=np.maximum(0, 0.7 - asked))
    assert search.center[0] >= 0.69


def test_same_seed_same_candidates() -> None:
    assert (CrossEntropy(2, seed=3).ask() == CrossEntropy(2, seed=3).ask()).all()


@pytest.mark.parametrize("bad", [{"elite": 1}, {"elite": 101}, {"low": 0.9, "high": 0.1}, {"smoothing": 1.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="must be"):
        CrossEntropy(2, **bad)
