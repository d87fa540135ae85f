"""GenFL of TU Delft (P. K. Cho): the global model is pre-trained on images of a generator that the clients trained.

Stage 1, before the run: a generator; with ``generator.training: federated`` the clients train it themselves
(``fl_ray.federated_generator``), and its time and energy are the run's first. Stage 2: the server makes images with
uniform labels and trains the model on them with Adam. Stage 3: FedAvg from there, or (``local_training: false``)
nothing, which the poster recommends where the skew is extreme.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from fl_ray.allocation.categories import water_fill
from fl_ray.config import TrainingConfig
from fl_ray.context import RunContext
from fl_ray.data.label_sharing import SharedLabels
from fl_ray.devices.cost import server_time_s
from fl_ray.methods.fedavg import FedAvg
from fl_ray.runtime.base import mean_evaluations, sum_evaluations
from fl_ray.runtime.tasks import Evaluation, ServerTraining, Task

__all__ = ["GenFLPretrain"]


class GenFLPretrain(FedAvg):
    """Pre-training on synthetic images, then FedAvg.

    Args:
        images: synthetic images, as many of each class (one more of the first classes where that does not divide).
        pretrain_epochs: on them; 0 is FedAvg from scratch, which needs no generator.
        pretrain_lr, pretrain_batch_size: of Adam.
        local_training: whether clients train at all; without it one round is enough.
        weighting: shares of the average: ``size`` by samples, or ``class_balanced`` by samples in which every class of
            the cohort counts alike, by label counts that each client shares once (our reconstruction of what the poster
            asks for).
        protocol: of the accuracy in history and summary: ``clean`` on the test part; ``delft`` as TU Delft's code, on
            the clients' own training images, which all that is said of a test accuracy then means (also the choice of
            the best model). Every client counts alike: their code weighs clients by sizes that it has shuffled among
            them, and the plain mean is what that is expected to be. summary.json then has ``accuracy_of``,
            ``clean_accuracy`` and ``size_weighted_accuracy`` (of the same images by the clients' true sizes), too.
        cas_epochs: 0, or epochs of a fresh model on the synthetic images for summary.json's ``cas`` [%] (20 at Delft).
            With ``delft`` it is the mean over epochs on all real images, and the model stays in evaluation mode after
            its first epoch; with ``clean`` it is the last epoch's accuracy on the test part.
    """

    def __init__(
        self,
        images: int = 60_000,
        pretrain_epochs: int = 5,
        pretrain_lr: float = 1e-3,
        pretrain_batch_size: int = 32,
        local_training: bool = True,
        weighting: Literal["size", "class_balanced"] = "size",
        protocol: Literal["clean", "delft"] = "clean",
        cas_epochs: int = 0,
    ) -> None:
        super().__init__()
        least = {"images": (images, 1), "pretrain_epochs": (pretrain_epochs, 0), "cas_epochs": (cas_epochs, 0)}
        for name, (value, bound) in {**least, "pretrain_batch_size": (pretrain_batch_size, 1)}.items():
            if value < bound:
                raise ValueError(f"{name} is {value}, but it must be at least {bound}")
        if not pretrain_lr > 0:
            raise ValueError(f"pretrain_lr is {pretrain_lr}, but it must be positive")
        if not local_training and pretrain_epochs == 0:
            raise ValueError("local_training is false and pretrain_epochs is 0, so nothing would be trained; raise it")
        self.images, self.pretrain_epochs, self.cas_epochs = images, pretrain_epochs, cas_epochs
        self.pretrain_lr, self.pretrain_batch_size = pretrain_lr, pretrain_batch_size
        self.weighting, self.protocol = weighting, protocol
        self.asynchronous = weighting == "size"  # FedBuff's updates have shares of their own
        self.trains_clients = self.exchanges_weights = local_training
        self.uses_generator = pretrain_epochs > 0 or cas_epochs > 0
        self._begun: ServerTraining | None = None  # of CAS or of the pre-training, whichever is at work

    def start(self, run: RunContext, weights: np.ndarray) -> Iterator[np.ndarray]:
        """Stage 2, kept after every epoch; the drawn weights stay where there is no pre-training."""
        if self.weighting == "class_balanced" and "label_sharing" not in run.notes:
            labels = SharedLabels(run.data, "counts", 0.0, run.config.seed)
            run.ledger.bytes_up += labels.bytes_per_client * run.config.data.clients
            run.notes["label_sharing"] = labels.note()
        score = self.cas_epochs > 0 and "cas" not in run.notes
        pretrain = self.pretrain_epochs > 0 and "pretrained_accuracy" not in run.notes
        if not (score or pretrain):
            return
        counts = water_fill(np.zeros(run.data.num_classes, dtype=np.int64), self.images)
        with run.phases.phase("synthesis"):
            images = run.runtime.put(*run.synthesis.images(counts, run.config.seed))
        adam = TrainingConfig("adam", self.pretrain_lr, batch_size=self.pretrain_batch_size)
        if score:
            for _ in self._score(run, images, weights, adam):
                yield weights
        if pretrain:
            yield from self._pretrain(run, images, weights, adam)

    def _score(self, run: RunContext, images: Any, weights: np.ndarray, adam: TrainingConfig) -> Iterator[None]:
        """CAS (Ravuri & Vinyals, arXiv 1905.10887), epoch by epoch.

        With ``delft`` the real images are the test part and the clients' own together (one that several clients have
        counts for each of them), and the module stays in evaluation mode from its second epoch on, as in TU Delft's
        code.
        """
        run.progress.message(f"CAS: {self.cas_epochs} epochs on {self.images} synthetic images")
        delft, scores = self.protocol == "delft", run.notes.setdefault("cas_epochs", [])
        state = self._begun or ServerTraining(weights)
        for epoch in range(state.epochs, self.cas_epochs):
            with run.phases.phase("train"):
                state = run.runtime.train_epoch(images, state, adam, "score", training_mode=epoch == 0 or not delft)
            with run.phases.phase("evaluate"):
                real = run.runtime.evaluate([state.weights])
                real += self._on_own_images(run, state.weights) if delft else []
            scores.append(sum_evaluations(real).accuracy)
            run.progress.steps("CAS epoch", epoch + 1, self.cas_epochs, f"accuracy {scores[-1]:.3f}")
            self._begun = state if epoch + 1 < self.cas_epochs else None
            if self._begun is None:
                run.notes["cas"] = 100 * float(np.mean(scores) if delft else scores[-1])
            yield

    def _pretrain(
        self, run: RunContext, images: Any, weights: np.ndarray, adam: TrainingConfig
    ) -> Iterator[np.ndarray]:
        """The weights after each epoch."""
        run.progress.message(f"pre-training: {self.pretrain_epochs} epochs on {self.images} synthetic images")
        state = self._begun or ServerTraining(weights)
        for epoch in range(state.epochs, self.pretrain_epochs):
            with run.phases.phase("train"):
                state = run.runtime.train_epoch(images, state, adam, "server")
            run.progress.steps("pre-training epoch", epoch + 1, self.pretrain_epochs, f"loss {state.loss:.3f}")
            self._begun = state if epoch + 1 < self.pretrain_epochs else None
            if self._begun is None:
                self._book(run)
                run.notes["pretrained_accuracy"] = run.runtime.evaluate([state.weights])[0].accuracy
            yield state.weights

    def state(self) -> dict[str, np.ndarray]:
        found = super().state()
        if self._begun is not None:
            found["begun/weights"], found["begun/epochs"] = self._begun.weights, np.array([self._begun.epochs])
            found["begun/left"] = np.frombuffer(self._begun.left, dtype=np.uint8)
        return found

    def load_state(self, state: dict[str, np.ndarray]) -> None:
        rest = dict(state)
        weights, left, epochs = (rest.pop(f"begun/{name}", None) for name in ("weights", "left", "epochs"))
        self._begun = None if weights is None else ServerTraining(weights, epochs.item(), left.tobytes())
        super().load_state(rest)

    def _book(self, run: RunContext) -> None:
        """Stage 2 on the clock: the clients wait for it."""
        samples = self.images * self.pretrain_epochs
        run.ledger.samples_trained += samples
        run.ledger.advance(run.ledger.virtual_time_s + server_time_s(run.config.fleet, run.fleet, samples))

    def tasks(self, run: RunContext, round_number: int, cohort: np.ndarray) -> list[Task]:
        made = super().tasks(run, round_number, cohort)
        return self.balanced(run, made) if self.weighting == "class_balanced" and made else made

    def balanced(self, run: RunContext, made: list[Task]) -> list[Task]:
        """The tasks with shares in which every class that the cohort has counts alike."""
        counts = run.data.counts(np.array([task.client for task in made]))
        present = counts.sum(axis=0) > 0
        shares = (counts[:, present] / counts[:, present].sum(axis=0)).mean(axis=1)
        return [replace(task, share=float(share)) for task, share in zip(made, shares, strict=True)]

    def evaluate(self, run: RunContext, weights: np.ndarray, images: Any = None) -> Evaluation:
        clean = super().evaluate(run, weights, images)
        if self.protocol == "clean" or images is not None:
            return clean
        own = self._on_own_images(run, weights)
        run.notes["accuracy_of"] = "the clients' own training images, every client alike"
        for name, accuracy in (("clean", clean.accuracy), ("size_weighted", sum_evaluations(own).accuracy)):
            run.notes[f"{name}_accuracy"] = accuracy
            run.notes.setdefault(f"{name}_accuracies", []).append(accuracy)
        return mean_evaluations(own)

    def _on_own_images(self, run: RunContext, weights: np.ndarray) -> list[Evaluation]:
        """On the training images of each client that has any."""
        own = run.runtime.evaluate_clients({None: weights}, list(range(run.config.data.clients)), "partition")
        return [each for each in own if each is not None]
