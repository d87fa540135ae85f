"""Outer searches beside each other over random cells: how near each comes to the dual bound, and how fast."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fl_ray.allocation.cell import Cell
from fl_ray.allocation.plan import cell_to_plan, make_plan
from fl_ray.allocation.search import search
from fl_ray.allocation.settings import AllocationConfig
from fl_ray.comparison import result_settings
from fl_ray.config import RunConfig
from fl_ray.errors import InfeasibleError, OutputError, SettingError
from fl_ray.planning import recipe_cell
from fl_ray.progress import Progress
from fl_ray.run_folder import new_folder, write_json

__all__ = ["SearchComparison", "SearchRun", "compare_searches"]


@dataclass(frozen=True)
class SearchRun:
    """One search on one cell.

    Attributes:
        given, looked_at: candidates that it was given, and that it took until it was done with them or converged.
        steps: (candidate, gap) wherever a better plan was found; gap: (energy - bound) / bound, with the dual's bound.
        seconds: of the whole search.
    """

    search: str
    seed: int
    given: int
    looked_at: int
    steps: tuple[tuple[int, float], ...]
    seconds: float

    def gap_at(self, candidates: int) -> float:
        """Gap of the best plan among the first so many candidates; inf: there was none."""
        return min((gap for number, gap in self.steps if number <= candidates), default=np.inf)

    def gaps(self) -> np.ndarray:
        """The same after each candidate, [looked_at]."""
        found = np.full(self.looked_at, np.inf)
        for number, gap in self.steps:
            found[number - 1 :] = gap
        return found


@dataclass(frozen=True)
class SearchComparison:
    """All runs by search, in the order of ``allocation.compare``, and by seed why a cell has no plan."""

    runs: dict[str, list[SearchRun]]
    infeasible: dict[int, str]


def compare_searches(config: RunConfig, seeds: Sequence[int], output: Path, progress: Progress) -> SearchComparison:
    """Try each search of ``allocation.compare`` on the recipe's cell of each seed.

    What is found lies under ``output/cells``, a file for each seed and search: cut anywhere, the same call goes on.

    Raises:
        SettingError: a seed stands twice.
        OutputError: ``output`` holds a comparison with other settings.
        InfeasibleError: no cell has a plan.
    """
    if len(set(seeds)) != len(seeds):
        raise SettingError(f"--seeds {' '.join(map(str, seeds))}: give each seed once")
    import optuna  # noqa: F401  before the clock runs: no search pays for its import

    given = config.allocation.compared()
    _claim(config, output)
    runs: dict[str, list[SearchRun]] = {name: [] for name in given}
    infeasible: dict[int, str] = {}
    for done, seed in enumerate(seeds):
        at = _CellOfSeed(replace(config, seed=seed), output / "cells")
        bound = at.bound()
        if bound["reason"] is not None:
            infeasible[seed] = bound["reason"]
            progress.message(f"seed {seed} is left out: {bound['reason']}")
            continue
        for number, (name, candidates) in enumerate(given.items()):
            progress.steps("cell", done, len(seeds), f"seed {seed}, {name} ({number + 1} of {len(given)})")
            runs[name].append(_exact(seed, bound) if name == "dual" else at.run(name, candidates, bound["bound_j"]))
    progress.steps("cell", len(seeds), len(seeds))
    if len(infeasible) == len(seeds):
        raise InfeasibleError(f"no cell has a plan; seed {seeds[0]}: {infeasible[seeds[0]]}")
    return SearchComparison(runs, infeasible)


class _CellOfSeed:
    """A seed's cell, made when it is needed, and what was found on it before."""

    def __init__(self, config: RunConfig, folder: Path) -> None:
        self.config, self.folder = config, folder
        self._cell: Cell | None = None

    @property
    def cell(self) -> Cell:
        if self._cell is None:
            self._cell = cell_to_plan(recipe_cell(self.config), self.config.allocation)
        return self._cell

    def _path(self, name: str) -> Path:
        return self.folder / f"seed{self.config.seed}-{name}.json"

    def bound(self) -> dict[str, Any]:
        """The dual's bound, or the reason why there is no plan."""
        path = self._path("dual")
        if not path.exists():
            write_json(path, _bound(self.cell))
        return json.loads(path.read_text(encoding="utf-8"))

    def run(self, name: str, candidates: int, bound_j: float) -> SearchRun:
        """A search with so many candidates. Found with another number before, it is done again."""
        path, seed = self._path(name), self.config.seed
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        if found is None or found["given"] != candidates:
            settings = replace(self.config.allocation, evaluations=candidates)
            cell = self.cell
            start = time.perf_counter()
            history = np.array(search(cell, name, settings, seed).history_j)
            seconds = time.perf_counter() - start
            better = np.flatnonzero(history < np.concatenate([[np.inf], history[:-1]]))
            steps = [[int(place) + 1, float(history[place])] for place in better]
            found = {"given": candidates, "looked_at": len(history), "energies_j": steps, "seconds": seconds}
            write_json(path, found)
        steps = tuple((number, max(0.0, energy / bound_j - 1)) for number, energy in found["energies_j"])
        return SearchRun(name, seed, candidates, found["looked_at"], steps, found["seconds"])


def _bound(cell: Cell) -> dict[str, Any]:
    start = time.perf_counter()
    try:
        plan = make_plan(cell, AllocationConfig())
    except InfeasibleError as error:
        return {"reason": str(error)}
    seconds = time.perf_counter() - start
    return {"reason": None, "bound_j": plan.lower_bound_j, "energy_j": plan.energy_j, "seconds": seconds}


def _exact(seed: int, bound: dict[str, Any]) -> SearchRun:
    gap = max(0.0, bound["energy_j"] / bound["bound_j"] - 1)
    return SearchRun("dual", seed, 0, 0, ((0, gap),), bound["seconds"])


def _claim(config: RunConfig, output: Path) -> None:
    """Refuse a folder of other settings; which searches, their candidates and the seeds may change."""
    marker, settings = output / "searches.yaml", result_settings(config)
    for key in ("compare", "evaluations", "search"):
        settings["allocation"].pop(key)
    settings = yaml.safe_load(yaml.safe_dump(settings, sort_keys=False))
    if not marker.exists():
        new_folder(output)
        (output / "cells").mkdir()
        marker.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    elif yaml.safe_load(marker.read_text(encoding="utf-8")) != settings:
        raise OutputError(
            f"--output {output}: it holds searches with other settings, and nothing is overwritten; name another folder"
        )
