"""Federated averaging (McMahan et al., arXiv 1602.05629, algorithm 1) with FedOpt servers (arXiv 2003.00295).

Each round: a cohort S_t trains from w_t; delta = sum_n rho_n (w_n - w_t) with rho_n = D_n / sum of D over the cohort;
w_{t+1} = w_t + server step of delta. With ``sgd`` at server_lr 1 this is the size-weighted average.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from fl_ray.context import RunContext
from fl_ray.methods.base import Method
from fl_ray.runtime.base import RoundResult

__all__ = ["FedAvg"]


class FedAvg(Method):
    """FedAvg (TFL in FIMI's tables).

    Args:
        server_optimizer: ``sgd``, ``momentum`` (FedAvgM) or ``adam`` (FedAdam), on delta as the negative gradient.
        server_lr: the server's step; default: 1 for ``sgd`` and ``momentum``, 0.01 for ``adam``.
        beta1: momentum of ``momentum`` and ``adam``.
        beta2, tau: of ``adam``: decay of the squares (which start at 0), and the term that keeps the quotient finite.
    """

    asynchronous = True

    def __init__(
        self,
        server_optimizer: Literal["sgd", "momentum", "adam"] = "sgd",
        server_lr: float | None = None,
        beta1: float = 0.9,
        beta2: float = 0.99,
        tau: float = 1e-3,
    ) -> None:
        if server_lr is None:
            server_lr = 0.01 if server_optimizer == "adam" else 1.0
        if not server_lr > 0:
            raise ValueError(f"server_lr is {server_lr}, but it must be positive")
        for name, value in {"beta1": beta1, "beta2": beta2}.items():
            if not 0 <= value < 1:
                raise ValueError(f"{name} is {value}, but it must be in [0, 1)")
        if not tau > 0:
            raise ValueError(f"tau is {tau}, but it must be positive")
        self.server_optimizer, self.server_lr = server_optimizer, server_lr
        self.beta1, self.beta2, self.tau = beta1, beta2, tau
        self._moments: dict[str, np.ndarray] = {}

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        if not result.included:
            return weights
        delta = result.update
        step = self._step(delta)
        # Buffers (running statistics) are averaged as they are; a momentum of variances would mean nothing.
        change = delta if step is delta and self.server_lr == 1.0 else np.where(run.is_parameter, step, delta)
        return (weights + change).astype(np.float32)

    def _step(self, delta: np.ndarray) -> np.ndarray:
        if self.server_optimizer == "sgd":
            return delta if self.server_lr == 1.0 else self.server_lr * delta
        first = self._moments.get("first", np.zeros_like(delta))
        if self.server_optimizer == "momentum":
            self._moments["first"] = self.beta1 * first + delta
            return self.server_lr * self._moments["first"]
        second = self._moments.get("second", np.zeros_like(delta))
        self._moments["first"] = self.beta1 * first + (1 - self.beta1) * delta
        self._moments["second"] = self.beta2 * second + (1 - self.beta2) * delta**2
        return self.server_lr * self._moments["first"] / (np.sqrt(self._moments["second"]) + self.tau)

    def state(self) -> dict[str, np.ndarray]:
        return dict(self._moments)

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self._moments = dict(state)
