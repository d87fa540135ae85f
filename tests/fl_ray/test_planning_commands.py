"""``fl-ray plan`` and ``learning-curve``: what they leave and print, that a cut goes on, and bad input."""

from __future__ import annotations

import csv
import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import yaml

from fl_ray.allocation.learning_curve import fit_curve
from fl_ray.curve_measurement import curve_comparison, default_amounts
from fl_ray.data.parts import prepare
from fl_ray.recipes import load_recipe
from tests.conftest import Call

RECIPE = {
    "name": "small",
    "data": {"name": "digits", "clients": 4, "public_fraction": 0.2, "partition": {"name": "dirichlet", "alpha": 0.5}},
    "model": {"name": "mlp", "hidden": [16]},
    "training": {"batch_size": 16, "lr": 0.1},
    "runtime": {"backend": "in_process", "training_path": "plain"},
    "rounds": 2,
    "allocation": {
        "error_max": 0.5,
        "d_gen_max": 900,
        "upload_bits": 5e7,
        "curve": {"alpha": 3, "beta": 0.4, "gamma": 0},
    },
    "tracking": {"enabled": False},
}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


# ---- plan


def test_plan_leaves_files_and_tables(recipe: Path, tmp_path: Path, call: Call) -> None:
    found = call("plan", "small.yaml", "--output", "out", "--allocation.error_max", "0.28")
    assert found.returncode == 0, found.stderr
    plan = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert len(plan["devices"]) == 4
    assert plan["gap"] <= 1e-6
    assert plan["error"] == pytest.approx(0.28)
    assert sum(device["d_gen"] for device in plan["devices"]) > 0
    for word in ("lower bound", "a looser error_max saves", "error_max binds", "out/plan.json", "out/plan.html"):
        assert word in found.stdout
    with (tmp_path / "out" / "devices.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [int(row["device"]) for row in rows] == [0, 1, 2, 3]
    assert {path.name for path in (tmp_path / "out" / "figures").iterdir()} == {"allocation.svg", "energy.svg"}
    assert "</html>" in (tmp_path / "out" / "plan.html").read_text(encoding="utf-8")


def test_plan_by_cross_entropy_draws_its_search(recipe: Path, tmp_path: Path, call: Call) -> None:
    words = ("--allocation.search", "ce", "--allocation.evaluations", "250", "--seed", "3")
    found = call("plan", "small.yaml", "--output", "out", *words)
    assert found.returncode == 0, found.stderr
    plan = json.loads((tmp_path / "out" / "plan.json").read_text(encoding="utf-8"))
    assert plan["search"] == "ce"
    assert len(plan["history_j"]) == 250
    assert (tmp_path / "out" / "figures" / "search.svg").exists()


def test_an_infeasible_cell_is_bad_input_with_ways_out(recipe: Path, tmp_path: Path, call: Call) -> None:
    found = call("plan", "small.yaml", "--allocation.error_max", "0.05", "--output", "out")
    assert found.returncode == 2
    assert "there is no plan: Delta_max = 0.05 can't be reached" in found.stderr
    assert "allocation.error_max of at least" in found.stderr
    assert not (tmp_path / "out").exists()
    least = found.stderr.split("allocation.error_max of at least ")[1].split()[0]
    assert call("plan", "small.yaml", "--allocation.error_max", least, "--output", "out").returncode == 0


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--allocation.search", "sa"], "allocation.search"),
        (["--allocation.serch", "ce"], "Did you mean 'search'"),
        (["--allocation.compare", "[simplex]"], "unknown search 'simplex'"),
        (["--allocation.elite", "200"], "allocation.elite is 200"),
        (["--clients_per_round", "2"], "clients_per_round is 2"),
        (["--seeds", "0", "1"], "--seeds goes with allocation.compare"),
        (["--allocation.curve", "none.json"], "none.json can't be read"),
        (["--allocation.curve.alpha", "-1"], "allocation.curve.alpha is -1"),
        (["--allocation.compare", "[dual]", "--seeds", "0", "0"], "give each seed once"),
    ],
)
def test_bad_input_of_plan(recipe: Path, call: Call, words: list[str], match: str) -> None:
    found = call("plan", "small.yaml", *words)
    assert found.returncode == 2
    assert match in found.stderr


COMPARE = "[dual, gradient, {search: ce, evaluations: 200}, {search: tpe, evaluations: 12}]"


def test_searches_are_compared_cell_by_cell(recipe: Path, tmp_path: Path, call: Call) -> None:
    words = ["plan", "small.yaml", "--output", "out", "--allocation.evaluations", "100", "--allocation.compare"]
    first = call(*words, COMPARE, "--seeds", "0")
    assert first.returncode == 0, first.stderr
    kept = (tmp_path / "out" / "cells" / "seed0-ce.json").read_bytes()
    found = call(*words, COMPARE, "--seeds", "0", "1")
    assert found.returncode == 0, found.stderr
    assert (tmp_path / "out" / "cells" / "seed0-ce.json").read_bytes() == kept  # with the seconds that it took then
    content = json.loads((tmp_path / "out" / "searches.json").read_text(encoding="utf-8"))["searches"]
    assert list(content) == ["dual", "gradient", "ce", "tpe"]
    assert content["dual"]["given"] == 0
    assert max(content["dual"]["gap"]) <= 1e-6
    assert [content[name]["given"] for name in ("gradient", "ce", "tpe")] == [100, 200, 12]
    assert content["ce"]["looked_at"] == [200, 200]
    assert content["ce"]["gap_after"]["30"][0] >= content["ce"]["gap_after"]["100"][0] >= content["ce"]["gap"][0] >= 0
    table = (tmp_path / "out" / "searches.md").read_text(encoding="utf-8")
    assert "| gap after | 30 | 100 | all |" in table
    assert "| tpe | – | – | " in table
    with (tmp_path / "out" / "searches.csv").open(encoding="utf-8", newline="") as stream:
        assert len(list(csv.DictReader(stream))) == 8
    assert (tmp_path / "out" / "figures" / "searches.svg").exists()
    assert "</html>" in (tmp_path / "out" / "searches.html").read_text(encoding="utf-8")
    other = call(*words, COMPARE, "--seeds", "0", "--allocation.t_max_s", "70")
    assert other.returncode == 2
    assert "it holds searches with other settings" in other.stderr


