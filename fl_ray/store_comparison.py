"""A comparison from the tracking store alone: runs by label, over seeds, with intervals and paired tests."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from fl_ray.errors import OutputError, SettingError
from fl_ray.registry import nearest
from fl_ray.tracking_store import find_experiment

__all__ = ["StoredRun", "compare_pairs", "confidence_interval", "runs_of_experiment", "series_of"]

_PAGE = 500
_CURVES = ("test_accuracy", "virtual_time_s", "energy_j")


@dataclass(frozen=True)
class StoredRun:
    """A finished run of the store: its label, seed, when it began (ms), last metrics, and where its curves are."""

    run_id: str
    label: str
    seed: int
    began: int
    metrics: dict[str, float] = field(default_factory=dict)


def runs_of_experiment(uri: str, experiment: str, wanted: str = "") -> tuple[list[StoredRun], int]:
    """The finished runs of an experiment that have a history (neither studies nor trials), and how many are left out.

    Of runs of one label and seed the newest is taken: the same run twice would pass for two seeds.

    Args:
        wanted: MLflow's filter, as ``params.data.partition.alpha = '0.1'`` or ``tags.method = 'genfl'``.

    Raises:
        SettingError: the store can't be used, there is no such experiment, or MLflow refuses the filter.
        OutputError: no finished run is left.
    """
    from mlflow.exceptions import MlflowException

    client, found = find_experiment(uri, experiment)
    if found is None:
        names = [each.name for each in client.search_experiments()]
        raise SettingError(f"--mlflow {experiment}: no such experiment in {uri}.{nearest(experiment, names)}")
    newest: dict[tuple[str, int], StoredRun] = {}
    older = 0
    token: str | None = None
    while True:
        try:
            order = ["attributes.start_time DESC"]
            page = client.search_runs([found.experiment_id], wanted, 1, _PAGE, order, token)
        except MlflowException as error:
            raise SettingError(f"--filter {wanted}: {error.message}") from error
        for run in page:
            whole = run.info.status == "FINISHED" and "kind" not in run.data.tags and "seed" in run.data.params
            if not whole or "final_accuracy" not in run.data.metrics:
                continue
            seed = int(run.data.params["seed"])
            label = run.data.tags.get("label") or run.info.run_name.removesuffix(f"-seed{seed}")
            older += (label, seed) in newest
            newest.setdefault(
                (label, seed), StoredRun(run.info.run_id, label, seed, run.info.start_time, dict(run.data.metrics))
            )
        token = page.token
        if not token:
            break
    if not newest:
        also = f" with {wanted}" if wanted else ""
        raise OutputError(f"--mlflow {experiment}: no finished run in {uri}{also}")
    return sorted(newest.values(), key=lambda run: (run.label, run.seed)), older


def series_of(uri: str, run_id: str) -> list[dict[str, float]]:
    """A run's rounds, as its history has them: round, test_accuracy, virtual_time_s, energy_j."""
    import mlflow

    client = mlflow.MlflowClient(uri)
    rows: dict[int, dict[str, float]] = {}
    for name in _CURVES:
        for metric in client.get_metric_history(run_id, name):
            row = rows.setdefault(metric.step, {"round": metric.step, **dict.fromkeys(_CURVES, math.nan)})
            row[name] = metric.value
    return [rows[step] for step in sorted(rows)]


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of Student's interval; the half width is NaN for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error


def compare_pairs(own: Mapping[int, float], other: Mapping[int, float]) -> dict[str, Any]:
    """The difference own - other over the seeds that both have: mean, half width of its 95 % interval, and p.

    p is that of the two-sided paired t-test. It is None for fewer than three pairs, and where all differ by the same.
    """
    seeds = sorted(set(own) & set(other))
    differences = np.array([own[seed] - other[seed] for seed in seeds])
    if len(seeds) == 0:
        return {"pairs": 0, "difference": None, "half_width": None, "p": None}
    mean, half = confidence_interval(differences.tolist())
    tested = len(seeds) >= 3 and differences.std() > 0
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if tested else None
    return {"pairs": len(seeds), "difference": mean, "half_width": None if math.isnan(half) else half, "p": p}
