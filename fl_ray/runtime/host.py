"""A client host: one resident LightningModule that trains any number of clients, one after another or batched.

The Ray actor and the in-process backend are thin shells around it, so both do the same arithmetic.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fl_ray.aggregation import ExactSum
from fl_ray.config import TrainingConfig
from fl_ray.errors import FlRayError
from fl_ray.head import frozen_but_head
from fl_ray.model import optimizer_settings
from fl_ray.randomness import numpy_generator
from fl_ray.runtime import memory
from fl_ray.runtime.base import ServerWork
from fl_ray.runtime.batched import BatchedClients, BatchedTraining
from fl_ray.runtime.host_tests import HostTests
from fl_ray.runtime.local_training import Correction, Key, has_batch_norm, lr_factor, train_epoch, train_locally
from fl_ray.runtime.tasks import (
    ClientRecord,
    Job,
    JobData,
    LeftOut,
    PartialResult,
    RoundSettings,
    ServerTraining,
    Task,
    TrainingPath,
)
from fl_ray.runtime.training_path import choose_path
from fl_ray.updates import UpdateChain

__all__ = ["ClientHost"]

_BATCHED_BYTES = 2**26  # of the stacked parameters of clients that are computed together
_BATCHED_CLIENTS = 64
_TRIAL_BATCHES = 50
_ONE_SAMPLE = LeftOut("one_sample", "batch norm can't train on its one sample (data.partition.min_samples 2 avoids it)")
_NOT_FINITE = LeftOut("not_finite", "its update is not finite (or above 2^20)")


@dataclass(frozen=True)
class _Outcome:
    """How one client's training went: ``trained`` is its whole state, or None with the reason in ``left_out``."""

    task: Task
    started: float
    trained: torch.Tensor | None = None
    loss: float = float("nan")
    left_out: LeftOut | None = None
    raised: str | None = None


