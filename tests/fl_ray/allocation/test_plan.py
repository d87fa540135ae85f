"""Plans: every limit reckoned again from plan.json alone, amounts by class, ablations, and a plan for one cell only."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_ray.allocation.cell import Cell, random_cell
from fl_ray.allocation.plan import Plan, make_plan
from fl_ray.allocation.settings import AllocationConfig
from fl_ray.errors import InfeasibleError, SettingError


def reckoned(content: dict[str, Any]) -> dict[str, float]:
    """Energy, error, band and longest time from plan.json, by the formulas of Yang et al. in plain Python."""
    cell, curve = content["cell"], content["cell"]["curve"]
    energy = error = band = longest = 0.0
    for number, device in enumerate(content["devices"]):
        d_loc = sum(cell["class_counts"][number])
        cycles = cell["local_epochs"] * cell["cycles_per_sample"][number] * (d_loc + device["d_gen"])
        noise_w = cell["noise_w_hz"] * device["b_hz"]
        rate = device["b_hz"] * math.log2(1 + device["p_w"] * cell["gain"][number] / noise_w)
        train_s, send_s = cycles / device["f_hz"], cell["upload_bits"] / rate
        train_j, send_j = cell["capacitance"][number] * cycles * device["f_hz"] ** 2, device["p_w"] * send_s
        for name, value in (("t_cmp_s", train_s), ("t_com_s", send_s), ("e_cmp_j", train_j), ("e_com_j", send_j)):
            assert device[name] == pytest.approx(value, rel=1e-9)
        assert cell["f_min_hz"][number] * (1 - 1e-9) <= device["f_hz"] <= cell["f_max_hz"][number] * (1 + 1e-9)
        assert 0 < device["p_w"] <= cell["p_max_w"][number] * (1 + 1e-9)
        assert -1e-9 * d_loc <= device["d_gen"] <= cell["d_gen_max"] + 1e-6
        seen = d_loc + cell["quality"] * device["d_gen"]
        error += (curve["alpha"] * seen ** -curve["beta"] + curve["gamma"]) / len(content["devices"])
        energy, band, longest = energy + train_j + send_j, band + device["b_hz"], max(longest, train_s + send_s)
    return {"energy_j": energy, "error": error, "band_hz": band, "longest_s": longest}


@pytest.mark.parametrize("search", ["dual", "ce"])
@pytest.mark.parametrize("change", [{}, {"quality": 0.6}, {"t_max_s": 45.0}, {"error_max": 0.9}])
def test_a_plan_keeps_every_limit(search: str, change: dict[str, float], tmp_path: Path) -> None:
    cell = random_cell(12, 3, **change)
    plan = make_plan(cell, AllocationConfig(search=search, evaluations=600))
    plan.save(tmp_path / "plan.json")
    content = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    found = reckoned(content)
    assert found["energy_j"] == pytest.approx(content["energy_j"], rel=1e-9)
    assert found["error"] == pytest.approx(content["error"], rel=1e-9)
    assert found["error"] <= cell.error_max * (1 + 1e-9)
    assert found["band_hz"] <= cell.bandwidth_hz * (1 + 1e-9)
    assert found["longest_s"] <= cell.t_max_s * (1 + 1e-9)
    assert content["lower_bound_j"] <= content["energy_j"] * (1 + 1e-9)
    assert content["gap"] == pytest.approx(max(0, content["energy_j"] / content["lower_bound_j"] - 1), abs=1e-12)
    assert content["gap"] <= (1e-6 if search == "dual" else 0.9)
    assert content["binding"]["error_max"] == ("error_max" not in change)
    assert content["binding"]["bandwidth"]


def test_class_amounts_are_the_planned_images_and_even_out_the_classes() -> None:
    cell = random_cell(10, 1)
    plan = make_plan(cell, AllocationConfig())
    totals = plan.class_amounts.sum(axis=1)
    assert plan.class_amounts.dtype == np.int64
    assert (plan.class_amounts >= 0).all()
    assert (totals >= plan.d_gen - 1e-6).all()
    assert (totals < plan.d_gen + 1).all()
    assert plan.d_gen.max() > 100
    for counts, made in zip(cell.class_counts, plan.class_amounts, strict=True):
        filled = (counts + made)[made > 0]
        if len(filled):  # water: what was filled is level, and what was not stands above it
            assert np.ptp(filled) <= 1
            assert (counts[made == 0] >= filled.max() - 1).all()
    # Whole images are never fewer: the error stays below its limit.
    assert cell.error(cell.d_loc + totals) <= cell.error_max


def test_images_at_the_highest_frequency_are_rounded_down() -> None:
    cell = replace(random_cell(20, 7), t_max_s=30.0)
    plan = make_plan(cell, AllocationConfig())
    most_s = cell.cycles * (cell.d_loc + plan.class_amounts.sum(axis=1)) / cell.f_max_hz
    assert (most_s <= (cell.t_max_s - plan.t_com_s) * (1 + 1e-9)).all()
    assert len(plan.binding()["f_max"]) > 0


def test_a_plan_comes_back_from_its_file(tmp_path: Path) -> None:
    cell = random_cell(6, 2)
    plan = make_plan(cell, AllocationConfig(search="ce", evaluations=200))
    plan.save(tmp_path / "plan.json")
    again = Plan.load(tmp_path / "plan.json", Cell.from_dict(cell.to_dict()))
    assert again.to_dict() == plan.to_dict()
    assert len(again.history_j) == 200


def test_a_plan_for_another_cell_or_none_is_refused(tmp_path: Path) -> None:
    cell = random_cell(4, 0)
    path = tmp_path / "plan.json"
    make_plan(cell, AllocationConfig()).save(path)
    for other in (replace(cell, t_max_s=61.0), random_cell(4, 1)):
        with pytest.raises(SettingError, match=r"made for another fleet.*make it anew with fl-ray plan"):
            Plan.load(path, other)
    with pytest.raises(SettingError, match="can't be read"):
        Plan.load(tmp_path / "none.json", cell)
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(SettingError, match="can't be read"):
        Plan.load(path, cell)


def test_without_synthesis_nobody_gets_samples_and_the_error_is_not_limited() -> None:
    cell = random_cell(8, 0)
    plan = make_plan(cell, AllocationConfig(synthesis=False))
    assert not plan.d_gen.any()
    assert not plan.class_amounts.any()
    assert plan.error == pytest.approx(float(cell.error(cell.d_loc)))
    assert plan.error > cell.error_max
    assert plan.energy_j < make_plan(cell, AllocationConfig()).energy_j
    assert plan.gap <= 1e-6


def test_without_optimisation_all_run_at_full_power_with_the_same_samples() -> None:
    cell = random_cell(8, 0)
    planned, plain = (make_plan(cell, AllocationConfig(optimise=optimise)) for optimise in (True, False))
    assert (plain.d_gen == planned.d_gen).all()
    assert (plain.class_amounts == planned.class_amounts).all()
    assert (plain.f_hz == cell.f_max_hz).all()
    assert (plain.p_w == cell.p_max_w).all()
    assert plain.b_hz.tolist() == [cell.bandwidth_hz / 8] * 8
    assert plain.energy_j > planned.energy_j
    found = reckoned(plain.to_dict())
    assert found["energy_j"] == pytest.approx(plain.energy_j, rel=1e-9)


def test_limits_that_bind_are_named() -> None:
    cell = replace(random_cell(8, 0), d_gen_max=600.0, error_max=0.262)
    plan = make_plan(cell, AllocationConfig())
    binding = plan.binding()
    assert binding["d_gen_max"] == np.flatnonzero(plan.d_gen >= 600 - 1e-3).tolist() != []
    assert binding["error_max"] is binding["bandwidth"] is True
    assert binding["t_max"] == list(range(8))


def test_a_cell_without_a_plan_names_a_limit_that_would_do() -> None:
    cell = replace(random_cell(8, 0), t_max_s=15.0)
    with pytest.raises(InfeasibleError, match=r"no plan: .*t_max_s of at least [\d.]+ s") as raised:
        make_plan(cell, AllocationConfig())
    seconds = float(str(raised.value).split("t_max_s of at least ")[1].split()[0])
    assert make_plan(replace(cell, t_max_s=seconds), AllocationConfig()).gap <= 1e-6


def test_a_search_that_finds_nothing_says_so() -> None:
    cell = replace(random_cell(20, 0), t_max_s=30.0)
    config = AllocationConfig(search="ce", evaluations=300, feasible_start=False)
    with pytest.raises(InfeasibleError, match=r"search ce found no feasible plan in 300 candidates.*feasible_start"):
        make_plan(cell, config)


@pytest.mark.parametrize("seed", [1, 3, 4, 5, 14])
def test_at_its_very_limit_a_plan_is_certified_or_refused(seed: int) -> None:
    """Tmax just as the message of an infeasible cell recommends it, where rounding can push splits over a limit."""
    cell = replace(random_cell(20, seed), d_gen_max=0.0, error_max=1e9, t_max_s=5.0)
    with pytest.raises(InfeasibleError) as told:
        make_plan(cell, AllocationConfig())
    least = float(re.search(r"t_max_s of at least ([\d.]+) s", str(told.value))[1])
    try:
        plan = make_plan(replace(cell, t_max_s=least), AllocationConfig())
    except InfeasibleError:  # no room beyond rounding: with a little more there is
        plan = make_plan(replace(cell, t_max_s=least * 1.0001), AllocationConfig())
        least *= 1.0001
    assert plan.lower_bound_j <= plan.energy_j * (1 + 1e-6)
    assert plan.gap <= 1e-3
    assert (plan.t_cmp_s + plan.t_com_s <= least * (1 + 1e-9)).all()
    assert plan.b_hz.sum() <= cell.bandwidth_hz * (1 + 1e-9)
    assert (plan.p_w <= cell.p_max_w * (1 + 1e-9)).all()
