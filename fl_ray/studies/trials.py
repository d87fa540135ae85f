"""What a trial leaves in its folder, for the study's tables and for going on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fl_ray.run_folder import write_json

__all__ = ["Trial", "all_trials", "best_trials", "finished_trials", "shown", "trial_folder", "twin_of"]

State = Literal["running", "finished", "pruned", "failed"]
_FILE = "trial.json"


@dataclass
class Trial:
    """A trial: what was chosen, how far it came, and its metrics.

    Attributes:
        metrics: means over the seeds so far.
        by_seed: the metrics of each seed.
        missed: of each seed, the metrics of targets that it did not reach; see ``fl_ray.studies.metrics.measure``.
        wall_s: seconds, over all its attempts.
        error: why it failed.
        mlflow_run: its run in the tracking store.
        tracking_error: what kept the store from hearing of its end.
    """

    number: int
    params: dict[str, Any]
    state: State = "running"
    metrics: dict[str, float] = field(default_factory=dict)
    by_seed: dict[str, dict[str, float]] = field(default_factory=dict)
    missed: dict[str, list[str]] = field(default_factory=dict)
    wall_s: float = 0.0
    error: str | None = None
    mlflow_run: str | None = None
    tracking_error: str | None = None

    def misses(self, name: str) -> int:
        """How many seeds did not reach the target of a metric."""
        return sum(name in names for names in self.missed.values())

    def reached(self) -> dict[str, float]:
        """The metrics but for those of targets that a seed did not reach."""
        return {name: value for name, value in self.metrics.items() if not self.misses(name)}

    def write(self, study: Path) -> None:
        """Into its folder of the study's."""
        folder = trial_folder(study, self.number)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _FILE, asdict(self))

    @classmethod
    def read(cls, study: Path, number: int) -> Trial | None:
        """From its folder, or None where it has not begun."""
        path = trial_folder(study, number) / _FILE
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def trial_folder(study: Path, number: int) -> Path:
    """Where a study keeps a trial."""
    return study / "trials" / f"{number:04d}"


def all_trials(study: Path) -> list[Trial]:
    """Every trial that has begun, by number."""
    numbers = sorted(int(path.parent.name) for path in (study / "trials").glob(f"*/{_FILE}"))
    return [trial for number in numbers if (trial := Trial.read(study, number)) is not None]


def twin_of(trial: Trial, trials: Sequence[Trial]) -> Trial | None:
    """The first finished trial of the same settings: samplers propose some again, to the same result."""
    same = (other for other in trials if other.number != trial.number and other.params == trial.params)
    return next((other for other in same if other.state == "finished"), None)


def finished_trials(metrics: Sequence[str], trials: Sequence[Trial]) -> list[Trial]:
    """Those that came to their end with a number for each metric: a diverged model has no loss."""
    whole = [trial for trial in trials if trial.state == "finished"]
    return [trial for trial in whole if all(trial.metrics.get(name) is not None for name in metrics)]


def best_trials(modes: Sequence[str], metrics: Sequence[str], trials: Sequence[Trial]) -> list[Trial]:
    """The best finished trial; for several metrics the Pareto front, by the first of them."""
    finished = finished_trials(metrics, trials)
    signs = [1 if mode == "min" else -1 for mode in modes]

    def place(trial: Trial) -> list[float]:
        return [sign * trial.metrics[name] for sign, name in zip(signs, metrics, strict=True)]

    def dominated(trial: Trial) -> bool:
        own = place(trial)
        return any(
            all(x <= y for x, y in zip(place(other), own, strict=True)) and place(other) != own for other in finished
        )

    front = sorted((trial for trial in finished if not dominated(trial)), key=place)
    return front if len(metrics) > 1 else front[:1]


def shown(value: Any) -> str:
    """A setting's or a metric's value in tables; a dash where there is none."""
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
