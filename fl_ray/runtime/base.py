"""The interface of a backend, and what both backends share."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np

from fl_ray.aggregation import ExactSum, combine
from fl_ray.config import FleetConfig, TrainingConfig
from fl_ray.devices.fleet import Fleet
from fl_ray.runtime.tasks import (
    ClientRecord,
    Evaluation,
    Job,
    JobData,
    PartialResult,
    RoundSettings,
    ServerTraining,
    Task,
    TrainingPath,
)

__all__ = [
    "ClientPart",
    "Pending",
    "Phases",
    "RoundResult",
    "Runtime",
    "ServerWork",
    "mean_evaluations",
    "merge",
    "sum_evaluations",
]

ClientPart = Literal["held_out", "partition"]


class Phases:
    """Wall seconds by phase of a run."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = 0.0  # seconds of phases within the one that is open

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the block's wall time to ``name``, less that of phases within it."""
        start, before = time.perf_counter(), self._inside
        self._inside = 0.0
        try:
            yield
        finally:
            took = time.perf_counter() - start
            self.seconds[name] += took - self._inside
            self._inside = before + took


@dataclass
class RoundResult:
    """What a round of local training gave.

    Attributes:
        update: float64 [size], the average of scale * (new - start) weighted by the shares of the clients that are in
            it; None where individual weights were asked for.
        weights: new weights by client, where they were asked for.
        records: by client number, those left out too.
        earlier_s: wall seconds to count beside this run's own: what the training took in the run that it was taken
            from, less the time spent waiting for that (``fl_ray.client_models``).
    """

    update: np.ndarray | None
    weights: dict[int, np.ndarray]
    records: list[ClientRecord]
    earlier_s: float = 0.0

    @property
    def included(self) -> list[ClientRecord]:
        """The clients that the average holds."""
        return [record for record in self.records if record.left_out is None]

    @property
    def left_out(self) -> list[ClientRecord]:
        """The clients that it does not."""
        return [record for record in self.records if record.left_out is not None]

    def average(self) -> np.ndarray:
        """Individual weights averaged by the included clients' shares, float32 [size]."""
        total = sum(record.share for record in self.included)
        return combine([(record.share / total, self.weights[record.client]) for record in self.included])

    @property
    def train_loss(self) -> float:
        """Mean training loss over the included clients' samples; NaN where there are none."""
        samples = sum(record.samples for record in self.included)
        if samples == 0:
            return float("nan")
        return sum(record.train_loss * record.samples for record in self.included) / samples


class ServerWork(Protocol):
    """A function at a module's top level: it is called in another process."""

    def __call__(self, host: Any, *arguments: Any) -> Any: ...


class Pending(Protocol):
    """A training at the server that may still be going on."""

    def result(self) -> tuple[np.ndarray, float]:
        """Wait for it: the new flat weights and the mean loss."""


