"""FIMI's baselines whose synthetic data stay at the server: SEMI, SST and CLSD. Only their names are the paper's; what
they do is our reconstruction. Each server has as many synthetic images as FIMI's plan gives to all devices together.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fl_ray.aggregation import combine
from fl_ray.allocation.categories import water_fill
from fl_ray.allocation.cell import Cell
from fl_ray.allocation.plan import Plan, make_plan
from fl_ray.config import RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import FederatedData
from fl_ray.devices.fleet import Fleet
from fl_ray.errors import SettingError
from fl_ray.methods.base import require_counts
from fl_ray.methods.fimi import TFL
from fl_ray.methods.reference import ServerOnly
from fl_ray.planning import cell_of
from fl_ray.runtime.base import Pending, RoundResult

if TYPE_CHECKING:
    from fl_ray.synthesis import Synthesis

__all__ = ["CLSD", "SEMI", "SST"]


def server_amounts(config: RunConfig, cell: Cell, images: int | None) -> np.ndarray:
    """Images of each class, as many of each (one more of the first classes where that does not divide)."""
    if images is None:
        images = int(make_plan(cell, config.allocation, config.seed).class_amounts.sum())
        if images == 0:
            raise SettingError(
                f"method {config.method.name}: FIMI's plan has no synthetic images (the local data suffice for "
                f"allocation.error_max {config.allocation.error_max:g}); lower that, or give method.images"
            )
    classes = cell.class_counts.shape[1]
    return water_fill(np.zeros(classes, dtype=np.int64), images)


class _Server(TFL):
    """TFL beside a server that trains on synthetic images.

    Args:
        images: how many; default: as many as FIMI's plan makes.
        server_epochs: a round; default: training.local_epochs.
        replan_every: as FIMI's.
    """

    uses_generator = True

    def __init__(self, images: int | None = None, server_epochs: int | None = None, replan_every: int = 0) -> None:
        super().__init__(None, replan_every)
        require_counts(images=images, server_epochs=server_epochs)
        self.images, self.server_epochs = images, server_epochs

    def make(self, config: RunConfig, cell: Cell) -> Plan:
        self._amounts = server_amounts(config, cell, self.images)
        return super().make(config, cell)

    def setup(self, run: RunContext) -> None:
        super().setup(run)
        with run.phases.phase("synthesis"):
            self._stored = run.runtime.put(*run.synthesis.images(self._amounts, run.config.seed))
        run.notes["synthetic_images"] = self._amounts.tolist()

    def _begin(self, run: RunContext, weights: np.ndarray, round_number: int) -> Pending:
        return run.runtime.train_on_server(self._stored, weights, round_number, self.epochs_on_server(run))

    def server_samples(self, run: RunContext, round_number: int) -> int:
        return int(self._amounts.sum()) * self.epochs_on_server(run)


class SEMI(_Server):
    """Semi-federated: the server trains on its images beside the clients and counts in the average like one of them, by
    its number of images.
    """

    def before_training(self, run: RunContext, round_number: int, weights: np.ndarray, cohort: np.ndarray) -> None:
        self._pending = self._begin(run, weights, round_number)

    def after_training(self, run: RunContext) -> None:
        self._trained, _ = self._pending.result()

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        averaged = super().aggregate(run, round_number, weights, result)
        own = int(self._amounts.sum())
        clients = sum(record.samples for record in result.included)
        return combine([(clients / (clients + own), averaged), (own / (clients + own), self._trained)])


class SST(_Server):
    """Server-side training: the average is fine-tuned on synthetic images after each round; the clients wait for it."""

    server_waits = True

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        averaged = super().aggregate(run, round_number, weights, result)
        trained, _ = self._begin(run, averaged, round_number).result()
        return trained


class CLSD(ServerOnly):
    """Centralised learning on synthetic data alone: no device takes part, so none spends energy; accuracy compares.

    Args:
        images, server_epochs: as of ``SEMI``.
    """

    uses_generator = True

    def __init__(self, images: int | None = None, server_epochs: int | None = None) -> None:
        super().__init__(server_epochs)
        require_counts(images=images)
        self.images = images

    def equip(
        self, config: RunConfig, data: FederatedData, fleet: Fleet, synthesis: Synthesis | None
    ) -> tuple[FederatedData, Fleet]:
        self._amounts = server_amounts(config, cell_of(config, data, fleet), self.images)
        return data, fleet

    def own_images(self, run: RunContext) -> tuple[np.ndarray, np.ndarray]:
        run.notes["synthetic_images"] = self._amounts.tolist()
        with run.phases.phase("synthesis"):
            return run.synthesis.images(self._amounts, run.config.seed)
