"""The in-process backend: everything in the driver, for debugging and as what the Ray backend must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl_ray.config import FleetConfig, TrainingConfig
from fl_ray.devices.fleet import Fleet
from fl_ray.runtime.base import ClientPart, Phases, RoundResult, Runtime, ServerWork, merge, sum_evaluations
from fl_ray.runtime.host import ClientHost
from fl_ray.runtime.memory import peak_memory_mb
from fl_ray.runtime.tasks import Evaluation, Job, JobData, RoundSettings, ServerTraining, Task, TrainingPath

__all__ = ["InProcessRuntime"]


@dataclass(frozen=True)
class _Later:
    """Trained when the result is asked for, so that its time counts as training."""

    work: Callable[[], tuple[np.ndarray, float]]

    def result(self) -> tuple[np.ndarray, float]:
        return self.work()


class InProcessRuntime(Runtime):
    """One host, in this process."""

    def open(self, job: Job, data: JobData, config: FleetConfig, fleet: Fleet, cohort_size: int) -> None:
        self.host, self._cohort_size = ClientHost(job, data), cohort_size

    def shared(self) -> JobData:
        return self.host.data

    def resolve_path(self, wanted: str, clients: Sequence[int], weights: np.ndarray) -> tuple[TrainingPath, str]:
        return self.host.resolve_path(wanted, clients, self._cohort_size, weights)

    def hold(self, weights: np.ndarray) -> np.ndarray:
        return weights

    def held(self, handle: np.ndarray) -> np.ndarray:
        return handle

    def device_kind(self) -> str:
        return self.host.device_kind()

    def train(self, tasks: Sequence[Task], weights: np.ndarray, settings: RoundSettings, phases: Phases) -> RoundResult:
        with phases.phase("train"):
            part = self.host.train(tasks, weights, settings)
        with phases.phase("aggregate"):
            return merge([part], self.host.layout.size, settings.individual)

    def evaluate(
        self, models: Sequence[np.ndarray], images: tuple[np.ndarray, np.ndarray] | None = None
    ) -> list[Evaluation]:
        if images is not None:
            return [self.host.evaluate_on(*images, weights) for weights in models]
        blocks = list(range(self.host.data.test_blocks))
        return [sum_evaluations(self.host.evaluate_test(weights, blocks)) for weights in models]

    def evaluate_clients(
        self,
        models: Mapping[int | None, np.ndarray],
        clients: Sequence[int],
        part: ClientPart = "held_out",
    ) -> list[Evaluation | None]:
        if None in models:
            return self.host.evaluate_clients(models[None], list(clients), part)
        return [self.host.evaluate_clients(models[client], [client], part, True)[0] for client in clients]

    def predict(
        self, models: Mapping[int, np.ndarray], images: tuple[np.ndarray, np.ndarray] | None = None
    ) -> dict[int, np.ndarray]:
        shown = None if images is None else images[0]
        return {client: self.host.predict(weights, client, shown) for client, weights in models.items()}

    def gradient_cosines(self, weights: np.ndarray, clients: Sequence[int], rows: np.ndarray) -> list[float]:
        return self.host.gradient_cosines(weights, list(clients), self.host.gradient(weights, rows))

    def put(self, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return images, labels

    def labels_of(self, images: tuple[np.ndarray, np.ndarray]) -> np.ndarray:
        return images[1]

    def train_on_server(
        self,
        images: tuple[np.ndarray, np.ndarray],
        weights: np.ndarray,
        round_number: int,
        epochs: int,
        training: TrainingConfig | None = None,
        head_only: bool = False,
    ) -> _Later:
        return _Later(lambda: self.host.train_on(*images, weights, round_number, epochs, training, head_only))

    def on_server(self, work: ServerWork, *arguments: Any) -> Any:
        return self.host.apply(work, *arguments)

    def train_epoch(
        self,
        images: tuple[np.ndarray, np.ndarray],
        before: ServerTraining,
        training: TrainingConfig,
        purpose: str,
        training_mode: bool = True,
    ) -> ServerTraining:
        return self.host.train_epoch(*images, before, training, purpose, training_mode)

    def memory_mb(self) -> dict[str, float]:
        return {"driver": peak_memory_mb()}

    def close(self) -> None:
        self.__dict__.pop("host", None)
