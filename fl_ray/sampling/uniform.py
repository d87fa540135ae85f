"""Everybody equally likely."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from fl_ray.randomness import numpy_generator
from fl_ray.sampling.base import ClientSampler, candidates

if TYPE_CHECKING:
    from fl_ray.context import RunContext

__all__ = ["Uniform"]


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
