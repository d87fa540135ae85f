"""What a study can search by, from the history of a run, whole or so far."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from fl_ray.config import RunConfig
from fl_ray.errors import SettingError
from fl_ray.registry import nearest
from fl_ray.summary import REACHED, outcome, target_key

__all__ = ["check_metric", "mean_metrics", "measure", "metric_names", "missed"]

_PLAIN = ("final_accuracy", "best_accuracy", "final_loss", "virtual_time_s", "energy_j", "bytes_up", "bytes_down")
_NEVER = 2.0  # a target that is not reached costs so many times what the whole run costs


def metric_names(config: RunConfig) -> list[str]:
    """All of them: those of every run, and rounds, virtual time and energy to each of its targets."""
    return [*_PLAIN, *(f"{name}_to_{target_key(target)}" for target in config.targets for name, _ in REACHED)]


def check_metric(name: str, config: RunConfig) -> None:
    """Refuse what a run of the recipe does not have."""
    if name not in metric_names(config):
        kind, to, target = name.partition("_to_")
        way = f" Add {target} to the recipe's targets." if to and kind in dict(REACHED) else ""
        raise SettingError(f"metric: unknown name {name!r}.{way}{nearest(name, metric_names(config))}")


def measure(history: Sequence[Mapping[str, Any]], config: RunConfig) -> dict[str, float]:
    """All metrics after these rounds.

    A search needs a number where a target was not reached: twice what the run would cost at its pace if it went on to
    its last round, which is worse than any run that does reach it.
    """
    found = outcome(history, config.targets)
    metrics = {name: math.nan if found[name] is None else float(found[name]) for name in _PLAIN}
    for target in config.targets:
        key = target_key(target)
        hit = found["targets"][key]
        for name, _ in REACHED:
            so_far = float(found[name])
            missed = _NEVER * so_far * config.rounds / max(1, len(history))
            metrics[f"{name}_to_{key}"] = missed if hit is None else float(hit[name])
    return metrics


def missed(history: Sequence[Mapping[str, Any]], config: RunConfig) -> list[str]:
    """The metrics of targets that these rounds have not reached, for which ``measure`` reckons."""
    found = outcome(history, config.targets)["targets"]
    keys = [target_key(target) for target in config.targets]
    return [f"{name}_to_{key}" for key in keys if found[key] is None for name, _ in REACHED]


def mean_metrics(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over seeds."""
    return {name: statistics.fmean(metrics[name] for metrics in each) for name in each[0]}
