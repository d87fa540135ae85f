"""Which guided images the server trains on: those that the classifier that guided them takes for their class."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Accepted", "accepted"]


@dataclass(frozen=True)
class Accepted:
    """What came of it.

    Attributes:
        rows: of the images to train on, ascending.
        passed: bool [N], which passed by themselves.
    """

    rows: np.ndarray
    passed: np.ndarray

    def note(self, guided_by: np.ndarray, clients: int) -> dict[str, Any]:
        """For summary.json: images made and passed, by client, and those kept as the best of a client's class."""
        made = np.bincount(guided_by, minlength=clients)
        passed = np.bincount(guided_by[self.passed], minlength=clients)
        kept = len(self.rows) - int(self.passed.sum())
        return {"made": made.tolist(), "passed": passed.tolist(), "kept_as_best": kept}


def accepted(logs: np.ndarray, labels: np.ndarray, guided_by: np.ndarray, most: float) -> Accepted:
    """Images whose class the guiding classifier finds most likely, at a cross-entropy of at most ``most``.

    Where none of a client's images of a class passes, the one of the least cross-entropy is kept (the first of
    several), so that no class vanishes. Nothing is made again: what is left follows from the images alone.

    Args:
        logs: the guiding classifier's log-probabilities of each image, float [N, classes].
        labels, guided_by: int [N], each image's class and the number of who guided it.
    """
    loss = -logs[np.arange(len(labels)), labels]
    passed = (logs.argmax(axis=1) == labels) & (loss <= most)
    kept, jobs = passed.copy(), guided_by * logs.shape[1] + labels
    for job in np.setdiff1d(jobs, jobs[passed]):
        rows = np.flatnonzero(jobs == job)
        kept[rows[loss[rows].argmin()]] = True
    return Accepted(np.flatnonzero(kept), passed)
