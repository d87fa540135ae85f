"""What a method may use of the run that it is part of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData
from fl_ray.devices.cost import Ledger
from fl_ray.devices.fleet import Fleet
from fl_ray.progress import Progress
from fl_ray.runtime.base import Phases, Runtime
from fl_ray.synthesis import Synthesis

__all__ = ["RunContext"]


@dataclass
class RunContext:
    """One run's parts.

    Attributes:
        is_parameter: bool [size]; which entries of the flat weights are trained parameters, not buffers.
        synthesis: images of the recipe's generator; None where the recipe has none.
        notes: what a method wants in summary.json.
    """

    config: RunConfig
    data: FederatedData
    fleet: Fleet
    runtime: Runtime
    is_parameter: np.ndarray
    progress: Progress
    synthesis: Synthesis | None = None
    ledger: Ledger = field(default_factory=Ledger)
    phases: Phases = field(default_factory=Phases)
    notes: dict[str, Any] = field(default_factory=dict)

    @property
    def model_bytes(self) -> int:
        """Bytes of one model on a link, in fp32."""
        return 4 * len(self.is_parameter)
