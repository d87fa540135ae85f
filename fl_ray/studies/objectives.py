"""What a trial does, in its own process: runs of a recipe, one for each seed, or a plan."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from fl_ray.comparison import goes_on
from fl_ray.config import RunConfig
from fl_ray.errors import FlRayError
from fl_ray.run_folder import RunFolder
from fl_ray.runtime.start import OpenRuntimes
from fl_ray.studies.metrics import mean_metrics, measure, missed
from fl_ray.studies.settings import Study
from fl_ray.studies.tracking import PARENT, TrialRun
from fl_ray.studies.trials import Trial, all_trials, trial_folder, twin_of
from tuning.search import STEP
from tuning.tune_study import Steps

__all__ = ["PlanObjective", "RunObjective"]


class RunObjective:
    """The recipe with the trial's settings, seed after seed; a run that was cut goes on at its checkpoint.

    Args:
        study, output: the study and its folder.
        parent: the study's MLflow run; None: it is not tracked.
    """

    def __init__(self, study: Study, output: Path, parent: str | None) -> None:
        self.study, self.output, self.parent = study, output, parent
        self._runtimes = OpenRuntimes()

    def begin(self, number: int, params: Mapping[str, Any]) -> Steps:
        """After each round the metrics so far: of the seeds that are done, and of the one at work."""
        trial = Trial.read(self.output, number) or Trial(number, dict(params))
        trial.state, trial.error, earlier, began = "running", None, trial.wall_s, time.perf_counter()
        # Steps that are done again must say what they said before.
        trial.metrics, trial.by_seed, trial.missed = {}, {}, {}
        trial.write(self.output)
        tracked: TrialRun | None = None
        try:
            config = self.study.config(params)
            if self.parent is not None:
                tracked = TrialRun(config, self.study, trial, self.parent)
                trial.mlflow_run = tracked.run_id
                trial.write(self.output)
            for place, seed in enumerate(self.study.seeds):
                before = place * config.rounds
                for history in self._rounds(replace(config, seed=seed), trial):
                    trial.by_seed[str(seed)] = measure(history, config)
                    trial.metrics = mean_metrics(list(trial.by_seed.values()))
                    trial.missed[str(seed)] = missed(history, config)
                    yield {**trial.metrics, STEP: before + len(history)}
            trial.state = "finished"
        except GeneratorExit:
            trial.state = "pruned"
            raise
        except FlRayError as error:
            trial.error = str(error)
            raise
        finally:
            if trial.state == "running":
                trial.state = "failed"
            trial.wall_s = earlier + time.perf_counter() - began
            trial.write(self.output)
            if tracked is not None:
                trial.tracking_error = tracked.end(trial)
                if trial.tracking_error is not None:
                    trial.write(self.output)
        return {**trial.metrics, STEP: config.rounds * len(self.study.seeds)}

    def _rounds(self, config: RunConfig, trial: Trial) -> Iterator[list[dict[str, Any]]]:
        """A run's history after each of its rounds."""
        from fl_ray.experiment import Experiment

        folder = trial_folder(self.output, trial.number) / f"seed{config.seed}"
        twin = twin_of(trial, all_trials(self.output))
        done = folder if twin is None else trial_folder(self.output, twin.number) / folder.name
        if RunFolder(done).finished():
            yield RunFolder(done).history()
            return
        label = f"trial-{trial.number:04d}"
        tags = {"study": self.study.name, "trial": str(trial.number), "label": label}
        if trial.mlflow_run is not None:
            tags[PARENT] = trial.mlflow_run
        resume = goes_on(folder, config)
        experiment = Experiment(config, folder, self._runtimes.of(config), label=label, tags=tags, resume=resume)
        with closing(experiment.steps()) as steps:
            for _ in steps:
                yield RunFolder(folder).history()

    def close(self) -> None:
        """End the clients' actors."""
        self._runtimes.close()


class PlanObjective:
    """The energy of FIMI's plan with the trial's time splits, as ``allocation.search`` sees it.

    Args:
        study, output: the study and its folder.
    """

    def __init__(self, study: Study, output: Path) -> None:
        from fl_ray.planning import recipe_cell

        self.output = output
        self.cell = recipe_cell(study.base())

    def begin(self, number: int, params: Mapping[str, Any]) -> Steps:
        """No steps; the energy [J], for splits that break a limit more than any plan's."""
        import numpy as np

        from fl_ray.allocation.search import Evaluator

        began = time.perf_counter()
        rho = np.array([params[f"rho{device}"] for device in range(self.cell.devices)])
        metrics = {"energy_j": Evaluator(self.cell, 1).one(rho)}
        Trial(number, dict(params), "finished", metrics, wall_s=time.perf_counter() - began).write(self.output)
        return {**metrics, STEP: 1}
        yield {}  # a generator without steps

    def close(self) -> None:
        """Nothing was kept."""
