"""Measuring the planner's learning curve: FedAvg at several amounts of data, and the fit to what came out.

The data are IID: the curve is about amounts. What labels do to the error is what synthesis evens out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fl_ray.allocation.learning_curve import CurveFit, fit_curve
from fl_ray.comparison import Comparison
from fl_ray.config import RunConfig
from fl_ray.data.parts import prepare
from fl_ray.errors import SettingError
from fl_ray.recipes import apply_overrides, make_config
from fl_ray.run_folder import RunFolder

__all__ = ["curve_comparison", "default_amounts", "fit_from_runs"]

_SMALLEST_SHARE, _DEFAULT_AMOUNTS = 1 / 32, 6


def curve_comparison(
    recipe: Mapping[str, Any], overrides: Mapping[str, Any], amounts: Sequence[int], seeds: Sequence[int]
) -> Comparison:
    """The recipe's data and model, trained by FedAvg on IID clients of each amount.

    Fewer data for the clients are more for ``data.reserve_fraction``, which nobody trains on: the test and public parts
    are the same for all amounts, and each amount's images hold those of the smaller ones.

    Args:
        recipe, overrides: its method, generator, allocation and compare list do not count.
        amounts: samples per client; empty: ``default_amounts``.
        seeds: of the runs at each amount.

    Raises:
        SettingError: an amount is above what there is, leaves a class without samples or stands twice, or there are
            fewer than three.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise SettingError(f"--seeds {' '.join(map(str, seeds))}: give each seed once")
    base = apply_overrides(recipe, overrides)
    for section in ("generator", "allocation", "compare"):
        base.pop(section, None)
    base["method"] = "fedavg"
    whole = make_config(apply_overrides(base, {"data.partition": "iid"}))
    most = int(prepare(whole.data, whole.seed).partition.sizes.mean())
    chosen = sorted(amounts) or default_amounts(most)
    shown = f"--amounts {' '.join(map(str, chosen))}"
    if len(set(chosen)) < max(3, len(chosen)):
        raise SettingError(f"{shown}: a curve of three unknowns needs three or more amounts, each given once")
    if not (chosen[0] >= 1 and chosen[-1] <= most):
        raise SettingError(
            f"{shown}: the recipe's data give each of its {whole.data.clients} clients {most} samples, so amounts must "
            "be in 1.." + f"{most}; or lower data.clients, data.public_fraction or data.reserve_fraction"
        )
    configs = {f"D = {amount}": _at(base, whole, amount / most) for amount in chosen}
    smallest = configs[f"D = {chosen[0]}"]
    try:
        prepare(smallest.data, smallest.seed)
    except SettingError as error:
        raise SettingError(f"{shown}: {chosen[0]} samples per client are too few: {error}") from error
    return Comparison(f"{whole.name}-curve", configs, tuple(seeds))


def default_amounts(most: int) -> list[int]:
    """Six amounts from 1/32 of all that a client can have up to all, each twice the one before."""
    amounts = np.rint(np.geomspace(max(1, most * _SMALLEST_SHARE), most, _DEFAULT_AMOUNTS))
    return sorted({int(amount) for amount in amounts})


def _at(base: Mapping[str, Any], whole: RunConfig, share: float) -> RunConfig:
    """The runs' settings with this share of the clients' data."""
    clients = 1 - whole.data.public_fraction - whole.data.reserve_fraction
    reserve = 1 - whole.data.public_fraction - share * clients
    changes = {"data.partition": "iid", "data.reserve_fraction": round(reserve, 9)}
    return make_config(apply_overrides(base, changes))


def fit_from_runs(output: Path) -> CurveFit:
    """Fit the curve to all finished runs of a comparison's folder.

    An amount is the mean size of the clients' parts as they were (partition.json), an error 1 - final accuracy.
    """
    points = []
    for path in sorted((output / "runs").glob("*/seed*")):
        folder = RunFolder(path)
        if folder.finished():
            counts = np.array(json.loads((folder / "partition.json").read_text(encoding="utf-8"))["counts"])
            points.append((float(counts.sum(axis=1).mean()), 1 - folder.summary()["final_accuracy"]))
    samples, errors = np.array(sorted(points)).reshape(-1, 2).T
    return fit_curve(samples, errors)
