"""Running a study: trials by Ray Tune, the journal that it goes on from, and its end."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import optuna
import ray
import yaml

from fl_ray.config import RunConfig
from fl_ray.devices.fleet import draw_fleet
from fl_ray.errors import FlRayError, OutputError, PlacementError
from fl_ray.experiment import check
from fl_ray.input_files import check_inputs, input_files
from fl_ray.progress import Progress
from fl_ray.recipes import apply_overrides
from fl_ray.run_folder import new_folder, write_json
from fl_ray.runtime.connection import Connection
from fl_ray.runtime.placement import plan_slots
from fl_ray.runtime.spare import server_gpus, spare
from fl_ray.storage import is_temporary
from fl_ray.studies.objectives import PlanObjective, RunObjective
from fl_ray.studies.settings import Study, load_study
from fl_ray.studies.tracking import begin_study_run, end_runs_of
from fl_ray.studies.trials import Trial, all_trials, shown, trial_folder
from fl_ray.tracking_store import tracking_uri
from tuning.algorithms import make_sampler
from tuning.search import FINISHED, open_study
from tuning.tune_study import run_trials, trials_that_fit

__all__ = ["begin_study", "journal_of", "resume_study", "run_study", "study_wall_s"]

_FILE, _WALL, _INPUTS = "study.yaml", "wall.json", "inputs.json"
_UNSEEN = "it ran on a node that does not see the study's folder; give an --output that all nodes see"


def journal_of(study: Study, output: Path) -> optuna.Study:
    """The study's journal, with its sampler."""
    sampler = make_sampler(study.algorithm.name, study.algorithm.settings, study.seed)
    return open_study(output / "journal.log", study.directions, sampler)


def begin_study(study: Study, output: Path) -> Study:
    """A new study's folder; the study with what its trials must not look up in their own working folders.

    Raises:
        OutputError: the folder is in use.
    """
    base = study.base()
    inputs = input_files(base)
    new_folder(output)
    here: dict[str, Any] = {}
    if base.tracking.enabled:
        here["tracking.uri"] = tracking_uri(base)
        here["tracking.experiment"] = base.tracking.experiment or study.name
    if base.data.root is not None:
        here["data.root"] = str(Path(base.data.root).resolve())
    study = replace(study, recipe=apply_overrides(study.recipe, here))
    (output / _FILE).write_text(yaml.safe_dump(study.to_dict(), sort_keys=False), encoding="utf-8")
    write_json(output / _INPUTS, inputs)
    return study


def resume_study(output: Path, trials: int | None) -> Study:
    """The study of a folder.

    Args:
        trials: in place of those that it was begun with: more of them.

    Raises:
        OutputError: there is no study in it, or files that its recipe names have changed.
    """
    if not (output / _FILE).exists():
        raise OutputError(f"--resume {output}: no {_FILE} in it, so this is no study's folder")
    study = load_study(output / _FILE, {}, trials)
    known = output / _INPUTS
    if known.exists():
        check_inputs(json.loads(known.read_text(encoding="utf-8")), input_files(study.base()), f"--resume {output}")
    (output / _FILE).write_text(yaml.safe_dump(study.to_dict(), sort_keys=False), encoding="utf-8")
    return study


def study_wall_s(output: Path) -> float:
    """Seconds that a study has taken so far, over all attempts that ended by themselves."""
    path = output / _WALL
    return float(json.loads(path.read_text(encoding="utf-8"))["wall_s"]) if path.exists() else 0.0


def _trial_bundles(config: RunConfig, share: Mapping[str, float]) -> list[dict[str, float]]:
    """The bundles of a trial's placement group: its own process first, then its clients' actors, then all others.

    Args:
        share: of the cluster, for one trial.

    Raises:
        PlacementError: the share is too small for the recipe's actors.
    """
    if config.runtime.backend == "in_process":
        return [{"CPU": float(config.runtime.threads)}]
    fleet = draw_fleet(config.fleet, config.data.clients, config.seed)
    slots = plan_slots(config.runtime, config.fleet, fleet, config.cohort_size, dict(share), spare(config))
    bundles: list[dict[str, float]] = [{}, *(dict(slot.bundle) for slot in slots)]  # who waits for clients needs no CPU
    if server_gpus(config) > 0:
        bundles.append({"GPU": server_gpus(config)})
    if config.generator is not None:
        pool = config.generator.pool
        need = {"CPU": pool.cpus, "GPU": pool.gpus}
        need = {name: amount for name, amount in need.items() if amount > 0}
        bundles += [dict(need) for _ in range(pool.actors)] if need else []
    return bundles


def _bundles_that_fit(study: Study) -> list[dict[str, float]]:
    """The bundles of one of ``concurrency`` trials.

    Raises:
        PlacementError: the cluster does not hold them.
    """
    if study.objective == "plan":
        return [{"CPU": 1.0}]
    cluster = ray.cluster_resources()
    share = {name: amount / study.concurrency for name, amount in cluster.items()}
    base = study.base()
    try:
        bundles = _trial_bundles(base, share)
    except PlacementError as error:
        found = ", ".join(f"{name} {cluster[name]:g}" for name in ("CPU", "GPU", "bandwidth") if name in cluster)
        raise PlacementError(
            f"concurrency is {study.concurrency}, but the cluster ({found}) does not hold so many trials at once; "
            f"lower concurrency. A trial's share of it is too small: {error}"
        ) from error
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    fitting = trials_that_fit(bundles, nodes, study.concurrency)
    if fitting < study.concurrency:
        raise PlacementError(
            f"concurrency is {study.concurrency}, but the cluster holds {fitting} trials of {bundles} at once; lower "
            "concurrency, or runtime.num_actors and runtime.threads of the recipe"
        )
    return bundles


