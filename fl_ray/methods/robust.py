"""Aggregation that withstands Byzantine clients: median and trimmed mean by coordinate, Krum and multi-Krum.

``coordinate_median`` and ``trimmed_mean``: Yin et al., arXiv 1803.01498, definitions 1 and 2. ``krum``: Blanchard et
al., Machine Learning with Adversaries, NeurIPS 2017, section 4; multi-Krum in its experiments.

All count clients alike, whatever samples they say they have, and take in what has come in. All clients of a round start
from the same weights, so new weights are as good as updates. Buffers (running statistics) are not averaged here either:
a single client could spoil the model through them.
"""

from __future__ import annotations

from abc import abstractmethod

import numpy as np

from fl_ray.context import RunContext
from fl_ray.errors import SettingError, TooFewClientsError
from fl_ray.methods.base import Method
from fl_ray.runtime.base import RoundResult

__all__ = ["CoordinateMedian", "Krum", "TrimmedMean"]


class _Robust(Method):
    needs = "individual"
    weighs_clients = False

    def refusal(self, clients: int) -> str | None:
        """Why so many clients are too few, with the way out; or None."""
        return None

    def setup(self, run: RunContext) -> None:
        reason = self.refusal(run.config.cohort_size)
        if reason is not None:
            raise SettingError(f"clients_per_round is {run.config.cohort_size}, but {reason}")

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        reason = self.refusal(len(result.included))
        if reason is not None:
            raise TooFewClientsError(
                f"round {round_number + 1}: {len(result.included)} updates came in, but {reason}; or set "
                "runtime.min_clients, so that such a round is done once more"
            )
        stacked = np.stack([result.weights[record.client] for record in result.included])
        return self.combined(stacked, run.is_parameter).astype(np.float32)

    @abstractmethod
    def combined(self, stacked: np.ndarray, is_parameter: np.ndarray) -> np.ndarray:
        """The next weights [size] of the clients' [clients, size]; bool [size] says which are parameters."""


class CoordinateMedian(_Robust):
    """The median of every coordinate; of an even number of clients, the mean of the two in the middle."""

    def combined(self, stacked: np.ndarray, is_parameter: np.ndarray) -> np.ndarray:
        return np.median(stacked, axis=0)


class TrimmedMean(_Robust):
    """The mean of every coordinate without its largest and smallest values.

    Args:
        trim: beta, the part of the clients that is cut off on either side (rounded down to whole clients); 0 is the
            uniform mean.
    """

    def __init__(self, trim: float = 0.2) -> None:
        if not 0 <= trim < 0.5:
            raise ValueError(f"trim is {trim}, but it must be in [0, 0.5)")
        self.trim = trim

    def _cut(self, clients: int) -> int:
        return int(self.trim * clients + 1e-9)  # 0.29 * 100 is a little below 29

    def refusal(self, clients: int) -> str | None:
        if self.trim == 0 or self._cut(clients) > 0:
            return None
        return f"method.trim {self.trim} cuts off none of them; take at least {int(np.ceil(1 / self.trim))} clients"

    def combined(self, stacked: np.ndarray, is_parameter: np.ndarray) -> np.ndarray:
        cut = self._cut(len(stacked))
        return np.sort(stacked, axis=0)[cut : len(stacked) - cut].mean(axis=0, dtype=np.float64)


class Krum(_Robust):
    """The client whose n - f - 2 nearest others are nearest; multi-Krum: the mean of the ``multi`` best of these.

    Distances are over the parameters (counters among the buffers would drown them). Buffers are the median of all
    clients': the chosen one's may be false where its parameters are not. Of equal scores the lowest client wins.

    Args:
        byzantine: f, how many clients of a round may be Byzantine; n must be above 2f + 2.
        multi: m, how many clients are averaged, at most n - f; 1 is Krum.
    """

    def __init__(self, byzantine: int = 1, multi: int = 1) -> None:
        if byzantine < 0:
            raise ValueError(f"byzantine is {byzantine}, but it must be at least 0")
        if multi < 1:
            raise ValueError(f"multi is {multi}, but it must be at least 1")
        self.byzantine, self.multi = byzantine, multi

    def refusal(self, clients: int) -> str | None:
        if clients <= 2 * self.byzantine + 2:
            needed = 2 * self.byzantine + 3
            return f"krum with method.byzantine {self.byzantine} needs at least {needed} clients; take more or lower it"
        if self.multi > clients - self.byzantine:
            return f"method.multi is {self.multi}, above the {clients - self.byzantine} that may be honest; lower it"
        return None

    def combined(self, stacked: np.ndarray, is_parameter: np.ndarray) -> np.ndarray:
        best = np.argsort(self.scores(stacked[:, is_parameter]), kind="stable")[: self.multi]
        mean = stacked[np.sort(best)].mean(axis=0, dtype=np.float64)
        return mean if is_parameter.all() else np.where(is_parameter, mean, np.median(stacked, axis=0))

    def scores(self, vectors: np.ndarray) -> np.ndarray:
        """Each client's sum of squared distances to its n - f - 2 nearest others."""
        squares = np.array([np.square(vectors - own, dtype=np.float64).sum(axis=1) for own in vectors])
        np.fill_diagonal(squares, np.inf)
        return np.sort(squares, axis=1)[:, : len(vectors) - self.byzantine - 2].sum(axis=1)