class Runtime(ABC):
    """Trains and evaluates; ``open`` comes first, and again for every further run.

    Attributes:
        paths: training paths that were resolved here, with their reasons.
        spare: what clients' actors leave of a cluster, see ``fl_ray.runtime.spare``; from the next ``open`` on.
    """

    def __init__(self) -> None:
        self.spare: Mapping[str, float] = {}
        self.paths: dict[str, tuple[TrainingPath, str]] = {}

    def wait(self) -> None:
        """Until whatever computes answers.

        Raises:
            PlacementError: what stood in the way.
        """

    def leave(self, spare: Mapping[str, float]) -> None:
        """Leave so much of a cluster to others from now on."""
        self.spare = spare

    @abstractmethod
    def open(self, job: Job, data: JobData, config: FleetConfig, fleet: Fleet, cohort_size: int) -> None:
        """Get ready for a run on these devices."""

    @abstractmethod
    def shared(self) -> JobData:
        """The run's arrays as the hosts have them; who holds these need not hold copies of their own."""

    @abstractmethod
    def resolve_path(self, wanted: str, clients: Sequence[int], weights: np.ndarray) -> tuple[TrainingPath, str]:
        """The training path that ``wanted`` means here, and why; see ``ClientHost.resolve_path``."""

    @abstractmethod
    def hold(self, weights: np.ndarray) -> Any:
        """A handle on weights for ``Task.start``, so that they travel once."""

    @abstractmethod
    def held(self, handle: Any) -> np.ndarray:
        """The weights of a handle of ``hold``."""

    @abstractmethod
    def device_kind(self) -> str:
        """What clients are trained on: ``cpu``, ``cuda``."""

    @abstractmethod
    def train(self, tasks: Sequence[Task], weights: np.ndarray, settings: RoundSettings, phases: Phases) -> RoundResult:
        """Train the clients of a round; see ``ClientHost.train``."""

    @abstractmethod
    def evaluate(self, models: Sequence[np.ndarray], images: Any = None) -> list[Evaluation]:
        """Each model on the global test images, or on those of a handle of ``put``."""

    @abstractmethod
    def evaluate_clients(
        self,
        models: Mapping[int | None, np.ndarray],
        clients: Sequence[int],
        part: ClientPart = "held_out",
    ) -> list[Evaluation | None]:
        """Clients' models on their own images of a part (None where one has none); the key None is the global
        model, for all clients.
        """

    @abstractmethod
    def predict(self, models: Mapping[int, np.ndarray], images: Any = None) -> dict[int, np.ndarray]:
        """Clients' own models' log-probabilities of the classes, float32 [N, classes] by client, on a handle's images
        or on the global test images.
        """

    @abstractmethod
    def gradient_cosines(self, weights: np.ndarray, clients: Sequence[int], rows: np.ndarray) -> list[float]:
        """Cosine of each client's gradient with that on ``rows`` of the images; see ``ClientHost.gradient``."""

    @abstractmethod
    def put(self, images: np.ndarray, labels: np.ndarray) -> Any:
        """A handle on images for ``train_on_server`` and ``evaluate``, so that they travel once."""

    @abstractmethod
    def labels_of(self, images: Any) -> np.ndarray:
        """The labels of a handle of ``put``."""

    @abstractmethod
    def train_on_server(
        self,
        images: Any,
        weights: np.ndarray,
        round_number: int,
        epochs: int,
        training: TrainingConfig | None = None,
        head_only: bool = False,
    ) -> Pending:
        """Begin to train on a handle's images, beside the clients.

        Args:
            training: its optimiser, step and batch size; default: the clients'.
            head_only: train the model's last linear layer alone; the rest stays as it is, running statistics too.
        """

    @abstractmethod
    def on_server(self, work: ServerWork, *arguments: Any) -> Any:
        """What ``work(host, *arguments)`` gives where the server trains."""

    @abstractmethod
    def train_epoch(
        self,
        images: Any,
        before: ServerTraining,
        training: TrainingConfig,
        purpose: str,
        training_mode: bool = True,
    ) -> ServerTraining:
        """Train on a handle's images for one epoch: a long training can be kept after each.

        Args:
            before: what the epoch before has given, or the weights to begin with.
            purpose: names the training; with the run's seed it fixes the order of the images.
            training_mode: of the module; otherwise it stays in evaluation mode.
        """

    @abstractmethod
    def memory_mb(self) -> dict[str, float]:
        """Peak resident memory in MiB, by kind of process."""

    @abstractmethod
    def close(self) -> None:
        """Let go of every process that was started."""

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def merge(parts: Sequence[PartialResult], size: int, individual: bool) -> RoundResult:
    """One result of the hosts' parts; the same for any grouping of clients into parts."""
    records = sorted(
        (record for part in parts for record in part.records), key=lambda record: (record.client, record.turn)
    )
    weights = {client: values for part in parts for client, values in part.weights.items()}
    if individual:
        return RoundResult(None, weights, records)
    total = ExactSum(size)
    for part in parts:
        if part.total is not None:
            total.merge(part.total)
    included = sum(record.share for record in records if record.left_out is None)
    update = total.value() / included if included > 0 else np.zeros(size)
    return RoundResult(update, weights, records)


def sum_evaluations(blocks: Sequence[Evaluation]) -> Evaluation:
    """The evaluation of all blocks, added in their order."""
    return Evaluation(
        sum(block.correct for block in blocks),
        sum(block.loss_sum for block in blocks),
        sum(block.count for block in blocks),
    )


def mean_evaluations(blocks: Sequence[Evaluation]) -> Evaluation:
    """The evaluation in which every block counts alike, whatever its size."""
    accuracy, loss = (sum(getattr(block, name) for block in blocks) for name in ("accuracy", "loss"))
    return Evaluation(accuracy, loss, len(blocks))