def run_study(study: Study, output: Path, progress: Progress) -> list[Trial]:
    """Run the trials that the folder lacks; all of them.

    Raises:
        PlacementError: the cluster can't hold the trials that the study wants at a time.
        FlRayError: no trial came to its end.
    """
    began, before = time.monotonic(), study_wall_s(output)
    base = study.base()
    if study.objective == "run":
        check(base)
    connection = Connection(base.ray)
    try:
        connection.wait()
        nodes = sum(node["Alive"] for node in ray.nodes())
        if is_temporary(output) and nodes > 1:
            raise PlacementError(
                f"--output is an address, which one node mirrors, but a study's trials run on all {nodes} nodes of the "
                "cluster; give a folder that all of them see"
            )
        bundles = _bundles_that_fit(study)
        journal = journal_of(study, output)
        ended = [trial for trial in journal.get_trials(deepcopy=False) if trial.state.is_finished()]
        left = study.trials - len(ended)
        if study.algorithm.name == "grid":
            candidates = study.search_space().grid()
            for candidate in candidates[: study.trials]:  # more of them than at first, where --trials says so
                journal.enqueue_trial(candidate, skip_if_exists=True)
            left = min(study.trials, len(candidates)) - len(ended)
        if left > 0:
            tracks = base.tracking.enabled and study.objective == "run"
            watcher = _Watcher(study, output, progress, len(ended), len(ended) + left, base)
            make: Any
            if study.objective == "plan":
                make = partial(PlanObjective, study, output)
            else:
                make = partial(RunObjective, study, output, begin_study_run(study, output) if tracks else None)
            run_trials(
                make,
                journal,
                study.search_space(),
                study.metric,
                study.make_scheduler(base),
                left,
                study.concurrency,
                bundles,
                output,
                watcher,
            )
            done = sum(trial.state.is_finished() for trial in journal.get_trials(deepcopy=False))
            if done < len(ended) + left:
                raise KeyboardInterrupt  # Ray Tune has caught it, and ended its trials
    finally:
        progress.stop()
        write_json(output / _WALL, {"wall_s": before + time.monotonic() - began})
        if base.tracking.enabled:
            for trial in all_trials(output):
                if trial.state == "running":
                    end_runs_of(output, tracking_uri(base), trial.number)
        connection.close()
    trials = all_trials(output)
    if not any(trial.state == "finished" for trial in trials):
        first = next((trial.error for trial in trials if trial.error), _UNSEEN)
        raise FlRayError(f"study {study.name}: none of {len(trials)} trials came to its end; the first: {first}")
    return trials


class _Watcher:
    """Tells of trials as they end, and takes care of those that died."""

    def __init__(
        self, study: Study, output: Path, progress: Progress, ended: int, trials: int, base: RunConfig
    ) -> None:
        self.study, self.output, self.progress, self.count, self.trials = study, output, progress, ended, trials
        self.uri = tracking_uri(base) if base.tracking.enabled else None
        self._finished: set[int] = set()

    def result(self, number: int, result: Mapping[str, Any]) -> None:
        """After a round of a trial."""
        if result.get(FINISHED):
            self._finished.add(number)
            return
        found = ", ".join(f"{name} {shown(result.get(name))}" for name in self.study.metric)
        detail = f"trial {number} after {result['step']} rounds: {found}"
        self.progress.steps("trials", self.count, self.trials, detail)

    def died(self, number: int) -> None:
        """A trial's process, or its node, is gone."""
        self.progress.message(f"trial {number}: its process died; it goes on elsewhere, after its last checkpoint")

    def ended(self, number: int, error: str | None) -> None:
        """A trial finished, was pruned, or failed."""
        trial = Trial.read(self.output, number)
        if error is not None:
            trial = trial or Trial(number, {})
            trial.state, trial.error = "failed", trial.error or error.splitlines()[-1]
            trial.write(self.output)
            (trial_folder(self.output, number) / "error.txt").write_text(error, encoding="utf-8")
            if self.uri is not None and self.study.objective == "run":
                end_runs_of(self.output, self.uri, number)
        self.count += 1
        if trial is None:
            self.progress.message(f"trial {number} left nothing in {self.output}: {_UNSEEN}")
            return
        state = "finished" if number in self._finished else "pruned"  # the trial itself may not have written it yet
        state = state if error is None else f"failed: {trial.error}"
        found = ", ".join(f"{name} {shown(trial.metrics.get(name))}" for name in self.study.metric)
        params = ", ".join(f"{name} {shown(value)}" for name, value in trial.params.items())
        if len(params) > 100:
            params = f"{params[:97]}..."
        if trial.tracking_error is not None:
            found += f"; its end is not in MLflow: {trial.tracking_error}"
        self.progress.message(f"{self.count}/{self.trials} trial {number} ({params}) {state}, {found}")
