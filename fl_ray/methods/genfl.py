"""GenFL (arXiv 2503.20166): FedAvg joined by a server-side model trained on generated images.

Clients share their label counts once. Each round the server generates images of the classes that are scarce among the
cohort and trains an augmented model w_a on all it has generated, in parallel with the clients;

    w_{t+1} = kappa1 * sum_n rho_n w_n + kappa2 * w_a.

Stated by the paper: label sharing, parallel training, this sum with static kappas. Our reconstruction: w_a starts from
w_t, kappa1 + kappa2 = 1 with 0.5 each by default, an amount of images per round up to a cap, and that they fill the
cohort's scarcest classes (water-filling).
"""

from __future__ import annotations

import numpy as np
import torch

from fl_ray.aggregation import ExactSum, combine
from fl_ray.allocation.categories import water_fill
from fl_ray.context import RunContext
from fl_ray.methods.fedavg import FedAvg
from fl_ray.runtime.base import Pending, RoundResult

__all__ = ["GenFL"]

COUNT_BYTES = 8  # of one class's count in a client's label statistics


class GenFL(FedAvg):
    """GenFL with static kappa. ``kappa1`` = 0 is AIGC-only (no client trains), ``kappa2`` = 0 is FedAvg.

    Args:
        kappa1: weight of the clients' average.
        kappa2: weight of the augmented model; kappa1 + kappa2 = 1.
        images_per_round: images generated in each round, until
        max_images: the server has this many.
        server_epochs: epochs of the augmented model per round; default: training.local_epochs.
    """

    asynchronous = False  # its augmented model and the clients' updates belong to the same round

    def __init__(
        self,
        kappa1: float = 0.5,
        kappa2: float = 0.5,
        images_per_round: int = 200,
        max_images: int = 2000,
        server_epochs: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in {"kappa1": kappa1, "kappa2": kappa2}.items():
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is {value}, but it must be in [0, 1], with kappa1 + kappa2 = 1")
        if abs(kappa1 + kappa2 - 1) > 1e-6:
            raise ValueError(f"kappa1 + kappa2 is {kappa1 + kappa2:g} ({kappa1} + {kappa2}), but it must be 1")
        if images_per_round < 1 or max_images < 1:
            raise ValueError(f"images_per_round ({images_per_round}) and max_images ({max_images}) must be positive")
        if server_epochs is not None and server_epochs < 1:
            raise ValueError(f"server_epochs is {server_epochs}, but it must be at least 1")
        self.kappa1, self.kappa2 = kappa1, kappa2
        self.images_per_round, self.max_images, self.server_epochs = images_per_round, max_images, server_epochs
        self.uses_generator = kappa2 > 0
        self.trains_clients = kappa1 > 0
        self._made = np.zeros(0, dtype=np.int64)
        self._images: object = None
        self._pending: Pending | None = None
        self._augmented: np.ndarray | None = None
        self._augmented_loss = float("nan")

    def setup(self, run: RunContext) -> None:
        if self.kappa2 == 0:
            return
        if len(self._made) == 0:  # not resumed: each client shares its label counts once
            self._made = np.zeros(run.data.num_classes, dtype=np.int64)
            run.ledger.bytes_up += COUNT_BYTES * run.data.num_classes * run.config.data.clients
        else:
            self._images = self._fetch(run)

    def before_training(self, run: RunContext, round_number: int, weights: np.ndarray, cohort: np.ndarray) -> None:
        if self.kappa2 == 0:
            return
        amount = min(self.images_per_round, self.max_images - int(self._made.sum()))
        if amount > 0:
            self._made = self._made + water_fill(run.data.counts(cohort).sum(axis=0), amount)
            self._images = self._fetch(run)
        run.notes["synthetic_images"] = self._made.tolist()
        self._pending = run.runtime.train_on_server(self._images, weights, round_number, self._epochs(run))

    def _fetch(self, run: RunContext) -> object:
        with run.phases.phase("synthesis"):
            return run.runtime.put(*run.synthesis.images(self._made, run.config.seed))

    def _epochs(self, run: RunContext) -> int:
        return self.server_epochs or run.config.training.local_epochs

    def after_training(self, run: RunContext) -> None:
        if self._pending is not None:
            self._augmented, self._augmented_loss = self._pending.result()

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        averaged = super().aggregate(run, round_number, weights, result) if self.trains_clients else weights
        if self.kappa2 == 0:
            return averaged
        if not ExactSum.fits(torch.from_numpy(np.array(self._augmented))[None]).item():
            run.notes["augmented_left_out"] = run.notes.get("augmented_left_out", 0) + 1
            run.progress.message(f"round {round_number + 1}: the augmented model is not finite and is left out")
            return averaged
        if self.kappa1 == 0:
            return self._augmented
        return combine([(self.kappa1, averaged), (self.kappa2, self._augmented)])

    def server_samples(self, run: RunContext, round_number: int) -> int:
        return int(self._made.sum()) * self._epochs(run) if self.kappa2 > 0 else 0

    def train_loss(self, result: RoundResult) -> float:
        return result.train_loss if self.trains_clients else self._augmented_loss

    def state(self) -> dict[str, np.ndarray]:
        return {"made": self._made} if self.kappa2 > 0 else {}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self._made = state.get("made", self._made)
