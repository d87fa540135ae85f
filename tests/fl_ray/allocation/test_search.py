"""Every outer search: feasible plans, never below the bound, within its limit of candidates, the same by seed."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from fl_ray.allocation import inner
from fl_ray.allocation.cell import random_cell
from fl_ray.allocation.dual import solve_dual
from fl_ray.allocation.search import search
from fl_ray.allocation.settings import AllocationConfig, Search

SEARCHES = [name for name in get_args(Search) if name != "dual"]
CELL = random_cell(5, 2)
LIMIT = 37  # no multiple of any population


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_keeps_its_limit_and_finds_a_plan(name: str) -> None:
    settings = AllocationConfig(evaluations=LIMIT if name != "gp" else 13, population=10, elite=3)
    found = search(CELL, name, settings, 1)
    if name == "gradient":  # which arrives before
        assert len(found.history_j) <= LIMIT
    else:
        assert len(found.history_j) == settings.evaluations
    assert found.best_rho is not None
    at = inner.evaluate(CELL, found.best_rho)
    assert float(at.violation) == 0
    assert float(at.energy_j) == pytest.approx(found.best_j, rel=1e-12)
    assert found.best_j >= solve_dual(CELL).lower_bound_j * (1 - 1e-9)
    assert found.history_j == sorted(found.history_j, reverse=True)
    assert found.history_j[-1] == found.best_j
    again = search(CELL, name, settings, 1)
    assert again.history_j == found.history_j
    assert (again.best_rho == found.best_rho).all()


@pytest.mark.parametrize("name", sorted({*SEARCHES} - {"gp", "gradient", "nelder_mead"}))  # the last two draw nothing
def test_other_seeds_draw_others(name: str) -> None:
    settings = AllocationConfig(evaluations=30, population=10, elite=3)
    runs = [search(CELL, name, settings, seed) for seed in (0, 1)]
    assert runs[0].history_j != runs[1].history_j


@pytest.mark.parametrize("name", SEARCHES)
def test_one_candidate_is_enough_to_start(name: str) -> None:
    found = search(CELL, name, AllocationConfig(evaluations=1))
    assert len(found.history_j) == 1
    assert np.isfinite(found.best_j)  # the feasible start


def test_cross_entropy_comes_near_the_bound_and_stops_when_narrow() -> None:
    found = search(CELL, "ce", AllocationConfig(evaluations=20000))
    assert len(found.history_j) < 20000
    assert found.best_j / solve_dual(CELL).lower_bound_j - 1 < 0.02


@pytest.mark.parametrize("change", [{"population": 30}, {"elite": 9}, {"std": 0.3}, {"smoothing": 0.5}])
def test_every_setting_of_the_cross_entropy_search_counts(change: dict[str, float]) -> None:
    settings = {"evaluations": 90, "population": 20, "elite": 4}
    usual = search(CELL, "ce", AllocationConfig(**settings))
    assert search(CELL, "ce", AllocationConfig(**settings | change)).history_j != usual.history_j
