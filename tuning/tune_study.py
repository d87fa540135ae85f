"""A study by Ray Tune: trials as actors in placement groups of their own, stopped early by a scheduler."""

from __future__ import annotations

import inspect
import math
import os
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import optuna
from ray import tune
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, MedianStoppingRule, TrialScheduler

from tuning.search import ERROR, FINISHED, NUMBER, STEP, StudySearch
from tuning.space import SearchSpace

__all__ = ["Objective", "SchedulerName", "Steps", "TrialWatcher", "make_scheduler", "run_trials", "trials_that_fit"]

SchedulerName = Literal["asha", "median", "none"]
Steps = Generator[dict[str, float], None, dict[str, float]]
"""Yields what is known after each step, all metrics and STEP among it, and returns the last word."""
_DEATHS = 3  # of a trial's process, as with its node: so often it is begun again


class Objective(Protocol):
    """What a trial does. One lives in each trial's process, for one trial after another."""

    def begin(self, number: int, params: Mapping[str, Any]) -> Steps:
        """The trial's steps; closing them ends the trial there. Called again for a trial whose process died."""

    def close(self) -> None:
        """Let go of what was kept between trials."""


class TrialWatcher(Protocol):
    """Hears of trials, in the study's process."""

    def result(self, number: int, result: Mapping[str, Any]) -> None:
        """After a step."""

    def died(self, number: int) -> None:
        """The trial's process died; it is begun again."""

    def ended(self, number: int, error: str | None) -> None:
        """The trial is over; ``error``: it failed, with this traceback."""


class _Trial(tune.Trainable):
    """A trial's process. The next trial has the same one: imports and actors are there already."""

    def setup(self, config: dict[str, Any], make: Callable[[], Objective], metrics: Sequence[str]) -> None:
        self._make, self._metrics = make, metrics
        self._objective = make()
        self._begin(config)

    def _begin(self, config: dict[str, Any]) -> None:
        self._steps = self._objective.begin(config[NUMBER], config["params"])
        self._last = {**dict.fromkeys(self._metrics, math.nan), STEP: 0}

    def step(self) -> dict[str, Any]:
        try:
            self._last = next(self._steps)
        except StopIteration as end:
            return {**self._last, **end.value, FINISHED: True, "done": True}
        except Exception:  # noqa: BLE001 - told by the study. Raised, Ray would try it again as after a death
            self._objective.close()
            self._objective = self._make()
            return {**self._last, ERROR: traceback.format_exc(), "done": True}
        return {**self._last, FINISHED: False}

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        self._steps.close()
        self._begin(new_config)
        return True

    def cleanup(self) -> None:
        self._steps.close()
        self._objective.close()


class _Hears(tune.Callback):
    def __init__(self, watcher: TrialWatcher) -> None:
        self.watcher = watcher

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Ray Tune writes itself down with its callbacks; a study goes on from its journal instead

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        self.watcher.result(trial.config[NUMBER], result)

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watcher.ended(trial.config[NUMBER], trial.last_result.get(ERROR))

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self.watcher.died(trial.config[NUMBER])

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        said = Path(trial.error_file).read_text(encoding="utf-8").strip() if trial.error_file else ""
        self.watcher.ended(trial.config[NUMBER], said or "its process died")


def make_scheduler(
    name: SchedulerName, settings: Mapping[str, Any], metric: str, mode: str, steps: int
) -> TrialScheduler:
    """What stops trials early: ``asha``, ``median`` (of the others so far) or ``none``.

    Args:
        settings: keyword arguments of Ray's scheduler.
        metric, mode: that trials are compared by.
        steps: of a whole trial.

    Raises:
        ValueError: an unknown name or setting.
    """
    if name == "none":
        if settings:
            raise ValueError(f"scheduler none has no settings, but {', '.join(settings)} is given")
        return FIFOScheduler()
    kinds = {"asha": ASHAScheduler, "median": MedianStoppingRule}
    if name not in kinds:
        raise ValueError(f"scheduler is {name}, but it must be one of asha, median, none")
    given: dict[str, Any] = {"time_attr": STEP, "metric": metric, "mode": mode}
    if name == "asha":  # a trial of all its steps ends by itself, with its last word: that must not be cut off
        given["max_t"] = steps + 2
    known = sorted(set(inspect.signature(kinds[name]).parameters) - set(given))
    unknown = sorted(set(settings) - set(known))
    if unknown:
        raise ValueError(f"scheduler {name}: unknown setting {unknown[0]}. Known: {', '.join(known)}")
    try:
        return kinds[name](**given, **settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"scheduler {name}: {error}") from error


def trials_that_fit(bundles: Sequence[Mapping[str, float]], nodes: Sequence[Mapping[str, float]], most: int) -> int:
    """How many trials' bundles the nodes hold at once, up to ``most``: each bundle on one node, first fit."""
    left = [dict(node) for node in nodes]
    for count in range(most):
        for bundle in sorted(bundles, key=lambda bundle: -sum(bundle.values())):
            fitting = (n for n in left if all(n.get(key, 0.0) >= need - 1e-9 for key, need in bundle.items()))
            node = next(fitting, None)
            if node is None:
                return count
            for key, need in bundle.items():
                node[key] = node.get(key, 0.0) - need
    return most


def run_trials(
    make: Callable[[], Objective],
    study: optuna.Study,
    space: SearchSpace,
    metrics: Sequence[str],
    scheduler: TrialScheduler,
    trials: int,
    concurrency: int,
    bundles: Sequence[Mapping[str, float]],
    folder: Path,
    watcher: TrialWatcher,
) -> None:
    """Run so many trials, ``concurrency`` at a time; Ray is connected. A trial that fails does not stop the others.

    A trial whose process dies, as with its node, is begun again elsewhere, three times at most.

    Args:
        make: the objective, called in each trial's process.
        study: which trials there have been; those that were cut are begun again first, and count.
        bundles: of a trial's placement group; its process is in the first, and all actors that it starts are in it.
        folder: for Ray Tune's own files.
    """
    # Each by Ray's documented variable: no change of the working folder, no loggers of Ray's choice.
    os.environ.update(RAY_CHDIR_TO_TRIAL_DIR="0", TUNE_DISABLE_AUTO_CALLBACK_LOGGERS="1", RAY_AIR_NEW_OUTPUT="0")
    os.environ["TUNE_PRINT_ALL_TRIAL_ERRORS"] = "0"
    group = tune.PlacementGroupFactory([dict(bundle) for bundle in bundles])
    trainable = tune.with_resources(tune.with_parameters(_Trial, make=make, metrics=metrics), group)
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            search_alg=StudySearch(study, space, metrics),
            scheduler=scheduler,
            num_samples=trials,
            max_concurrent_trials=concurrency,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: f"{trial.config[NUMBER]:04d}-{trial.trial_id}",
        ),
        run_config=tune.RunConfig(
            name="ray_tune",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_Hears(watcher)],
            failure_config=tune.FailureConfig(max_failures=_DEATHS),
            checkpoint_config=tune.CheckpointConfig(checkpoint_frequency=0, checkpoint_at_end=False),
        ),
    )
    tuner.fit()