def test_cells_without_a_plan_are_left_out_and_counted(recipe: Path, tmp_path: Path, call: Call) -> None:
    """At this Tmax the cell of one of the seeds has no plan."""
    words = ("plan", "small.yaml", "--allocation.compare", "[dual, gradient]", "--allocation.t_max_s", "TMAX")
    seconds = {}
    for seed in range(3):
        found = call("plan", "small.yaml", "--seed", str(seed), "--allocation.t_max_s", "0.5", "--output", f"out{seed}")
        assert found.returncode == 2
        seconds[seed] = float(found.stderr.split("t_max_s of at least ")[1].split()[0])
    between = np.sort(list(seconds.values()))[1:].mean()
    lost = max(seconds, key=seconds.get)
    words = (*words[:-1], str(between))
    found = call(*words, "--seeds", "0", "1", "2", "--output", "out")
    assert found.returncode == 0, found.stderr
    assert f"seed {lost} is left out: there is no plan" in found.stderr
    assert "2 cells (1 without a plan)" in found.stdout
    content = json.loads((tmp_path / "out" / "searches.json").read_text(encoding="utf-8"))
    assert list(content["infeasible"]) == [str(lost)]
    assert len(content["searches"]["gradient"]["gap"]) == 2
    found = call(*words, "--seeds", str(lost), "--output", "none")
    assert found.returncode == 2
    assert "no cell has a plan" in found.stderr


# ---- learning-curve


def test_a_curve_is_measured_and_serves_the_planner(recipe: Path, tmp_path: Path, call: Call) -> None:
    words = ("learning-curve", "small.yaml", "--amounts", "10", "60", "200", "--seeds", "1", "--output", "curve")
    words += ("--allocation.curve", "curve/learning_curve.json")  # which is not there yet
    found = call(*words)
    assert found.returncode == 0, found.stderr
    content = json.loads((tmp_path / "curve" / "learning_curve.json").read_text(encoding="utf-8"))
    points = []
    for folder in sorted((tmp_path / "curve" / "runs").glob("*/seed*")):
        counts = np.array(json.loads((folder / "partition.json").read_text())["counts"])
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["method"]["name"] == "fedavg"
        assert config["data"]["partition"]["name"] == "iid"
        assert config["generator"] is None
        amount = int(folder.parent.name.split("_")[-1])
        assert abs(counts.sum(axis=1).mean() - amount) <= 2.5  # ten classes, each rounded, over four clients
        summary = json.loads((folder / "summary.json").read_text())
        points.append((counts.sum(axis=1).mean(), 1 - summary["final_accuracy"]))
    assert len(points) == 3
    samples, errors = np.array(sorted(points)).T
    assert content["samples"] == samples.tolist()
    assert content["errors"] == pytest.approx(errors.tolist())
    again = fit_curve(samples, errors).curve
    assert [content[name] for name in ("alpha", "beta", "gamma")] == pytest.approx(list(again.to_dict().values()))
    for name in ("curve.md", "curve.html", "figures/curve.svg"):
        assert (tmp_path / "curve" / name).exists()
    assert "curve/learning_curve.json (allocation.curve takes it)" in found.stdout
    repeated = call(*words)
    assert "3 of 3 runs were finished before" in repeated.stderr
    plan = call(
        "plan", "small.yaml", "--allocation", "{error_max: 0.9, curve: curve/learning_curve.json}", "--output", "p"
    )
    assert plan.returncode == 0, plan.stderr


def test_all_amounts_have_the_same_test_and_public_images(recipe: Path, call: Call) -> None:
    configs = curve_comparison(load_recipe(recipe), {}, [10, 50, 250], [0]).configs
    parts = [prepare(config.data, 0) for config in configs.values()]
    for smaller, larger in pairwise(parts):
        assert (smaller.test_images == larger.test_images).all()
        assert (smaller.public == larger.public).all()
        assert set(smaller.partition.owned()) < set(larger.partition.owned())


def test_default_amounts() -> None:
    assert default_amounts(3200) == [100, 200, 400, 800, 1600, 3200]
    assert default_amounts(20)[0] >= 1
    assert default_amounts(20)[-1] == 20


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--amounts", "10", "20", "5000"], "give each of its 4 clients 287 samples, so amounts must be in 1..287"),
        (["--amounts", "0", "20", "50"], "must be in 1..287"),
        (["--amounts", "20", "50"], "needs three or more amounts"),
        (["--amounts", "20", "20", "50"], "each given once"),
        (["--amounts", "1", "20", "50"], "1 samples per client are too few"),
        (["--seeds", "1", "1"], "give each seed once"),
    ],
)
def test_bad_input_of_learning_curve(recipe: Path, call: Call, words: list[str], match: str) -> None:
    found = call("learning-curve", "small.yaml", *words)
    assert found.returncode == 2
    assert match in found.stderr


def test_print_config_shows_every_amount(recipe: Path, call: Call) -> None:
    found = call("learning-curve", "small.yaml", "--amounts", "10", "50", "250", "--print_config")
    assert found.returncode == 0
    assert [line for line in found.stdout.splitlines() if line.startswith("# ")] == [
        "# D = 10",
        "# D = 50",
        "# D = 250",
    ]
