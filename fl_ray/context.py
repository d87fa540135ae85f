"""What a method may use of the run that it is part of."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData
from fl_ray.devices.cost import Ledger
from fl_ray.devices.fleet import Fleet
from fl_ray.model_store.base import ModelStore
from fl_ray.progress import Progress
from fl_ray.run_folder import RunFolder
from fl_ray.runtime.base import Phases, Runtime
from fl_ray.runtime.tasks import TrainingPath
from fl_ray.sampling import ClientSampler
from fl_ray.schedule import Schedule
from fl_ray.synthesis import Synthesis

__all__ = ["RunContext"]


@dataclass
class RunContext:
    """One run's parts.

    Attributes:
        is_parameter: bool [size]; which entries of the flat weights are trained parameters, not buffers.
        folder: what the run leaves behind; not to be written by methods.
        sampler: chooses the clients of a round.
        schedule: says which of them come through, and when.
        upload_bytes: one client's update on its uplink, after the recipe's ``updates``.
        path: how clients are trained.
        synthesis: images of the recipe's generator; None where the recipe has none.
        store: where machines share what was trained; None where the recipe names none.
        faults: updates left out, by ``LeftOut.kind``; as ``retried``, clients that raised once and then trained.
        notes: what a method wants in summary.json.
        metrics: what it wants tracked of the round, beside the history's columns.
        clock_s: the virtual time of a choice of clients, where it is not that of the ledger.
    """

    config: RunConfig
    data: FederatedData
    fleet: Fleet
    runtime: Runtime
    is_parameter: np.ndarray
    folder: RunFolder
    progress: Progress
    sampler: ClientSampler
    schedule: Schedule
    upload_bytes: int
    path: TrainingPath = "plain"
    synthesis: Synthesis | None = None
    store: ModelStore | None = None
    ledger: Ledger = field(default_factory=Ledger)
    phases: Phases = field(default_factory=Phases)
    faults: Counter[str] = field(default_factory=Counter)
    notes: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    clock_s: float | None = None

    def available(self) -> np.ndarray | None:
        """Which clients can take part now, bool [clients]; None: everybody."""
        if self.fleet.availability is None:
            return None
        return self.fleet.availability.mask(self.ledger.virtual_time_s if self.clock_s is None else self.clock_s)

    @property
    def model_bytes(self) -> int:
        """Bytes of one model on a link, in fp32."""
        return 4 * len(self.is_parameter)
