"""Outer searches over the time splits rho: ``dual`` is exact, ``ce`` is FIMI's, the others are for comparison."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from fl_ray.allocation import inner
from fl_ray.allocation.cell import Cell
from fl_ray.allocation.dual import central_split, split_limits
from fl_ray.allocation.settings import AllocationConfig
from tuning.cross_entropy import CrossEntropy

__all__ = ["Evaluator", "search"]

LOW, HIGH = 0.03, 0.97


@dataclass
class Evaluator:
    """Candidates looked at, and the best of them so far.

    Attributes:
        best_rho: of the best feasible candidate; None: none was.
        history_j: the least energy after each evaluation, inf before the first feasible one.
    """

    cell: Cell
    limit: int
    best_rho: np.ndarray | None = None
    best_j: float = np.inf
    history_j: list[float] = field(default_factory=list)

    @property
    def spent(self) -> bool:
        return len(self.history_j) >= self.limit

    def many(self, rho: np.ndarray) -> inner.Evaluated:
        """Candidates [candidates, devices], solved in one batch; those beyond the limit are not counted."""
        found = inner.evaluate(self.cell, rho)
        for candidate, energy in zip(rho[: self.limit - len(self.history_j)], found.energy_j, strict=False):
            if energy < self.best_j:
                self.best_j, self.best_rho = float(energy), candidate.copy()
            self.history_j.append(self.best_j)
        return found

    def one(self, rho: np.ndarray) -> float:
        """Energy of a candidate [devices], for searches that know no constraints: an infeasible one is worse than any
        feasible one, and the worse the more it violates.
        """
        if self.spent:
            raise _SpentError
        found = self.many(np.asarray(rho, dtype=np.float64)[None])
        violation = float(found.violation[0])
        return float(found.energy_j[0]) if violation <= 0 else self._most_j * (1 + min(violation, 1e6))

    @cached_property
    def _most_j(self) -> float:
        """What no plan exceeds: the most samples at f_max, and p_max for all of Tmax."""
        cell = self.cell
        computing = cell.capacitance * cell.cycles * (cell.d_loc + cell.d_gen_max) * cell.f_max_hz**2
        return float((computing + cell.p_max_w * cell.t_max_s).sum())


_Method = Callable[[Evaluator, np.ndarray | None, AllocationConfig, int], None]


class _SpentError(Exception):
    """Ends a search of another package at the limit of its evaluations."""


def search(cell: Cell, name: str, settings: AllocationConfig, seed: int = 0) -> Evaluator:
    """Look for the least energy of a feasible cell.

    Args:
        name: one of ``fl_ray.allocation.settings.Search`` but ``dual``, which is ``solve_dual``.
        settings: how long to look and where to begin; what else is in them does not count.
        seed: of the draws.
    """
    start = feasible_start(cell) if settings.feasible_start else None
    evaluator = Evaluator(cell, settings.evaluations)
    with suppress(_SpentError):
        _RUN[name](evaluator, start, settings, seed)
    return evaluator


def feasible_start(cell: Cell) -> np.ndarray:
    """A feasible rho near the middle [devices]: 0.5 where that will do, else on the way from there to the
    ``central_split`` a little behind the first feasible point (feasible splits are a convex set).
    """
    middle, inside = np.full(cell.devices, 0.5), central_split(cell).clip(LOW, HIGH)
    if inner.evaluate(cell, middle).violation <= 0:
        return middle
    low, high = 0.0, 1.0
    while high - low > 1e-3:
        share = (low + high) / 2
        if inner.evaluate(cell, middle + share * (inside - middle)).violation <= 0:
            high = share
        else:
            low = share
    return middle + (high + 0.1 * (1 - high)) * (inside - middle)


def _cross_entropy(evaluator: Evaluator, start: np.ndarray | None, settings: AllocationConfig, seed: int) -> None:
    method = CrossEntropy(
        evaluator.cell.devices,
        std=settings.std,
        low=LOW,
        high=HIGH,
        population=settings.population,
        elite=settings.elite,
        smoothing=settings.smoothing,
        seed=seed,
    )
    if start is not None:
        method.center = start
        evaluator.many(start[None])
    while not (method.done or evaluator.spent):
        found = evaluator.many(method.ask())
        method.tell(found.energy_j, found.violation)


def gradient(cell: Cell, rho: np.ndarray, found: inner.Evaluated) -> np.ndarray:
    """d energy / d rho at feasible candidates [candidates, devices], by the envelope theorem: the multipliers of the
    inner problems price what a device's time changes for the others [J].
    """
    compute_s, upload_s = rho * cell.t_max_s, (1 - rho) * cell.t_max_s
    least = inner.least_bandwidth(cell, upload_s)
    computing, uplink = found.computing, found.uplink
    rise = inner.computing_slope(cell, computing.samples, compute_s, computing.multiplier)
    fall = inner.uplink_slope(cell, uplink.bandwidth_hz, upload_s, uplink.multiplier, least)
    return cell.t_max_s * (rise - fall)


def _gradient(evaluator: Evaluator, start: np.ndarray | None, settings: AllocationConfig, seed: int) -> None:
    """L-BFGS (ten pairs) with backtracking into the feasible set; the energy is convex in rho."""
    cell = evaluator.cell
    least, most = (limit.clip(LOW, HIGH) for limit in split_limits(cell))
    rho = np.full(cell.devices, 0.5) if start is None else start
    found = evaluator.many(rho[None])
    if not np.isfinite(found.energy_j[0]):
        return
    energy, slope = float(found.energy_j[0]), gradient(cell, rho[None], found)[0]
    pairs: list[tuple[np.ndarray, np.ndarray]] = []
    while not evaluator.spent:
        # A device that would leave its own limits stays where it is.
        pressed = ((rho <= least) & (slope > 0)) | ((rho >= most) & (slope < 0))
        direction = np.where(pressed, 0.0, -_two_loops(np.where(pressed, 0.0, slope), pairs))
        if not direction.any():
            return
        if not pairs:
            direction *= 0.02 / np.abs(direction).max()
        step, accepted = 1.0, False
        while not evaluator.spent and step > 1e-14:
            moved = (rho + step * direction).clip(least, most)
            found = evaluator.many(moved[None])
            if found.energy_j[0] <= energy + 1e-4 * slope @ (moved - rho):
                accepted = True
                break
            step /= 2
        if not accepted:
            if not pairs:
                return
            pairs.clear()
            continue
        steeper = gradient(cell, moved[None], found)[0]
        gained = energy - float(found.energy_j[0])
        if (moved - rho) @ (steeper - slope) > 0:
            pairs = [*pairs[-9:], (moved - rho, steeper - slope)]
        rho, energy, slope = moved, float(found.energy_j[0]), steeper
        if gained <= 1e-13 * energy:
            return


def _two_loops(slope: np.ndarray, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The inverse Hessian that the pairs (step, change of slope) tell of, times a slope (Nocedal's recursion)."""
    turned, weights = slope.copy(), []
    for step, change in reversed(pairs):
        weights.append(step @ turned / (step @ change))
        turned -= weights[-1] * change
    if pairs:
        step, change = pairs[-1]
        turned *= step @ change / (change @ change)
    for (step, change), weight in zip(pairs, reversed(weights), strict=True):
        turned += step * (weight - change @ turned / (step @ change))
    return turned


