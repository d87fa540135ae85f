"""FedNova (Wang et al., arXiv 2007.07481, algorithm 1): normalised averaging of clients that do unequal work.

A client's tau_i local steps move it by eta G_i a_i, where a_i weights its gradients. Divided by ||a_i||_1 its update is
one average gradient d_i, whatever its number of steps; the server takes

    x <- x - tau_eff sum_i p_i eta d_i,     tau_eff = sum_i p_i ||a_i||_1,

with p_i the samples' shares among the clients that come through. For SGD ||a_i||_1 = tau_i; with momentum rho

    a_i = [1 - rho^tau_i, ..., 1 - rho^2, 1 - rho] / (1 - rho)     (the momentum starts at 0 in each round).

With equal a_i this is FedAvg. The sum carries p_i / ||a_i||_1, so buffers (running statistics) are averaged with these
weights: a true average, in which clients count about alike.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fl_ray.context import RunContext
from fl_ray.methods.base import Method
from fl_ray.methods.local_sgd import LocalSGD
from fl_ray.runtime.base import RoundResult
from fl_ray.runtime.tasks import Task

__all__ = ["FedNova"]


class FedNova(Method):
    """FedNova for clients with SGD, with or without momentum.

    A LightningModule of your own must configure SGD with training.momentum; that can't be checked.
    """

    def setup(self, run: RunContext) -> None:
        self._sgd, self._momentum = LocalSGD(run), run.config.training.momentum

    def norm(self, client: int) -> float:
        """||a_i||_1: the step k from the end counts 1 + rho + ... + rho^(k - 1)."""
        return float(np.cumsum(self._momentum ** np.arange(self._sgd.steps(client))).sum())

    def tasks(self, run: RunContext, round_number: int, cohort: np.ndarray) -> list[Task]:
        return [replace(task, scale=1 / self.norm(task.client)) for task in super().tasks(run, round_number, cohort)]

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        shares = np.array([record.share for record in result.included])
        norms = np.array([self.norm(record.client) for record in result.included])
        p = shares / shares.sum()
        tau_eff = (p * norms).sum()
        # Buffers times tau_eff could be carried beyond what any client has: a variance below 0.
        factor = np.where(run.is_parameter, tau_eff, 1 / (p / norms).sum())
        return (weights + factor * result.update).astype(np.float32)
