"""A study in MLflow: the study is a run, its trials are nested in it, and their seeds in them."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from fl_ray.config import RunConfig
from fl_ray.run_folder import write_json
from fl_ray.studies.settings import Study
from fl_ray.studies.trials import Trial, all_trials, best_trials, trial_folder
from fl_ray.tracking_store import prepare_store, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient

__all__ = ["PARENT", "TrialRun", "begin_study_run", "end_runs_of", "end_study"]

PARENT = "mlflow.parentRunId"  # MLflow's tag of a nested run
_FILE = "tracking.json"
_ENDED = {"finished": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}  # ours: MLflow's


class TrialRun:
    """A trial's run, written by the trial's process alone; the runs of its seeds are nested in it.

    Args:
        parent: the study's run.
    """

    def __init__(self, config: RunConfig, study: Study, trial: Trial, parent: str) -> None:
        import mlflow

        self.client = mlflow.MlflowClient(tracking_uri(config))
        if trial.mlflow_run is None:
            experiment = prepare_store(config)
            tags = {PARENT: parent, "study": study.name, "trial": str(trial.number), "kind": "trial"}
            tags |= {"method": config.method.name, "data": config.data.name}
            name = f"trial-{trial.number:04d}"
            self.run_id = self.client.create_run(experiment, run_name=name, tags=tags).info.run_id
            for key, value in trial.params.items():
                self.client.log_param(self.run_id, key, value)
        else:
            self.run_id = trial.mlflow_run
            self.client.update_run(self.run_id, status="RUNNING")

    def end(self, trial: Trial) -> str | None:
        """Log what the trial came to, and end its run. What kept it from that: a trial that is done stays so."""
        from mlflow.exceptions import MlflowException

        try:
            _log_metrics(self.client, self.run_id, trial.reached())
            self.client.set_tag(self.run_id, "state", trial.state)
            if trial.error is not None:
                self.client.set_tag(self.run_id, "error", trial.error[:500])
            self.client.set_terminated(self.run_id, _ENDED[trial.state])
        except MlflowException as error:
            return _first_line(error)
        return None


def begin_study_run(study: Study, output: Path) -> str:
    """The study's run, which the study's process alone writes; gone on with where the folder names one. Its id."""
    import mlflow

    config = study.config({})
    uri, known = tracking_uri(config), output / _FILE
    experiment = prepare_store(config)
    client = mlflow.MlflowClient(uri)
    if known.exists():
        run_id: str = json.loads(known.read_text(encoding="utf-8"))["run_id"]
        client.update_run(run_id, status="RUNNING")
        return run_id
    tags = {"study": study.name, "kind": "study", "method": config.method.name, "data": config.data.name}
    run_id = client.create_run(experiment, run_name=study.name, tags=tags).info.run_id
    content = study.to_dict()
    for key in ("metric", "mode", "trials", "concurrency", "seeds", "objective"):
        client.log_param(run_id, key, content[key])
    client.log_param(run_id, "algorithm", study.algorithm.name)
    client.log_param(run_id, "scheduler", study.scheduler.name)
    write_json(known, {"uri": uri, "run_id": run_id})
    return run_id


def _log_metrics(client: MlflowClient, run_id: str, metrics: Mapping[str, float | None], prefix: str = "") -> None:
    for name, value in metrics.items():
        if value is not None and math.isfinite(value):
            client.log_metric(run_id, f"{prefix}{name}", value)


def end_study(study: Study, output: Path, status: str) -> str | None:
    """Log the best trial's metrics and the study's report into its run, where it has one, and end it.

    Args:
        status: MLflow's.

    Returns:
        What kept it from that.
    """
    if not (output / _FILE).exists():
        return None
    from mlflow.exceptions import MlflowException

    try:
        _log_study(study, output, status)
    except MlflowException as error:
        return _first_line(error)
    return None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _log_study(study: Study, output: Path, status: str) -> None:
    import mlflow

    known = output / _FILE
    stored = json.loads(known.read_text(encoding="utf-8"))
    client, run_id = mlflow.MlflowClient(stored["uri"]), stored["run_id"]
    for trial in best_trials(study.mode, study.metric, all_trials(output))[:1]:
        _log_metrics(client, run_id, trial.reached(), "best_")
        client.set_tag(run_id, "best_trial", str(trial.number))
    for name in ("study.yaml", "study.md", "trials.csv", "report.html"):
        if (output / name).exists():
            client.log_artifact(run_id, str(output / name))
    for file in sorted((output / "figures").glob("*.svg")):
        client.log_artifact(run_id, str(file), "figures")
    client.set_terminated(run_id, status)


def end_runs_of(output: Path, uri: str, number: int) -> None:
    """End what a trial that died has left marked as running: its run, and its seeds'."""
    import mlflow
    from mlflow.exceptions import MlflowException

    client = mlflow.MlflowClient(uri)
    found = [trial.mlflow_run for trial in all_trials(output) if trial.number == number]
    for file in trial_folder(output, number).glob(f"seed*/{_FILE}"):
        found.append(json.loads(file.read_text(encoding="utf-8"))["run_id"])
    for run_id in found:
        if run_id is None:
            continue
        with contextlib.suppress(MlflowException):  # deleted by hand meanwhile
            if client.get_run(run_id).info.status == "RUNNING":
                client.set_terminated(run_id, "FAILED")
