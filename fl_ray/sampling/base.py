"""What a sampler is, and what samplers share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from fl_ray.context import RunContext
    from fl_ray.runtime.base import RoundResult
    from fl_ray.schedule import RoundPlan

__all__ = ["ClientSampler", "candidates", "weighted_draw"]


def candidates(run: RunContext, excluded: Collection[int] = ()) -> np.ndarray | None:
    """Clients that can be chosen now: available, and not excluded; None where that is everybody."""
    available = run.available()
    if available is None and not excluded:
        return None
    chosen = np.ones(run.config.data.clients, dtype=bool) if available is None else available.copy()
    chosen[list(excluded)] = False
    return np.flatnonzero(chosen)


def weighted_draw(rng: np.random.Generator, weights: np.ndarray, size: int) -> np.ndarray:
    """Up to ``size`` different places, ascending, drawn one after another with probability by ``weights`` [n].

    Places of weight 0 are never drawn. The first to ring of exponential clocks with these rates has this distribution
    (Efraimidis and Spirakis 2006), at one draw per place, so a million cost milliseconds.
    """
    positive = np.flatnonzero(weights > 0)
    if size >= len(positive):
        return positive
    rings = rng.standard_exponential(len(positive)) / weights[positive]
    return np.sort(positive[np.argpartition(rings, size)[:size]])


class ClientSampler(ABC):
    """Constructor arguments are settings of ``sampling``.

    Attributes:
        equal_shares: the chosen clients' updates count alike, because the choice already favours large ones; else by
            their samples.
    """

    equal_shares: bool = False

    @abstractmethod
    def choose(
        self, run: RunContext, turn: int, size: int, weights: np.ndarray, excluded: Collection[int] = ()
    ) -> np.ndarray:
        """Up to ``size`` different clients, ascending; draws have the key (seed, "cohort", turn).

        Args:
            turn: the round; in an asynchronous run, the number of the choice.
            weights: the global model that they will start from.
        """

    def observe(self, run: RunContext, round_number: int, plan: RoundPlan, result: RoundResult) -> None:
        """What a round showed of its clients."""

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold; arrays that later rounds don't write to."""
        return {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what ``state`` gave."""
