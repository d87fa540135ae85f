"""One round: every client trains a classifier of its own to the end and sends it once. What the server makes of them
is up to the method; here are FedDF and the clients' ensemble, the others stand in files of their own.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from fl_ray.config import Component, RunConfig, TrainingConfig
from fl_ray.context import RunContext
from fl_ray.errors import SettingError, TooFewClientsError
from fl_ray.methods.base import Method, require_counts
from fl_ray.methods.server_training import AS_FEDLMG, ServerTraining, refuse_headless, refuse_random_features
from fl_ray.model import ImageShape, build_module, initial_weights
from fl_ray.recipes import make_component
from fl_ray.runtime.base import RoundResult
from fl_ray.runtime.tasks import Evaluation, Task
from generators.base import Generator

__all__ = ["Ensemble", "FedDF", "OneShot"]


class OneShot(Method):
    """What one-shot methods share: clients' own architectures, their uploads, and how the server trains.

    Args:
        client_models: a model each (a name, or a mapping with its settings), by client number, begun again where there
            are more clients; default: all train the recipe's ``model``, which otherwise is the server's alone.
        server: how the server trains, see ``ServerTraining``.
    """

    needs = "individual"
    server_waits = True
    weighs_clients = False
    keeps_client_models = True

    def __init__(
        self,
        client_models: list[Any] | None = None,
        server: ServerTraining = AS_FEDLMG,
    ) -> None:
        # A recipe's settings come as mappings; jsonargparse has checked the keys. Older runs have null.
        self.server = ServerTraining(**server) if isinstance(server, dict) else server or AS_FEDLMG
        self.server_epochs = self.server.epochs
        chosen = [{"name": each} if isinstance(each, str) else each for each in client_models or []]
        for each in chosen:
            if not isinstance(each, dict) or "name" not in each:
                raise ValueError(f"client_models: {each!r} is neither a model's name nor a mapping with its name")
        self.own_models = tuple(make_component("model", dict(each)) for each in chosen)
        self.uploads: dict[int, np.ndarray] = {}
        self._samples = 0  # that the server's training had

    def check(self, config: RunConfig, generator: Generator | None) -> None:
        if config.rounds != 1:
            raise SettingError(f"rounds is {config.rounds}, but method {config.method.name} has one round; set it to 1")
        if config.cohort_size != config.data.clients:
            raise SettingError(
                f"clients_per_round is {config.cohort_size}, but in the one round of {config.method.name} all "
                f"{config.data.clients} clients take part; leave it out"
            )
        if self.own_models and config.updates:
            raise SettingError("updates: clients with models of their own send them whole; leave updates out")
        if self.own_models and config.runtime.training_path == "batched":
            raise SettingError("runtime.training_path is batched, but models of several kinds are trained one by one")
        if self.server.head_only and not self.averages_first:
            refuse_random_features(config, "method.server.train")

    @property
    def averages_first(self) -> bool:
        """Whether the server starts from the clients' average."""
        return False

    def setup(self, run: RunContext) -> None:
        config, shape = run.config, ImageShape.of(run.data.source)
        for model in self.own_models:
            _refuse_unfit("method.client_models", model, shape, config.training)
        if self.own_models:
            _refuse_unfit("model", config.model, shape, config.training)
        known = config.training, config.seed, run.notes
        self._starts = [initial_weights(model, shape, *known) for model in self.own_models]
        if self.server.head_only:
            refuse_headless(run)

    def tasks(self, run: RunContext, round_number: int, cohort: np.ndarray) -> list[Task]:
        made = super().tasks(run, round_number, cohort)
        if not self.own_models:
            return made
        held = [run.runtime.hold(start) for start in self._starts]
        return [Task(task.client, task.share, start=held[task.client % len(held)]) for task in made]

    def link_bytes(self, run: RunContext, cohort: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Nothing goes down; a client sends its own classifier, running statistics and all, in fp32."""
        if not self.own_models:
            return np.zeros(len(cohort), dtype=np.int64), super().link_bytes(run, cohort)[1]
        sizes = np.array([4 * len(start) for start in self._starts])
        return np.zeros(len(cohort), dtype=np.int64), sizes[cohort % len(sizes)]

    def aggregate(self, run: RunContext, round_number: int, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        self.uploads = dict(sorted(result.weights.items()))
        if not self.uploads:
            raise TooFewClientsError("no client's classifier came in, so the server has nothing to learn from")
        return self.learn(run, weights, result)

    @abstractmethod
    def learn(self, run: RunContext, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        """The server's model, of ``self.uploads``; ``weights`` are where it starts."""

    def train(self, run: RunContext, weights: np.ndarray, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Train the server's model with cross-entropy against ``targets``, float32 [N, classes] or int64 [N]."""
        self._samples = len(images)
        handle = run.runtime.put(images, targets)
        with run.phases.phase("train"):
            how = self.server.epochs, self.server.training(), self.server.head_only
            trained, _ = run.runtime.train_on_server(handle, weights, 0, *how).result()
        return trained

    def server_samples(self, run: RunContext, round_number: int) -> int:
        return self._samples * self.server.epochs

    def uploaded(self) -> dict[int, np.ndarray]:
        return self.uploads

    def state(self) -> dict[str, np.ndarray]:
        return {str(client): weights for client, weights in self.uploads.items()}

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        self.uploads = {int(client): state[client] for client in sorted(state, key=int)}


def _refuse_unfit(setting: str, model: Component, shape: ImageShape, training: TrainingConfig) -> None:
    """Refuse a client's or the server's model that is no classifier of these images, before any client is trained."""
    module = build_module(model, shape, training)
    if hasattr(module, "evaluation"):
        raise SettingError(f"{setting}: {model.name} is no classifier; take another")
    size = shape.channels, shape.size, shape.size
    try:
        with torch.no_grad():
            given = tuple(module.eval()(torch.zeros(1, *size)).shape)
    except (RuntimeError, ValueError, AssertionError) as error:  # torchvision asserts
        raise SettingError(
            f"{setting}: {model.name} can't take images of {' x '.join(map(str, size))} ({error}); take another"
        ) from error
    if given != (1, shape.classes):
        raise SettingError(
            f"{setting}: {model.name} gives numbers of the shape {list(given)} for an image, but "
            f"{[1, shape.classes]} are needed, one for each class; take another"
        )


class Ensemble(OneShot):
    """The clients' classifiers side by side: the mean of their probabilities decides. No model comes of it."""

    def __init__(self, client_models: list[Any] | None = None) -> None:
        super().__init__(client_models)

    def learn(self, run: RunContext, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        return weights

    def evaluate(self, run: RunContext, weights: np.ndarray, images: Any = None) -> Evaluation:
        given = run.runtime.predict(self.uploads, images).values()
        mean = np.mean([np.exp(each) for each in given], axis=0)
        labels = run.data.test_labels if images is None else run.runtime.labels_of(images)
        right = mean[np.arange(len(labels)), labels].astype(np.float64)
        correct = int((mean.argmax(axis=1) == labels).sum())
        return Evaluation(correct, float(-np.log(np.maximum(right, 1e-12)).sum()), len(labels))

    def check(self, config: RunConfig, generator: Generator | None) -> None:
        super().check(config, generator)
        if config.gradient_cosine_every:
            raise SettingError("gradient_cosine_every: an ensemble has no weights to take gradients at; set it to 0")

    def evaluate_at_clients(
        self, run: RunContext, weights: np.ndarray, clients: Sequence[int]
    ) -> list[Evaluation | None]:
        data, found = run.data, []
        for client in clients:
            rows = data.held_out.of(client)
            handle = run.runtime.put(data.images[rows], data.labels[rows])
            found.append(self.evaluate(run, weights, handle) if len(rows) else None)
        return found

    def models(self, weights: np.ndarray) -> dict[str, np.ndarray]:
        return {}


class FedDF(OneShot):
    """FedDF (arXiv 2006.07242), once: the server's model is distilled from the mean of the clients' logits.

    Without ``client_models`` all clients have the server's architecture, and it starts from their average, as in the
    paper; otherwise afresh.

    Args:
        distil_on: ``public`` images (their labels are not used), or ``synthetic`` ones of the recipe's generator.
        images_per_class: of the synthetic ones.
        client_models, server: see ``OneShot``.
    """

    needs_classes = False  # the clients' logits are all that is learned from

    def __init__(
        self,
        distil_on: Literal["public", "synthetic"] = "public",
        images_per_class: int = 180,
        client_models: list[Any] | None = None,
        server: ServerTraining = AS_FEDLMG,
    ) -> None:
        super().__init__(client_models, server)
        require_counts(images_per_class=images_per_class)
        self.distil_on, self.images_per_class = distil_on, images_per_class
        self.uses_generator = distil_on == "synthetic"

    def check(self, config: RunConfig, generator: Generator | None) -> None:
        super().check(config, generator)
        if self.distil_on == "public" and config.data.public_fraction == 0:
            raise SettingError("feddf: data.public_fraction is 0, so there are no public images; raise it")

    def learn(self, run: RunContext, weights: np.ndarray, result: RoundResult) -> np.ndarray:
        if self.distil_on == "synthetic":
            with run.phases.phase("synthesis"):
                wanted = np.full(run.data.num_classes, self.images_per_class)
                images, labels = run.synthesis.images(wanted, run.config.seed)
        else:
            images, labels = run.data.public_images, run.data.public_labels
        given = run.runtime.predict(self.uploads, run.runtime.put(images, labels))
        # The mean of logits is that of log-probabilities but for a constant of each model and image.
        logits = np.mean(list(given.values()), axis=0)
        odds = np.exp(logits - logits.max(axis=1, keepdims=True))
        targets = (odds / odds.sum(axis=1, keepdims=True)).astype(np.float32)
        return self.train(run, result.average() if self.averages_first else weights, images, targets)

    @property
    def averages_first(self) -> bool:
        return not self.own_models