def _nelder_mead(evaluator: Evaluator, start: np.ndarray | None, settings: AllocationConfig, seed: int) -> None:
    from scipy.optimize import minimize

    devices = evaluator.cell.devices
    center = np.full(devices, 0.5) if start is None else start
    simplex = np.vstack([center, center + 0.05 * np.where(center > 0.5, -1, 1)[:, None] * np.eye(devices)])
    options = {
        "initial_simplex": simplex,
        "maxfev": settings.evaluations,
        "xatol": 1e-9,
        "fatol": 1e-12,
        "adaptive": True,
    }
    minimize(
        evaluator.one,
        center,
        method="Nelder-Mead",
        bounds=[(LOW, HIGH)] * devices,
        options=options,
    )


def _optuna(sampler: str) -> _Method:
    def run(evaluator: Evaluator, start: np.ndarray | None, settings: AllocationConfig, seed: int) -> None:
        import optuna

        makers = {
            "random": lambda: optuna.samplers.RandomSampler(seed=seed),
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed, multivariate=True),
            "cmaes": lambda: optuna.samplers.CmaEsSampler(seed=seed),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=10),
            "nsga2": lambda: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
        }
        devices = evaluator.cell.devices
        names = [f"rho{device}" for device in range(devices)]
        verbosity = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            study = optuna.create_study(sampler=makers[sampler]())
            if start is not None:
                study.enqueue_trial(dict(zip(names, start.tolist(), strict=True)))
            while not evaluator.spent:
                trial = study.ask()
                rho = np.array([trial.suggest_float(name, LOW, HIGH) for name in names])
                study.tell(trial, evaluator.one(rho))
        finally:
            optuna.logging.set_verbosity(verbosity)

    return run


_RUN: dict[str, _Method] = {
    "ce": _cross_entropy,
    "gradient": _gradient,
    "nelder_mead": _nelder_mead,
    **{name: _optuna(name) for name in ("random", "tpe", "cmaes", "gp", "nsga2")},
}
