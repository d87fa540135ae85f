"""The cross-entropy method for continuous minimisation, as ask and tell (de Boer et al., Ann. Oper. Res. 134, 2005)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

__all__ = ["CrossEntropy"]


@dataclass
class CrossEntropy:
    """A Gaussian per coordinate, refitted to the elite of each population.

    Args:
        dimensions: of a candidate.
        mean, std: of the first population, for every coordinate.
        low, high: candidates are clipped to it.
        population, elite: candidates asked for, and how many of them the next Gaussian is fitted to.
        smoothing: share of the old mean and deviation that is kept; 0: none.
        tolerance: ``done`` once the largest deviation is below it.
        seed: of the draws.

    Raises:
        ValueError: the elite does not fit into the population, or the bounds are in the wrong order.
    """

    dimensions: int
    mean: float = 0.5
    std: float = 0.15
    low: float = 0.03
    high: float = 0.97
    population: int = 100
    elite: int = 10
    smoothing: float = 0.0
    tolerance: float = 1e-3
    seed: int = 0
    center: np.ndarray = field(init=False)
    spread: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        if not 2 <= self.elite <= self.population:
            raise ValueError(f"elite is {self.elite}, but it must be in 2..population ({self.population})")
        if not self.low < self.high:
            raise ValueError(f"low is {self.low} and high {self.high}, but low must be below high")
        if not 0 <= self.smoothing < 1:
            raise ValueError(f"smoothing is {self.smoothing}, but it must be in [0, 1)")
        self.center = np.full(self.dimensions, self.mean)
        self.spread = np.full(self.dimensions, self.std)
        self._rng = np.random.default_rng(self.seed)
        self._asked: np.ndarray | None = None

    @property
    def done(self) -> bool:
        """Whether the Gaussian has become narrow."""
        return float(self.spread.max()) < self.tolerance

    def ask(self) -> np.ndarray:
        """The next candidates, float64 [population, dimensions]."""
        drawn = self._rng.normal(self.center, self.spread, (self.population, self.dimensions))
        self._asked = drawn.clip(self.low, self.high)
        return self._asked

    def tell(self, values: np.ndarray, violations: np.ndarray | None = None) -> None:
        """Refit to the elite of the candidates last asked for.

        Args:
            values: objective of each candidate [population]; smaller is better.
            violations: total constraint violation of each, 0 where it is feasible. Feasible candidates come first, by
                value; the others by violation.
        """
        if self._asked is None:
            raise ValueError("tell comes after ask")
        self.refit(self._asked, values, violations)
        self._asked = None

    def refit(self, candidates: np.ndarray, values: np.ndarray, violations: np.ndarray | None = None) -> None:
        """As ``tell``, for candidates [at least elite, dimensions] that somebody else drew from this Gaussian."""
        broken = np.zeros(len(candidates)) if violations is None else np.asarray(violations, dtype=float)
        keys = np.where(broken > 0, 0.0, np.nan_to_num(values, nan=np.inf))
        best = candidates[np.lexsort((keys, broken))[: self.elite]]
        keep = self.smoothing
        self.center = keep * self.center + (1 - keep) * best.mean(axis=0)
        self.spread = keep * self.spread + (1 - keep) * best.std(axis=0)
