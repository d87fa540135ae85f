"""What the driver and the client hosts exchange."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from fl_ray.config import Component, TrainingConfig
from fl_ray.data.rows import Rows

if TYPE_CHECKING:
    from fl_ray.data.parts import FederatedData
    from fl_ray.model import ImageShape

__all__ = [
    "EVALUATION_BLOCK",
    "FAULTS",
    "ClientRecord",
    "Evaluation",
    "Fault",
    "Job",
    "JobData",
    "LeftOut",
    "PartialResult",
    "RoundSettings",
    "ServerTraining",
    "Task",
    "TrainingPath",
]

EVALUATION_BLOCK = 500
TrainingPath = Literal["plain", "batched"]
Fault = Literal["dropped_out", "late", "not_finite", "raised", "one_sample"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


@dataclass(frozen=True)
class Job:
    """What a host must know of a run."""

    model: Component
    shape: ImageShape
    training: TrainingConfig
    seed: int
    rounds: int
    threads: int
    updates: tuple[Component, ...] = ()
    """Post-processors of every client's update, in order."""
    client_models: tuple[Component, ...] = ()
    """What clients train where that is not ``model``: client k the one of number k modulo their count."""

    def model_of(self, client: int) -> int:
        """Which model a client trains: 0 is ``model``, then come ``client_models``."""
        return 1 + client % len(self.client_models) if self.client_models else 0

    @property
    def models(self) -> tuple[Component, ...]:
        """All models, by the numbers of ``model_of``."""
        return (self.model, *self.client_models)


@dataclass(frozen=True)
class JobData:
    """The arrays of a run; every client's images are rows of one array that all hosts of a machine share."""

    images: np.ndarray
    labels: np.ndarray
    partition: Rows
    held_out: Rows
    test_images: np.ndarray
    test_labels: np.ndarray

    @classmethod
    def of(cls, data: FederatedData) -> JobData:
        """Those of the clients and of the test; the server's parts stay with it."""
        return cls(data.images, data.labels, data.partition, data.held_out, data.test_images, data.test_labels)

    @property
    def test_blocks(self) -> int:
        """Fixed blocks of test images; evaluations are summed in their order, whoever computes them."""
        return -(-len(self.test_labels) // EVALUATION_BLOCK)


@dataclass(frozen=True)
class Task:
    """One client's part of a round.

    Attributes:
        share: its weight in the average; the shares of a round add up to at most 1.
        scale: multiplies its update (a stale or normalised one); the average still divides by the shares alone.
        start: a handle of ``Runtime.hold`` on the weights that it starts from, where these are not the round's.
        offset: float32 [size], added to every gradient (control variates); zero for entries that are no parameters.
        turn: the number in the key of its random draws; default: the round.
        latency_s: its modelled latency, which ``runtime.emulate: realtime`` keeps it to.
    """

    client: int
    share: float
    scale: float = 1.0
    start: Any = None
    offset: np.ndarray | None = None
    turn: int | None = None
    latency_s: float = 0.0


@dataclass(frozen=True)
class RoundSettings:
    """What all tasks of a round share.

    Attributes:
        number: of the round, from 0.
        path: how clients are trained, see ``fl_ray.runtime.batched``.
        individual: return every client's new weights, instead of the sum of share * scale * (new - start).
        proximal: mu of a term mu/2 ||w - start||^2 in every client's loss.
        pace: wall seconds per modelled second; None: as fast as can be.
        strict: a client's error is raised, instead of trying again and leaving the client out.
    """

    number: int
    path: TrainingPath = "plain"
    individual: bool = False
    proximal: float = 0.0
    pace: float | None = None
    strict: bool = False


@dataclass(frozen=True)
class LeftOut:
    """Why a client's update is not in the average: ``kind`` to count by, ``why`` to read."""

    kind: Fault
    why: str

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True)
class ClientRecord:
    """What a client reports of a round.

    Attributes:
        train_loss: mean of the module's loss over its samples and epochs (a CVAE's is a sum over the batch).
        started, ended: wall clock, Unix seconds.
        left_out: why its update is not in the sum, or None.
        raised: the error that its training raised the first time, or None.
    """

    client: int
    samples: int
    train_loss: float
    share: float
    started: float
    ended: float
    left_out: LeftOut | None = None
    raised: str | None = None
    turn: int = 0
    """As the task's: tells apart two updates of one client in an asynchronous round."""


@dataclass
class PartialResult:
    """One host's part of a round: the exact sum of its clients' updates, or their weights one by one."""

    total: np.ndarray | None
    weights: dict[int, np.ndarray] = field(default_factory=dict)
    records: list[ClientRecord] = field(default_factory=list)


@dataclass(frozen=True)
class ServerTraining:
    """A training at the server between two of its epochs.

    Attributes:
        weights: float32 [size].
        epochs: done so far.
        left: what the next one needs beside the weights, see ``train_epoch``; None before the first.
        loss: mean of the last one.
    """

    weights: np.ndarray
    epochs: int = 0
    left: bytes | None = None
    loss: float = float("nan")


@dataclass(frozen=True)
class Evaluation:
    """Correct answers, summed cross-entropy and count over a set of images (of shares, where sets count alike)."""

    correct: float
    loss_sum: float
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count
