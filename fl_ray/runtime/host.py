"""A client host: one resident LightningModule that trains any number of clients, one after another.

The Ray actor and the in-process backend are thin shells around it, so both do the same arithmetic.
"""

from __future__ import annotations

import resource
import time
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

from fl_ray.aggregation import ExactSum
from fl_ray.config import Component, TrainingConfig
from fl_ray.data.partitioners import Partition
from fl_ray.errors import ClientError
from fl_ray.model import ImageShape, WeightLayout, build_module
from fl_ray.runtime.local_training import has_batch_norm, lr_factor, train_locally

__all__ = ["ClientHost", "ClientRecord", "Evaluation", "Job", "JobData", "PartialResult", "Task", "peak_memory_mb"]

EVALUATION_BLOCK = 500


@dataclass(frozen=True)
class Job:
    """What a host must know of a run."""

    model: Component
    shape: ImageShape
    training: TrainingConfig
    seed: int
    rounds: int
    threads: int


@dataclass(frozen=True)
class JobData:
    """The arrays of a run; every client's images are rows of one array that all hosts of a machine share."""

    images: np.ndarray
    labels: np.ndarray
    partition: Partition
    held_out: Partition
    test_images: np.ndarray
    test_labels: np.ndarray

    @property
    def test_blocks(self) -> int:
        """Fixed blocks of test images; evaluations are summed in their order, whoever computes them."""
        return -(-len(self.test_labels) // EVALUATION_BLOCK)


@dataclass(frozen=True)
class Task:
    """One client's part of a round: its share of the sum, and its own starting weights where it keeps a model."""

    client: int
    share: float
    start: np.ndarray | None = None


@dataclass(frozen=True)
class ClientRecord:
    """What a client reports of a round. ``left_out`` says why its update is not in the sum, or is None."""

    client: int
    samples: int
    train_loss: float
    share: float
    started: float
    ended: float
    left_out: str | None = None


@dataclass
class PartialResult:
    """One host's part of a round: the exact sum of its clients' updates, or their weights one by one."""

    total: np.ndarray | None
    weights: dict[int, np.ndarray]
    records: list[ClientRecord]


@dataclass(frozen=True)
class Evaluation:
    """Correct answers, summed cross-entropy and count over a set of images."""

    correct: int
    loss_sum: float
    count: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.count

    @property
    def loss(self) -> float:
        return self.loss_sum / self.count


class ClientHost:
    """Holds the module and the data; ``device`` is where it computes."""

    def __init__(self, job: Job, data: JobData, device: torch.device | None = None) -> None:
        torch.set_num_threads(job.threads)
        # Lightning warns at each self.log() outside its Trainer; a module of the user's own may log.
        warnings.filterwarnings("ignore", message=".*`self.trainer` reference is not registered.*")
        # Arrays from Ray's object store are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message=".*NumPy array is not writable.*")
        self.job, self.data = job, data
        self.device = device or torch.device("cpu")
        self.module = build_module(job.model, job.shape, job.training).to(self.device)
        self.layout = WeightLayout(self.module)
        self._test: list[tuple[torch.Tensor, torch.Tensor]] | None = None

    def train(self, tasks: list[Task], weights: np.ndarray, round_number: int, individual: bool) -> PartialResult:
        """Train each task's client from ``weights`` (or its own start).

        Args:
            individual: return every client's new weights, instead of the sum of share * (new - old).
        """
        common = torch.from_numpy(weights)
        total = None if individual else ExactSum(self.layout.size)
        result = PartialResult(None, {}, [])
        for task in tasks:
            start = common if task.start is None else torch.from_numpy(task.start)
            record, update, trained = self._train_client(task, start, round_number)
            if record.left_out is None:
                if total is None:
                    result.weights[task.client] = trained.numpy()
                else:
                    total.add(update, task.share)
            result.records.append(record)
        result.total = None if total is None else total.total.numpy()
        return result

    def _train_client(
        self, task: Task, start: torch.Tensor, round_number: int
    ) -> tuple[ClientRecord, torch.Tensor, torch.Tensor]:
        started = time.time()
        rows = self.data.partition.of(task.client)
        if len(rows) == 1 and has_batch_norm(self.module):
            why = "batch norm can't train on its one sample (data.partition.min_samples 2 avoids it)"
            nothing = torch.zeros(self.layout.size)
            return ClientRecord(task.client, 1, float("nan"), task.share, started, time.time(), why), nothing, start
        self.layout.write(start)
        try:
            loss = self._fit(self.data.images[rows], self.data.labels[rows], "client", round_number, task.client)
        except Exception as error:
            raise ClientError(
                f"client {task.client}, round {round_number + 1}, local training on {len(rows)} samples: "
                f"{type(error).__name__}: {error}"
            ) from error
        trained = self.layout.read()
        update = trained - start
        left_out = None if ExactSum.fits(update) and np.isfinite(loss) else "its update is not finite (or above 2^20)"
        return ClientRecord(task.client, len(rows), loss, task.share, started, time.time(), left_out), update, trained

    def _fit(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        who: str,
        round_number: int,
        number: int,
        epochs: int | None = None,
    ) -> float:
        training = self.job.training
        x = self.job.shape.normalise(images, self.device)
        y = torch.from_numpy(labels).to(self.device)
        factor = lr_factor(training, round_number, self.job.rounds)
        key = (self.job.seed, who, round_number, number)
        return train_locally(self.module, x, y, training, epochs or training.local_epochs, factor, key)

    def train_on(
        self, images: np.ndarray, labels: np.ndarray, weights: np.ndarray, round_number: int, epochs: int
    ) -> tuple[np.ndarray, float]:
        """Train from ``weights`` on the server's images; the new weights and the mean loss."""
        self.layout.write(torch.from_numpy(weights))
        loss = self._fit(images, labels, "server", round_number, 0, epochs)
        return self.layout.read().numpy(), loss

    def evaluate_test(self, weights: np.ndarray, blocks: list[int]) -> list[Evaluation]:
        """Evaluate on blocks of the global test images."""
        if self._test is None:  # normalised once, then kept
            x = self.job.shape.normalise(self.data.test_images, self.device).split(EVALUATION_BLOCK)
            y = torch.from_numpy(self.data.test_labels).to(self.device).split(EVALUATION_BLOCK)
            self._test = list(zip(x, y, strict=True))
        self.layout.write(torch.from_numpy(weights))
        return [self._evaluate(*self._test[block]) for block in blocks]

    def evaluate_clients(self, weights: np.ndarray, clients: list[int]) -> list[Evaluation | None]:
        """Evaluate on each client's held-out images; None where it has none."""
        self.layout.write(torch.from_numpy(weights))
        found: list[Evaluation | None] = []
        for client in clients:
            rows = self.data.held_out.of(client)
            if len(rows) == 0:
                found.append(None)
                continue
            x = self.job.shape.normalise(self.data.images[rows], self.device)
            found.append(self._evaluate(x, torch.from_numpy(self.data.labels[rows]).to(self.device)))
        return found

    @torch.no_grad()
    def _evaluate(self, x: torch.Tensor, y: torch.Tensor) -> Evaluation:
        self.module.eval()
        logits = self.module(x)
        correct = int((logits.argmax(dim=1) == y).sum())
        loss = float(functional.cross_entropy(logits.double(), y, reduction="sum"))
        return Evaluation(correct, loss, len(y))


def peak_memory_mb() -> float:
    """The largest resident size that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
