"""The best model so far, and whether to go on."""

from __future__ import annotations

import numpy as np

from fl_ray.config import StoppingConfig

__all__ = ["BestModel"]


class BestModel:
    """Keeps the weights of the highest test accuracy; ``stalled`` says that early stopping is due.

    Attributes:
        round: after which round it was reached; 0: nothing was right yet, as with what is no classifier.
    """

    def __init__(self, config: StoppingConfig) -> None:
        self._config = config
        self.round, self.accuracy = 0, 0.0
        self.weights: np.ndarray | None = None
        self._marked, self._since = float("-inf"), 0  # the accuracy to beat, and evaluations since it was

    def see(self, round_number: int, accuracy: float, weights: np.ndarray) -> None:
        """Take note of a round (counted from 1); NaN: it was not evaluated."""
        if np.isnan(accuracy):
            return
        if accuracy > self.accuracy:
            self.round, self.accuracy, self.weights = round_number, accuracy, weights
        if accuracy > self._marked + self._config.min_delta:
            self._marked, self._since = accuracy, 0
        else:
            self._since += 1

    @property
    def stalled(self) -> bool:
        """Whether ``patience`` evaluations brought no rise."""
        return self._config.patience > 0 and self._since >= self._config.patience

    def state(self) -> dict[str, np.ndarray]:
        """For a checkpoint."""
        numbers = np.array([self.round, self.accuracy, self._marked, self._since], dtype=np.float64)
        return {"numbers": numbers} | ({} if self.weights is None else {"weights": self.weights})

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        """Take back what ``state`` gave."""
        best, self.accuracy, self._marked, since = state["numbers"].tolist()
        self.round, self._since, self.weights = int(best), int(since), state.get("weights")
