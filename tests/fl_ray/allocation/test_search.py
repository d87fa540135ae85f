"""Every outer search: feasible plans, never below the bound, within its limit of candidates, the same by seed."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from fl_ray.allocation import inner
from fl_ray.allocation.cell import random_cell
from fl_ray.allocation.dual import solve_dual
from fl_ray.allocation.search import SearchSettings, search
from fl_ray.config import AllocationConfig, Search

SEARCHES = [name for name in get_args(Search) if name != "dual"]
CELL = random_cell(5, 2)
LIMIT = 37  # no multiple of any population


@pytest.mark.parametrize("name", SEARCHES)
def test_a_search_keeps_its_limit_and_finds_a_plan(name: str) -> None:
    settings = SearchSettings(evaluations=LIMIT if name != "gp" else 13, population=10, elite=3, seed=1)
    found = search(CELL, name, settings)
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
    again = search(CELL, name, settings)
    assert again.history_j == found.history_j
    assert (again.best_rho == found.best_rho).all()


@pytest.mark.parametrize("name", sorted({*SEARCHES} - {"gp", "gradient"}))
def test_other_seeds_draw_others(name: str) -> None:
    if name == "nelder_mead":
        pytest.skip("draws nothing")
    runs = [search(CELL, name, SearchSettings(evaluations=30, population=10, elite=3, seed=seed)) for seed in (0, 1)]
    assert runs[0].history_j != runs[1].history_j


@pytest.mark.parametrize("name", SEARCHES)
def test_one_candidate_is_enough_to_start(name: str) -> None:
    found = search(CELL, name, SearchSettings(evaluations=1))
    assert len(found.history_j) == 1
    assert np.isfinite(found.best_j)  # the feasible start


def test_cross_entropy_comes_near_the_bound_and_stops_when_narrow() -> None:
    found = search(CELL, "ce", SearchSettings(evaluations=20000))
    assert len(found.history_j) < 20000
    assert found.best_j / solve_dual(CELL).lower_bound_j - 1 < 0.02


def test_settings_are_those_of_the_recipe() -> None:
    config = AllocationConfig(evaluations=70, population=20, elite=4, std=0.2, smoothing=0.1, feasible_start=False)
    assert SearchSettings.of(config, 9) == SearchSettings(70, 20, 4, 0.2, 0.1, False, 9)
