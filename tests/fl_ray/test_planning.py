"""The cell of a recipe, number by number, and what a recipe may not ask of the planner."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fl_ray.allocation.learning_curve import LearningCurve
from fl_ray.allocation.plan import Plan, make_plan
from fl_ray.allocation.settings import AllocationConfig
from fl_ray.config import RunConfig
from fl_ray.data.parts import prepare
from fl_ray.devices.fleet import draw_fleet
from fl_ray.errors import SettingError
from fl_ray.planning import load_curve, recipe_cell

Small = Callable[..., RunConfig]


def test_a_cell_is_the_recipe_in_si_units(small: Small) -> None:
    config = small(
        clients_per_round=None,
        training__local_epochs=3,
        fleet__bandwidth_hz=7e6,
        fleet__noise_dbm_hz=-170.0,
        fleet__tiers=[
            {"name": "fast", "frequency_hz": [0.5e9, 3e9], "power_w": 0.1, "cycles_per_sample": 5e6},
            {"name": "fixed", "frequency_hz": 1e9, "power_w": 0.3, "cycles_per_sample": 6e6, "capacitance": 1e-28},
        ],
        allocation={"t_max_s": 50, "error_max": 0.4, "d_gen_max": 300, "quality": 0.8, "curve": {**CURVE}},
    )
    cell = recipe_cell(config)
    fast = draw_fleet(config.fleet, 6, config.seed).tier == 0
    assert 0 < fast.sum() < 6
    assert cell.f_min_hz.tolist() == np.where(fast, 0.5e9, 1e9).tolist()
    assert cell.f_max_hz.tolist() == np.where(fast, 3e9, 1e9).tolist()
    assert cell.p_max_w.tolist() == np.where(fast, 0.1, 0.3).tolist()
    assert cell.capacitance.tolist() == np.where(fast, 2e-28, 1e-28).tolist()
    assert cell.cycles.tolist() == np.where(fast, 15e6, 18e6).tolist()
    assert cell.noise_w_hz == pytest.approx(1e-20, rel=1e-12)  # -170 dBm/Hz
    assert cell.bandwidth_hz == 7e6
    # An MLP of 64 inputs, 16 hidden units and 10 outputs, in fp32.
    assert cell.upload_bits == 32 * (64 * 16 + 16 + 16 * 10 + 10)
    assert (cell.t_max_s, cell.error_max, cell.d_gen_max, cell.quality) == (50, 0.4, 300, 0.8)
    assert cell.curve == LearningCurve(2, 0.5, 0.01)
    data = prepare(config.data, config.seed)
    by_hand = [np.bincount(data.labels[data.partition.of(client)], minlength=10).tolist() for client in range(6)]
    assert cell.class_counts.tolist() == by_hand


CURVE = {"alpha": 2, "beta": 0.5, "gamma": 0.01}


def test_the_seed_decides_fleet_and_partition(small: Small) -> None:
    cells = [recipe_cell(small(clients_per_round=None, seed=seed)) for seed in (0, 0, 1)]
    assert cells[0].digest() == cells[1].digest() != cells[2].digest()


def test_a_plan_file_serves_the_recipe_it_was_made_with(small: Small, tmp_path: Path) -> None:
    config = small(clients_per_round=None, allocation__error_max=0.6)
    make_plan(recipe_cell(config), config.allocation).save(tmp_path / "plan.json")
    assert Plan.load(tmp_path / "plan.json", recipe_cell(config)).cell.devices == 6
    with pytest.raises(SettingError, match="another fleet, partition or limits"):
        Plan.load(tmp_path / "plan.json", recipe_cell(small(clients_per_round=None, allocation__error_max=0.59)))


def test_what_a_recipe_may_not_ask(small: Small, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"clients_per_round is 3.*all 6 clients; leave"):
        recipe_cell(small())
    with pytest.raises(SettingError, match=r"device \d has no local data.*min_samples"):
        recipe_cell(
            small(
                clients_per_round=None, data__partition={"name": "dirichlet", "alpha": 0.01, "min_samples": 0}, seed=1
            )
        )
    path = tmp_path / "capacities.json"
    path.write_text(json.dumps({str(i): {"computation": 40.0, "communication": 5000.0} for i in range(6)}))
    with pytest.raises(SettingError, match=r"fleet\.trace\.capacity gives measured link rates.*leave it out"):
        recipe_cell(small(clients_per_round=None, fleet__trace={"capacity": str(path)}))


def test_curves_from_files_and_values(tmp_path: Path) -> None:
    assert load_curve(None) == LearningCurve()
    assert load_curve(CURVE) == LearningCurve(2, 0.5, 0.01)
    path = tmp_path / "curve.json"
    path.write_text('{"alpha": 3, "beta": 0.3, "gamma": 0, "rmse": 0.1}', encoding="utf-8")
    assert load_curve(str(path)) == LearningCurve(3, 0.3, 0)
    with pytest.raises(SettingError, match=r"can't be read.*fl-ray learning-curve"):
        load_curve(str(tmp_path / "none.json"))
    for bad in ({"alpha": 3.0}, {**CURVE, "delta": 1.0}):
        with pytest.raises(SettingError, match="alpha, beta and gamma and nothing else"):
            load_curve(bad)


@pytest.mark.parametrize(
    ("compare", "match"),
    [
        (["dual", "cme"], r"unknown search 'cme'.*Did you mean 'ce'"),
        ([{"search": "gp", "evaluation": 3}], "a mapping with search and evaluations"),
        ([{"evaluations": 3}], "a mapping with search and evaluations"),
        ([{"search": "gp", "evaluations": 0}], r"evaluations of gp, is 0.*at least 1"),
        ([{"search": "dual", "evaluations": 9}], "looks at no candidates"),
        (["ce", {"search": "ce", "evaluations": 9}], "a list with ce once"),
    ],
)
def test_searches_to_compare_are_checked(compare: list, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        AllocationConfig(compare=compare)


def test_candidates_of_compared_searches() -> None:
    config = AllocationConfig(evaluations=50, compare=["dual", "ce", {"search": "gp", "evaluations": 7}])
    assert config.compared() == {"dual": 0, "ce": 50, "gp": 7}