class ClientHost(HostTests):
    """Holds the module and the data; ``device`` is where it computes.

    Args:
        fetch: makes weights of a handle in ``Task.start``.
    """

    def __init__(
        self,
        job: Job,
        data: JobData,
        device: torch.device | None = None,
        fetch: Callable[[Any], np.ndarray] = lambda handle: handle,
    ) -> None:
        torch.set_num_threads(job.threads)
        # Lightning warns at each self.log() outside its Trainer; a module of the user's own may log.
        warnings.filterwarnings("ignore", message=".*`self.trainer` reference is not registered.*")
        # Arrays from Ray's object store are read-only; nothing here writes to them.
        warnings.filterwarnings("ignore", message=".*NumPy array is not writable.*")
        self.job, self.data, self._fetch = job, data, fetch
        self.device = device or torch.device("cpu")
        self._residents = {}
        self._take(0)
        self._updates = UpdateChain(job.updates, self.layout.is_parameter, job.seed)
        self._batched: BatchedTraining | None = None
        self._test: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._trial = False  # while the training path is chosen: one epoch of a few batches

    def train(self, tasks: Sequence[Task], weights: np.ndarray, settings: RoundSettings) -> PartialResult:
        """Train each task's client from ``weights`` (or its own start)."""
        began = time.time()
        self._take(0)
        total = None if settings.individual else ExactSum(self.layout.size)
        result = PartialResult(None)
        at_once = self.most_together() if settings.path == "batched" else 1
        work = self.train_batched if settings.path == "batched" else self._train_plain
        common = torch.from_numpy(weights)
        for first in range(0, len(tasks), at_once):
            group = tasks[first : first + at_once]
            starts = [common if task.start is None else self._start_of(task) for task in group]
            self._take_in(self._safely(work, group, starts, settings), starts, total, result, settings)
        if settings.pace is not None:
            result.records = _paced(result.records, tasks, began, settings.pace)
        result.total = None if total is None else total.total
        return result

    def most_together(self) -> int:
        """Clients that the batched path computes at a time."""
        return max(1, min(_BATCHED_CLIENTS, _BATCHED_BYTES // (4 * self.layout.size)))

    def _start_of(self, task: Task) -> torch.Tensor:
        return torch.from_numpy(np.asarray(self._fetch(task.start)))

    def _take_in(
        self,
        outcomes: Sequence[_Outcome],
        starts: Sequence[torch.Tensor],
        total: ExactSum | None,
        result: PartialResult,
        settings: RoundSettings,
    ) -> None:
        """Add the outcomes' updates to the sum (or keep their weights), and their records."""
        trained = [place for place, outcome in enumerate(outcomes) if outcome.trained is not None]
        good: set[int] = set()
        if trained:
            updates = _rows([outcomes[place].trained for place in trained]) - _rows([starts[p] for p in trained])
            if self._updates:
                tasks = [outcomes[place].task for place in trained]
                turns = [_turn(task, settings) for task in tasks]
                pairs = zip(updates, turns, [task.client for task in tasks], strict=True)
                updates = torch.stack([self._updates.apply(*pair) for pair in pairs])
            finite = ExactSum.fits(updates).tolist()
            kept = [row for row, place in enumerate(trained) if finite[row] and np.isfinite(outcomes[place].loss)]
            good = {trained[row] for row in kept}
            if len(kept) < len(trained):
                updates = updates[kept]
            tasks = [outcomes[place].task for place in sorted(good)]
            if total is None:
                for place, update, task in zip(sorted(good), updates, tasks, strict=True):
                    new = starts[place] + update if self._updates else outcomes[place].trained
                    result.weights[task.client] = new.numpy()
            elif tasks:
                total.add(updates, [task.share * task.scale for task in tasks])
        sizes, now = self.data.partition.sizes, time.time()
        for place, outcome in enumerate(outcomes):
            left_out = outcome.left_out
            if left_out is None and place not in good:
                left_out = _NOT_FINITE
            client, share = outcome.task.client, outcome.task.share
            result.records.append(
                ClientRecord(
                    client,
                    int(sizes[client]),
                    outcome.loss,
                    share,
                    outcome.started,
                    now,
                    left_out,
                    outcome.raised,
                    _turn(outcome.task, settings),
                )
            )

    def _safely(
        self,
        work: Callable[..., list[_Outcome]],
        tasks: Sequence[Task],
        starts: Sequence[torch.Tensor],
        settings: RoundSettings,
    ) -> list[_Outcome]:
        """The tasks' outcomes; a client whose training raises is tried once more, then left out."""
        started = time.time()
        try:
            return work(tasks, starts, settings)
        except FlRayError:
            raise  # a setting that no client can be trained with
        except Exception as error:  # a user's module raises anything; it is told, and counted
            if settings.strict:
                raise
            first = self._told(error, tasks, settings)
        if len(tasks) > 1:  # find out whose it is
            pairs = zip(tasks, starts, strict=True)
            found = [one for task, start in pairs for one in self._safely(work, [task], [start], settings)]
            if all(one.raised is None for one in found):  # nobody's by itself, or it passed: still, it is told
                found[0] = replace(found[0], raised=first)
            return found
        try:
            return [replace(outcome, raised=first) for outcome in work(tasks, starts, settings)]
        except Exception as error:  # noqa: BLE001 - as above
            again = self._told(error, tasks, settings)
        return [_Outcome(tasks[0], started, left_out=LeftOut("raised", f"raised twice: {again}"), raised=first)]

    def _told(self, error: Exception, tasks: Sequence[Task], settings: RoundSettings) -> str:
        clients = [task.client for task in tasks]
        samples = int(self.data.partition.sizes[clients].sum())
        who = f"client {clients[0]}" if len(clients) == 1 else f"clients {', '.join(map(str, clients))} together"
        said = f"{type(error).__name__}: {error}"
        return f"{who}, round {settings.number + 1}, local training on {samples} samples: {said}"

    def _train_plain(
        self, tasks: Sequence[Task], starts: Sequence[torch.Tensor], settings: RoundSettings
    ) -> list[_Outcome]:
        return [self.train_one(task, start, settings) for task, start in zip(tasks, starts, strict=True)]

    def train_one(self, task: Task, start: torch.Tensor, settings: RoundSettings) -> _Outcome:
        """One client by itself, from ``start`` [size]."""
        started = time.time()
        self._take(self.job.model_of(task.client))
        rows = self.rows(task, settings)
        if len(rows) == 1 and has_batch_norm(self.module):
            return _Outcome(task, started, left_out=_ONE_SAMPLE)
        self.layout.write(start)
        loss = self._fit(
            *self._inputs(rows),
            settings.number,
            self._key(task, settings),
            self._epochs(),
            correction=self._correction(task, start, settings),
        )
        return _Outcome(task, started, self.layout.read(), loss)

    def train_batched(
        self, tasks: Sequence[Task], starts: Sequence[torch.Tensor], settings: RoundSettings
    ) -> list[_Outcome]:
        """All clients as one program."""
        started = time.time()
        if self._batched is None:
            self._batched = BatchedTraining(self.module)
        own = [self.rows(task, settings) for task in tasks]
        base = _rows(starts)  # [1, size] where all start alike
        self.layout.write(starts[0])  # for the buffers: ``_unfit`` has seen that they stay
        x, y = self._inputs(np.concatenate(own))
        offsets = [self._offset(task) for task in tasks]
        clients = BatchedClients(
            x,
            y,
            [len(rows) for rows in own],
            [self._key(task, settings) for task in tasks],
            [tensor.expand(len(tasks), *tensor.shape[1:]) for tensor in self.layout.parameters(base.to(self.device))],
            [torch.stack(tensors) for tensors in zip(*offsets, strict=True)] if offsets[0] else [],
        )
        training = self.job.training
        factor = lr_factor(training, settings.number, self.job.rounds)
        trained, losses = self._batched.train(clients, training, self._epochs(), factor, settings.proximal)
        states = base.expand(len(tasks), -1).clone()
        for view, values in zip(self.layout.parameters(states), trained, strict=True):
            view.copy_(values)
        return [_Outcome(task, started, state, loss) for task, state, loss in zip(tasks, states, losses, strict=True)]

    def rows(self, task: Task, settings: RoundSettings) -> np.ndarray:
        """The images that a task trains on."""
        rows, training = self.data.partition.of(task.client), self.job.training
        if training.sample_fraction < 1:
            rng = numpy_generator(self.job.seed, "client/samples", _turn(task, settings), task.client)
            rows = rng.choice(rows, int(training.samples_of(np.array(len(rows)))), replace=False)
        return rows[: _TRIAL_BATCHES * training.batch_size] if self._trial else rows

    def _epochs(self) -> int:
        return 1 if self._trial else self.job.training.local_epochs

    def _key(self, task: Task, settings: RoundSettings) -> Key:
        return (self.job.seed, "client", _turn(task, settings), task.client)

    def _offset(self, task: Task) -> list[torch.Tensor]:
        if task.offset is None:
            return []
        return [tensor.to(self.device) for tensor in self.layout.parameters(torch.from_numpy(task.offset))]

    def _correction(self, task: Task, start: torch.Tensor, settings: RoundSettings) -> Correction | None:
        if task.offset is None and settings.proximal == 0:
            return None
        around = [tensor.to(self.device) for tensor in self.layout.parameters(start)] if settings.proximal else []
        return Correction(settings.proximal, around, self._offset(task))

    def _fit(
        self,
        x: torch.Tensor,
        y: torch.Tensor,
        round_number: int,
        key: Key,
        epochs: int,
        correction: Correction | None = None,
        training: TrainingConfig | None = None,
        head: torch.nn.Module | None = None,
    ) -> float:
        training = training or self.job.training
        x = x.contiguous(memory_format=self._format)
        factor = lr_factor(training, round_number, self.job.rounds)
        return train_locally(self.module, x, y, training, epochs, factor, key, correction, head)

    def resolve_path(
        self, wanted: str, clients: Sequence[int], at_once: int, weights: np.ndarray
    ) -> tuple[TrainingPath, str]:
        """See ``fl_ray.runtime.training_path.choose_path``."""
        if wanted == "plain":
            return "plain", "it is set"
        self._trial = True
        try:
            return choose_path(self, wanted, clients, at_once, weights)
        finally:
            self._trial = False

    def train_on(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        weights: np.ndarray,
        round_number: int,
        epochs: int,
        training: TrainingConfig | None = None,
        head_only: bool = False,
    ) -> tuple[np.ndarray, float]:
        """Train from ``weights`` on the server's images, all or the head alone; the new weights and the mean loss."""
        self._load(weights)
        x = self._shape.normalise(images, self.device)
        y = torch.from_numpy(labels).to(self.device)
        key = (self.job.seed, "server", round_number, 0)
        part = frozen_but_head(self.module, self._shape.classes) if head_only else nullcontext()
        with self._optimised_by(training), part as head:
            loss = self._fit(x, y, round_number, key, epochs, training=training, head=head)
        return self.layout.read().numpy(), loss

    def train_epoch(
        self,
        images: np.ndarray,
        labels: np.ndarray,
        before: ServerTraining,
        training: TrainingConfig,
        purpose: str,
        training_mode: bool = True,
    ) -> ServerTraining:
        """See ``Runtime.train_epoch``."""
        self._load(before.weights)
        x = self._shape.normalise(images, self.device).contiguous(memory_format=self._format)
        y = torch.from_numpy(labels).to(self.device)
        key = (self.job.seed, purpose, 0, 0)
        with self._optimised_by(training):
            left, loss = train_epoch(self.module, x, y, training, before.epochs, key, before.left, training_mode)
        return ServerTraining(self.layout.read().numpy(), before.epochs + 1, left, loss)

    def apply(self, work: ServerWork, *arguments: Any) -> Any:
        """Whatever a method does at the server beyond training on images."""
        return work(self, *arguments)

    @contextmanager
    def _optimised_by(self, training: TrainingConfig | None) -> Iterator[None]:
        """Another optimiser than the clients', where the module takes one; a user's own keeps its own."""
        if training is None or not hasattr(self.module, "optimizer_settings"):
            yield
            return
        before = self.module.optimizer_settings
        self.module.optimizer_settings = optimizer_settings(training)
        try:
            yield
        finally:
            self.module.optimizer_settings = before

    def device_kind(self) -> str:
        """Where it computes: ``cpu``, ``cuda``."""
        return self.device.type

    def peak_memory_mb(self) -> float:
        """Of this process."""
        return memory.peak_memory_mb()


def _turn(task: Task, settings: RoundSettings) -> int:
    return settings.number if task.turn is None else task.turn


def _rows(vectors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Vectors [size] as rows; a single row where they are all the same one."""
    first = vectors[0]
    return first[None] if all(vector is first for vector in vectors) else torch.stack(tuple(vectors))


def _paced(records: list[ClientRecord], tasks: Sequence[Task], began: float, pace: float) -> list[ClientRecord]:
    """Wait until every client's modelled latency is over; all devices of a round work at the same time."""
    paced = []
    for record, task in sorted(zip(records, tasks, strict=True), key=lambda pair: pair[1].latency_s):
        time.sleep(max(0.0, began + task.latency_s * pace - time.time()))
        paced.append(replace(record, started=began, ended=time.time()))
    return paced
