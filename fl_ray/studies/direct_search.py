"""A search of FIMI's time splits by Ray Tune beside the same search in one process: what each costs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from fl_ray.allocation.dual import solve_dual
from fl_ray.allocation.search import search
from fl_ray.planning import recipe_cell
from fl_ray.studies.settings import Study
from fl_ray.studies.trials import Trial

__all__ = ["direct_searches"]

_DIRECT = {"cross_entropy": "ce", "tpe": "tpe", "cmaes": "cmaes", "gp": "gp", "random": "random", "nsga2": "nsga2"}
_SHARED = ("population", "elite", "std", "smoothing")  # settings that the study's cross-entropy search has, too


def direct_searches(study: Study, trials: Sequence[Trial], wall_s: float) -> tuple[list[str], list[list[str]]]:
    """Columns and rows: the study, the same algorithm in ``allocation.search`` with as many candidates, and the dual.

    The gap is the energy above the dual's bound, relative to it.

    Args:
        wall_s: seconds of the study.
    """
    config = study.base()
    cell = recipe_cell(config)
    began = time.perf_counter()
    bound = solve_dual(cell).lower_bound_j
    dual_s = time.perf_counter() - began
    finished = [trial for trial in trials if trial.state == "finished"]
    best = min(trial.metrics["energy_j"] for trial in finished)
    rows = [[f"{study.algorithm.name}, by Ray Tune", str(len(finished)), _gap(best, bound), f"{wall_s:.1f}"]]
    name = _DIRECT.get(study.algorithm.name)
    if name is not None:
        same = {key: value for key, value in study.algorithm.settings.items() if key in _SHARED}
        settings = replace(config.allocation, evaluations=len(finished), feasible_start=False, **same)
        began = time.perf_counter()
        found = search(cell, name, settings, study.seed)
        seconds = f"{time.perf_counter() - began:.3f}"
        rows.append([f"{name}, in one process", str(len(finished)), _gap(found.best_j, bound), seconds])
    rows.append(["dual, exact", "–", _gap(bound, bound), f"{dual_s:.3f}"])
    return ["search", "candidates", "gap", "seconds"], rows


def _gap(energy_j: float, bound_j: float) -> str:
    return f"{energy_j / bound_j - 1:.2%}"
