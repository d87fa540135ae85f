"""Roots of many monotone functions at once, against scipy's brentq."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.optimize import brentq

from fl_ray.allocation.roots import find_roots


def test_many_roots_at_once_are_those_of_brentq() -> None:
    target = np.random.default_rng(0).uniform(0.01, 50, (7, 5))
    found = find_roots(lambda x: np.exp(x) * x**3 - target, np.zeros(target.shape), np.full(target.shape, 5.0))
    one_by_one = [
        brentq(lambda x, wanted=wanted: np.exp(x) * x**3 - wanted, 0, 5, xtol=1e-15) for wanted in target.flat
    ]
    assert found.ravel() == pytest.approx(one_by_one, rel=1e-13)


def test_rising_and_falling_functions_and_steps() -> None:
    sign = np.array([1.0, -1.0])
    assert find_roots(lambda x: sign * (x - 0.3), np.zeros(2), np.ones(2)) == pytest.approx([0.3, 0.3], rel=1e-15)
    jump = find_roots(lambda x: np.where(x < 0.7, -1.0, 2.0), np.zeros(1), np.ones(1))
    assert jump == pytest.approx([0.7], rel=1e-12)


def test_without_a_change_of_sign_the_end_nearer_to_zero_is_the_answer() -> None:
    found = find_roots(lambda x: np.array([1.0, -1.0]) * (x + 1), np.zeros(2), np.full(2, 4.0))
    assert found.tolist() == [0, 0]
    assert find_roots(lambda x: x - 9, np.zeros(1), np.full(1, 4.0)).tolist() == [4]


def test_a_root_at_an_end_is_found_exactly() -> None:
    assert find_roots(lambda x: x - np.array([0.0, 1.0]), np.zeros(2), np.ones(2)).tolist() == [0, 1]


def test_no_more_calls_than_allowed() -> None:
    calls = 0

    def function(x: np.ndarray) -> np.ndarray:
        nonlocal calls
        calls += 1
        return x**3 - 0.2

    find_roots(function, np.zeros(1), np.ones(1), steps=4)
    assert calls == 2 + 4
