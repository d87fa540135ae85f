"""FedDyn (Acar et al., arXiv 2111.04263, algorithm 1): dynamic regularisation that aligns the clients' optima.

Each round the clients P of the cohort start from theta^{t-1} and minimise

    L_k(theta) - <grad_k, theta> + alpha/2 ||theta - theta^{t-1}||^2     to theta_k,
    grad_k  <- grad_k - alpha (theta_k - theta^{t-1}),

and the server, with m clients in all, takes

    h       <- h - alpha / m * sum_{k in P} (theta_k - theta^{t-1})
    theta^t  = 1/|P| sum_{k in P} theta_k - h / alpha.

P are the clients that come through; the others keep their grad_k. m counts the clients that hold samples. Averages are
uniform, as in the paper. Buffers (running statistics) are averaged as they are and have no state.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fl_ray.context import RunContext
from fl_ray.methods.base import Method
from fl_ray.methods.client_vectors import ClientVectors
from fl_ray.runtime.base import RoundResult
from fl_ray.runtime.tasks import Task

__all__ = ["FedDyn"]


class FedDyn(Method):
    """FedDyn, with any optimiser: a client's state follows from where it went, not from its steps.

    With ``updates``, both states follow the update as the server reads it.

    Args:
        alpha: of the regulariser. The paper tries 0.001, 0.01 and 0.1.
    """

    needs = "individual"

    def __init__(self, alpha: float = 0.1) -> None:
        if not alpha > 0:
            raise ValueError(f"alpha is {alpha}, but it must be positive; fedavg has no regulariser")
        self.alpha = self.proximal = alpha
        self._h: np.ndarray | None = None  # float64 [size]
        self._own = ClientVectors()

    def tasks(self, run: RunContext, round_number: int, cohort: np.ndarray) -> list[Task]:
        tasks = super().tasks(run, round_number, cohort)
        return [
            replace(task, share=1 / len(tasks), offset=-self._own.get(task.client, run.is_parameter)) for task in tasks
        ]

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        h = np.zeros(len(weights)) if self._h is None else self._h
        fresh: dict[int, np.ndarray] = {}
        went = np.zeros(len(weights))
        for record in result.included:
            own = np.where(run.is_parameter, result.weights[record.client].astype(np.float64) - weights, 0.0)
            fresh[record.client] = (self._own.get(record.client, h) - self.alpha * own).astype(np.float32)
            went += own
        self._own.commit(fresh)
        self._h = h - self.alpha / np.count_nonzero(run.data.partition.sizes) * went
        return (result.average() - self._h / self.alpha).astype(np.float32)

    def state(self) -> dict[str, np.ndarray]:
        return {} if self._h is None else {"h": self._h, **self._own.state()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self._h = state.get("h")
        self._own.load_state(state)
