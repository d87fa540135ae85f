"""Which clients take part in a round."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from fl_ray.randomness import numpy_generator

if TYPE_CHECKING:
    from fl_ray.context import RunContext
    from fl_ray.runtime.base import RoundResult
    from fl_ray.schedule import RoundPlan

__all__ = ["ClientSampler", "Uniform", "candidates"]


def candidates(run: RunContext, excluded: Collection[int] = ()) -> np.ndarray | None:
    """Clients that can be chosen now: available, and not excluded; None where that is everybody."""
    available = run.available()
    if available is None and not excluded:
        return None
    chosen = np.ones(run.config.data.clients, dtype=bool) if available is None else available.copy()
    chosen[list(excluded)] = False
    return np.flatnonzero(chosen)


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
        """What a checkpoint must hold."""
        return {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what ``state`` gave."""


class Uniform(ClientSampler):
    """Without replacement, everybody equally likely."""

    def choose(
        self, run: RunContext, turn: int, size: int, weights: np.ndarray, excluded: Collection[int] = ()
    ) -> np.ndarray:
        rng = numpy_generator(run.config.seed, "cohort", turn)
        among = candidates(run, excluded)
        if among is None:  # without a list of a million numbers
            return np.sort(rng.choice(run.config.data.clients, size, replace=False, shuffle=False))
        return np.sort(rng.choice(among, min(size, len(among)), replace=False, shuffle=False))
