"""Large clients more often: by samples, and then all alike in the average (Li et al., arXiv 1907.02189, scheme I)."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from fl_ray.randomness import numpy_generator
from fl_ray.sampling.base import ClientSampler, candidates, weighted_draw

if TYPE_CHECKING:
    from fl_ray.context import RunContext

__all__ = ["SizeWeighted"]


class SizeWeighted(ClientSampler):
    """One after another without replacement (the paper's scheme is with), by samples; those without any never."""

    equal_shares = True

    def choose(
        self, run: RunContext, turn: int, size: int, weights: np.ndarray, excluded: Collection[int] = ()
    ) -> np.ndarray:
        rng = numpy_generator(run.config.seed, "cohort", turn)
        among, sizes = candidates(run, excluded), run.data.partition.sizes
        if among is None:
            return weighted_draw(rng, sizes, size)
        return among[weighted_draw(rng, sizes[among], size)]
