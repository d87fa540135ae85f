"""The reference rows that stand beside every method: clients alone, pooled client data, the public images alone, the
generator's images alone.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import numpy as np

from fl_ray.config import RunConfig
from fl_ray.context import RunContext
from fl_ray.errors import SettingError
from fl_ray.methods.base import Method, require_counts
from fl_ray.methods.server_training import Trained, refuse_headless, refuse_random_features
from fl_ray.runtime.base import Pending, RoundResult
from fl_ray.runtime.tasks import Evaluation, Task
from generators.base import Generator

__all__ = ["Centralised", "LocalOnly", "PromptsOnly", "PublicOnly", "ServerOnly"]


class LocalOnly(Method):
    """Every client trains its own model in every round and exchanges nothing; the accuracy is the mean over clients."""

    needs = "individual"
    exchanges_weights = False

    def __init__(self) -> None:
        self._own: dict[int, np.ndarray] = {}

    def cohort(self, run: RunContext, round_number: int, weights: np.ndarray) -> np.ndarray:
        return np.arange(run.config.data.clients)

    def tasks(self, run: RunContext, round_number: int, cohort: np.ndarray) -> list[Task]:
        return [Task(int(client), 1 / len(cohort), start=self._own.get(int(client))) for client in cohort]

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        self._own.update(result.weights)
        return weights

    def evaluate(self, run: RunContext, weights: np.ndarray, images: Any = None) -> Evaluation:
        own = [self._own.get(client, weights) for client in range(run.config.data.clients)]
        found = run.runtime.evaluate(own, images)
        return Evaluation(
            sum(evaluation.correct for evaluation in found),
            sum(evaluation.loss_sum for evaluation in found),
            sum(evaluation.count for evaluation in found),
        )

    def client_models(self, run: RunContext, weights: np.ndarray) -> dict[int | None, np.ndarray]:
        return {client: self._own.get(client, weights) for client in range(run.config.data.clients)}

    def models(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        return {f"client_{client:04d}.": own for client, own in sorted(self._own.items())}

    def state(self) -> dict[str, np.ndarray]:
        return {str(client): own for client, own in self._own.items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self._own = {int(client): own for client, own in state.items()}


class ServerOnly(Method):
    """One model that the server trains by itself on fixed images; the optimiser starts afresh each round.

    Args:
        server_epochs: epochs a round; default: training.local_epochs. Methods differ in how many images a round holds:
            the column "samples trained" of a comparison says whether rows had equal work.
        train: the ``full`` model, or its ``head`` alone, the last linear layer; the rest stays as it starts
            (``model.start``).
    """

    trains_clients = False
    exchanges_weights = False

    def __init__(self, server_epochs: int | None = None, train: Trained = "full") -> None:
        require_counts(server_epochs=server_epochs)
        self.server_epochs, self.head_only = server_epochs, train == "head"
        self._pending: Pending | None = None
        self._loss = float("nan")

    @abstractmethod
    def own_images(self, run: RunContext) -> tuple[np.ndarray, np.ndarray]:
        """The images and labels that it may use."""

    def check(self, config: RunConfig, generator: Generator | None) -> None:
        if self.head_only:
            refuse_random_features(config, "method.train")

    def setup(self, run: RunContext) -> None:
        if self.head_only:
            refuse_headless(run)
        images, labels = self.own_images(run)
        self._count = len(labels)
        self._images = run.runtime.put(images, labels)

    def before_training(self, run: RunContext, round_number: int, weights: np.ndarray, cohort: np.ndarray) -> None:
        how = round_number, self.epochs_on_server(run), None, self.head_only
        self._pending = run.runtime.train_on_server(self._images, weights, *how)

    def after_training(self, run: RunContext) -> None:
        self._trained, self._loss = self._pending.result()

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        return self._trained

    def server_samples(self, run: RunContext, round_number: int) -> int:
        return self._count * self.epochs_on_server(run)

    def train_loss(self, result: RoundResult) -> float:
        return self._loss


class Centralised(ServerOnly):
    """One model on all clients' training images pooled: the ceiling."""

    def own_images(self, run: RunContext) -> tuple[np.ndarray, np.ndarray]:
        rows = run.data.partition.owned()
        return run.data.images[rows], run.data.labels[rows]


class PublicOnly(ServerOnly):
    """The same model on exactly the public real images that the generator saw.

    Without this row a table flatters synthesis: what synthetic images bring, the real ones behind them may bring, too.

    Args:
        server_epochs, train: see ``ServerOnly``.
        part: ``public``, or the ``reserve`` (``data.reserve_fraction``) that generator ``real`` gives out.
    """

    def __init__(
        self,
        server_epochs: int | None = None,
        train: Trained = "full",
        part: Literal["public", "reserve"] = "public",
    ) -> None:
        super().__init__(server_epochs, train)
        self.part = part

    def own_images(self, run: RunContext) -> tuple[np.ndarray, np.ndarray]:
        images, labels = run.data.server_part(self.part)
        if len(labels) == 0:
            raise SettingError(
                f"public_only: data.{self.part}_fraction is 0, so there are no {self.part} images; raise it"
            )
        return images, labels


class PromptsOnly(ServerOnly):
    """The server's model trained on its generator's images of each class, with no client's guidance.

    Args:
        images_per_class: in all; FedLMG has so many for each client.
        server_epochs, train: see ``ServerOnly``.
    """

    uses_generator = True

    def __init__(self, images_per_class: int = 180, server_epochs: int | None = None, train: Trained = "full") -> None:
        super().__init__(server_epochs, train)
        require_counts(images_per_class=images_per_class)
        self.images_per_class = images_per_class

    def own_images(self, run: RunContext) -> tuple[np.ndarray, np.ndarray]:
        wanted = np.full(run.data.num_classes, self.images_per_class)
        with run.phases.phase("synthesis"):
            return run.synthesis.images(wanted, run.config.seed)
