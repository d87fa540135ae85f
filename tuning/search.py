"""Ray Tune's view of an Optuna study: which candidate is next, and what became of it.

Ray has a wrapper of its own, ``OptunaSearch``. It keeps which trial is which in a pickle that is written now and then,
so that a killed study forgets trials; here the study lies in Optuna's journal, which has every step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from ray.tune.search import Searcher

from tuning.space import SearchSpace

__all__ = ["ERROR", "FINISHED", "NUMBER", "STEP", "StudySearch", "open_study"]

NUMBER = "number"  # of the trial, in its configuration
STEP = "step"  # of a trial's result
FINISHED = "finished"  # in a trial's last result, where it came to its end
ERROR = "failure"  # in a trial's last result, where it failed: the traceback
_STUDY = "study"


def open_study(file: Path, directions: Sequence[str], sampler: optuna.samplers.BaseSampler | None) -> optuna.Study:
    """The study in a journal file, made where it is not there yet.

    Args:
        directions: ``minimize`` or ``maximize`` for each objective.
    """
    storage = JournalStorage(JournalFileBackend(str(file)))
    return optuna.create_study(
        storage=storage, sampler=sampler, study_name=_STUDY, directions=list(directions), load_if_exists=True
    )


class StudySearch(Searcher):
    """Candidates of an Optuna study for Ray Tune.

    Trials that the study holds as running when it is opened were cut: they come first, with their numbers.

    Args:
        study: see ``open_study``.
        space: of the candidates.
        metrics: a trial's results that are searched by.
    """

    def __init__(self, study: optuna.Study, space: SearchSpace, metrics: Sequence[str]) -> None:
        least = optuna.study.StudyDirection.MINIMIZE
        modes = ["min" if direction == least else "max" for direction in study.directions]
        super().__init__(metric=list(metrics), mode=modes)
        self.study, self.space, self.metrics = study, space, list(metrics)
        self._trials: dict[str, optuna.Trial] = {}
        cut = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        self._cut = [optuna.Trial(study, trial._trial_id) for trial in cut]

    def suggest(self, trial_id: str) -> dict[str, Any]:
        trial = self._cut.pop(0) if self._cut else self.study.ask()
        self._trials[trial_id] = trial
        return {"params": self.space.suggest(trial), NUMBER: trial.number}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        if len(self.metrics) == 1:  # what a pruned trial is ranked by
            trial, step, value = self._trials[trial_id], int(result[STEP]), result.get(self.metrics[0])
            # A trial that was cut does some steps again, to the same values.
            known = self.study.get_trials(deepcopy=False)[trial.number].intermediate_values
            if value is not None and not math.isnan(value) and step not in known:
                trial.report(value, step)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        trial = self._trials.pop(trial_id)
        result = result or {}
        values = [result.get(metric) for metric in self.metrics]
        if error or not result or ERROR in result:
            self.study.tell(trial, state=TrialState.FAIL)
        elif not result.get(FINISHED):
            self.study.tell(trial, state=TrialState.PRUNED)
        elif any(value is None or math.isnan(value) for value in values):
            self.study.tell(trial, state=TrialState.FAIL)
        else:
            self.study.tell(trial, values)

    def save(self, checkpoint_path: str) -> None:
        """An empty file: the journal has it all."""
        Path(checkpoint_path).touch()

    def restore(self, checkpoint_path: str) -> None:
        """Nothing: see ``save``."""
