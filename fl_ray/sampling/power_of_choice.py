"""Power-of-choice (Cho, Wang and Joshi, arXiv 2010.01243): of d candidates, those whose loss is highest."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import numpy as np

from fl_ray.errors import SettingError
from fl_ray.randomness import numpy_generator
from fl_ray.sampling.base import ClientSampler, candidates, weighted_draw

if TYPE_CHECKING:
    from fl_ray.context import RunContext

__all__ = ["PowerOfChoice"]


class PowerOfChoice(ClientSampler):
    """Candidates are drawn by samples without replacement; the global model's mean loss on all of a candidate's
    training images decides; ties go to the lower number. Updates count alike, as in the paper.

    What it costs: every choice sends the model to d candidates, who each run it once over their images (an
    asynchronous run chooses for every client that it starts). The wall clock shows this; the virtual clock, the energy
    and the bytes of the history hold the chosen clients' training alone.

    Args:
        d: candidates; default: twice as many as are chosen.
    """

    equal_shares = True

    def __init__(self, d: int | None = None) -> None:
        if d is not None and d < 1:
            raise ValueError(f"d is {d}, but it must be at least 1")
        self.d = d

    def choose(
        self, run: RunContext, turn: int, size: int, weights: np.ndarray, excluded: Collection[int] = ()
    ) -> np.ndarray:
        d = 2 * size if self.d is None else self.d
        if d < size:
            raise SettingError(f"sampling.d is {d}, but {size} clients are chosen out of so many; raise it")
        rng = numpy_generator(run.config.seed, "cohort", turn)
        among, sizes = candidates(run, excluded), run.data.partition.sizes
        drawn = weighted_draw(rng, sizes, d) if among is None else among[weighted_draw(rng, sizes[among], d)]
        if len(drawn) <= size:
            return drawn
        found = run.runtime.evaluate_clients({None: weights}, drawn.tolist(), "partition")
        losses = np.array([evaluation.loss for evaluation in found])
        return np.sort(drawn[np.argsort(-losses, kind="stable")[:size]])
