"""A comparison from the tracking store alone: runs by label, over seeds, with intervals and paired tests."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from fl_ray.errors import OutputError, SettingError
from fl_ray.registry import nearest
from fl_ray.tracking_store import find_experiment

__all__ = ["StoredRun", "runs_of_experiment", "series_of"]

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
