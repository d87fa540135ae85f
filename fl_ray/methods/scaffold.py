"""SCAFFOLD (Karimireddy et al., arXiv 1910.06378, algorithm 1, option II): control variates against client drift.

Each round the cohort S starts from x and takes K steps of y_i <- y_i - eta_l (g_i(y_i) - c_i + c); then

    c_i+ = c_i - c + (x - y_i) / (K eta_l)
    x   <- x + eta_g / |S| * sum_i (y_i - x)
    c   <- c + |S| / N * 1 / |S| * sum_i (c_i+ - c_i)

over the clients of S that come through; the others keep their c_i. N counts the clients that hold samples.

The average over the cohort is uniform, as in the paper (FedAvg here weights by samples). K and eta_l are the client's
number of steps and the step of that round. Buffers (running statistics) are averaged as they are and have no variates.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fl_ray.context import RunContext
from fl_ray.errors import SettingError
from fl_ray.methods.base import Method
from fl_ray.methods.client_vectors import ClientVectors
from fl_ray.methods.local_sgd import LocalSGD
from fl_ray.runtime.base import RoundResult
from fl_ray.runtime.tasks import Task

__all__ = ["Scaffold"]


class Scaffold(Method):
    """SCAFFOLD. Clients must train with plain SGD: c_i+ reads their mean gradient off the way they went.

    ``weight_decay`` is a part of that gradient and does no harm. A LightningModule of your own must configure plain SGD
    with training.lr; that can't be checked.

    Args:
        server_lr: eta_g, the server's step.
    """

    needs = "individual"

    def __init__(self, server_lr: float = 1.0) -> None:
        if not server_lr > 0:
            raise ValueError(f"server_lr is {server_lr}, but it must be positive")
        self.server_lr = server_lr
        self._c: np.ndarray | None = None  # float64 [size]
        self._own = ClientVectors()

    def setup(self, run: RunContext) -> None:
        """Refuse what would make (x - y_i) / (K eta_l) something else than a mean of corrected gradients."""
        self._sgd = LocalSGD(run)
        training, names = run.config.training, [component.name for component in run.config.updates]
        broken = {
            "training.momentum": (training.momentum, 0.0, "0"),
            "training.clip_norm": (training.clip_norm, None, "null"),
            "updates": (names, [], "an empty list"),
        }
        for setting, (value, good, told) in broken.items():
            if value != good:
                raise SettingError(
                    f"{setting} is {value}, but method {run.config.method.name} reads gradients off the clients' "
                    f"updates, which must be sums of plain SGD steps; set it to {told}, or use feddyn"
                )

    def link_bytes(self, run: RunContext, cohort: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The variates (of the parameters) travel beside the model, both ways."""
        down, up = super().link_bytes(run, cohort)
        variates = 4 * int(run.is_parameter.sum())
        return down + variates, up + variates

    def tasks(self, run: RunContext, round_number: int, cohort: np.ndarray) -> list[Task]:
        c = self._variate(run.is_parameter)
        tasks = super().tasks(run, round_number, cohort)
        return [
            replace(task, share=1 / len(tasks), offset=(c - self._own.get(task.client, c)).astype(np.float32))
            for task in tasks
        ]

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        c, lr = self._variate(weights), self._sgd.lr(round_number)
        fresh: dict[int, np.ndarray] = {}
        change = np.zeros(len(weights))
        for record in result.included:
            own, steps = self._own.get(record.client, c), self._sgd.steps(record.client)
            went = weights.astype(np.float64) - result.weights[record.client]
            new = np.where(run.is_parameter, own - c + went / (steps * lr), 0.0).astype(np.float32)
            change += new.astype(np.float64) - own
            fresh[record.client] = new
        self._own.commit(fresh)
        self._c = c + change / np.count_nonzero(run.data.partition.sizes)
        step = result.average().astype(np.float64) - weights
        return (weights + np.where(run.is_parameter, self.server_lr * step, step)).astype(np.float32)

    def _variate(self, like: np.ndarray) -> np.ndarray:
        return np.zeros(len(like)) if self._c is None else self._c

    def state(self) -> dict[str, np.ndarray]:
        return {} if self._c is None else {"c": self._c, **self._own.state()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self._c = state.get("c")
        self._own.load_state(state)
