"""The Ray backend: client actors in the bundles of one placement group, and one server actor beside them.

Torch and Lightning take seconds to import, in the driver and in every actor: this module needs neither, so that Ray and
the actors can be started while the driver still imports.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from fl_ray.config import FleetConfig, RayConfig, RunConfig, RuntimeConfig, TrainingConfig
from fl_ray.devices.fleet import Fleet, draw_fleet
from fl_ray.errors import FlRayError, LostActorsError, PlacementError
from fl_ray.runtime.base import ClientPart, Phases, RoundResult, Runtime, ServerWork, merge, sum_evaluations
from fl_ray.runtime.bundles import Bundles, available
from fl_ray.runtime.connection import Connection
from fl_ray.runtime.memory import keep_freed_memory, peak_memory_mb
from fl_ray.runtime.placement import Slot, plan_slots
from fl_ray.runtime.tasks import Evaluation, Job, JobData, RoundSettings, ServerTraining, Task, TrainingPath

__all__ = ["RayRuntime"]


# What Ray raises where an actor, its node or the object that it returned is gone; the work is then done again.
_LOST = (
    ray.exceptions.RayActorError,
    ray.exceptions.ObjectLostError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.OutOfMemoryError,
    ray.exceptions.ActorUnschedulableError,
    ray.exceptions.ActorPlacementGroupRemoved,
)
_LOAD_TIMEOUT_S = 180  # importing torch and Lightning takes seconds, on a crowded machine a minute
_MOST_LOSSES = 3  # of one piece of work, before it counts as what kills the actors
_INLINE_BYTES = 65536  # smaller weights travel in the call itself


@ray.remote
class HostActor:
    """A ClientHost in a process of its own."""

    def warm_up(self) -> None:
        """Import what training needs."""
        import fl_ray.runtime.host  # noqa: F401

    def load(self, job: Job, data: JobData) -> None:
        """Get ready for a run."""
        import torch

        from fl_ray.runtime.host import ClientHost

        keep_freed_memory()
        gpu = torch.cuda.is_available() and ray.get_gpu_ids()
        self.host = ClientHost(job, data, torch.device("cuda" if gpu else "cpu"), _fetch)

    def call(self, method: str, *arguments: Any) -> Any:
        """``ClientHost``'s method of that name; weights may be a reference that Ray has resolved already."""
        return getattr(self.host, method)(*arguments)


def _fetch(handle: Any) -> np.ndarray:
    return ray.get(handle) if isinstance(handle, ray.ObjectRef) else handle


@dataclass(frozen=True)
class _Call:
    """Work for the actor of a slot, or for any other one where that is gone."""

    slot: int
    method: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class _OnServer:
    """A training at the server's actor, begun again where the actor is lost."""

    begin: Callable[[], ray.ObjectRef]
    reference: ray.ObjectRef

    def result(self) -> Any:
        reference = self.reference
        for _ in range(_MOST_LOSSES):
            try:
                return _get(reference)
            except _LOST:
                reference = self.begin()
        raise LostActorsError(
            f"the server's actor died {_MOST_LOSSES} times on the same work; it may be out of memory, or the model "
            "ends its process"
        )


class RayRuntime(Runtime):
    """Client actors by ``runtime.actors``; kept for the next run when that asks for the same bundles.

    An actor that dies (its process, or its node) is started again in its bundle; until it answers, the others do its
    work. Since a client's training depends on nothing but its key, and sums on no order, that changes no result.

    Args:
        tell: is told when actors are started or lost.
        ahead: start the actors for this run at once, in a thread, while the caller goes on; ``open`` waits for them.
        connection: one that was begun before; default: one of its own.
        spare: what the clients' actors leave of the cluster, see ``fl_ray.runtime.spare``.
    """

    def __init__(
        self,
        config: RuntimeConfig,
        ray_config: RayConfig,
        tell: Callable[[str], None] | None = None,
        ahead: RunConfig | None = None,
        connection: Connection | None = None,
        spare: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        self.spare = spare or {}
        self.config, self._tell = config, tell or (lambda text: None)
        self._connection = connection or Connection(ray_config)
        self._slots: list[Slot] = []
        self._bundles: Bundles | None = None
        self._actors: list[Any] = []
        self._loading: dict[int, ray.ObjectRef] = {}  # slots whose actor does not answer yet
        self._server: Any = None  # started when a method first trains on the server
        self._server_ready = False
        self._job: Job | None = None
        self._failure: BaseException | None = None
        self._starting = threading.Thread(target=self._begin, args=(ahead,), daemon=True)
        self._starting.start()
        if ahead is None:
            self._started()

    def _begin(self, ahead: RunConfig | None) -> None:
        try:
            self._connection.wait()
            if ahead is not None and not (ahead.runtime.actors != "pooled" and _changes_fleet(ahead)):
                fleet = draw_fleet(ahead.fleet, ahead.data.clients, ahead.seed)
                self._start(self._plan(ahead.fleet, fleet, ahead.cohort_size))
                for actor in self._actors:
                    actor.warm_up.remote()
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits, see _started
            self._failure = error

    def _started(self) -> None:
        """Wait until Ray runs.

        Raises:
            PlacementError: what stood in the way of the start.
        """
        self._starting.join()
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def _plan(self, config: FleetConfig, fleet: Fleet, cohort_size: int) -> list[Slot]:
        return plan_slots(self.config, config, fleet, cohort_size, available(), self.spare)

    def open(self, job: Job, data: JobData, config: FleetConfig, fleet: Fleet, cohort_size: int) -> None:
        self._started()
        self._job, self._data = job, ray.put(data)
        self._fleet, self._devices, self._cohort_size = config, fleet, cohort_size
        self._sizes, self._blocks = data.partition.sizes, data.test_blocks
        self._server_ready = False  # it has another run's data
        slots = self._plan(config, fleet, cohort_size)
        if slots != self._slots:
            self._start(slots)
        else:
            self._load_all()
        self._settle()

    def wait(self) -> None:
        self._connection.wait()

    def leave(self, spare: Mapping[str, float]) -> None:
        if spare != self.spare:  # a generator's pool may start before the clients' actors are planned anew
            self._starting.join()
            self._release()
        super().leave(spare)

    def shared(self) -> JobData:
        return ray.get(self._data)

    def _start(self, slots: list[Slot]) -> None:
        """Actors for new slots, in place of all there are."""
        self._release()
        self._tell(f"starting {len(slots)} client actors")
        self._bundles = Bundles(slots, self.config)
        self._slots = slots
        self._actors = [self._actor(index, slot) for index, slot in enumerate(slots)]
        if self._job is not None:  # not where they are started ahead of their run
            self._load_all()

    def _load_all(self) -> None:
        self._loading = {index: self._load(actor) for index, actor in enumerate(self._actors)}

    def _load(self, actor: Any) -> ray.ObjectRef:
        return actor.load.remote(self._job, self._data)

    def _settle(self) -> None:
        """Wait until all actors answer; one that dies while it loads is started again, a bounded number of times."""
        losses, deadline = 0, time.monotonic() + _LOAD_TIMEOUT_S
        while self._loading:
            ready, _ = ray.wait(list(self._loading.values()), timeout=max(0.0, deadline - time.monotonic()))
            if not ready or losses > _MOST_LOSSES:
                raise PlacementError(
                    f"{len(self._loading)} of {len(self._slots)} client actors did not answer within "
                    f"{_LOAD_TIMEOUT_S} s, or died {losses} times while they were started; look for the reason in "
                    "Ray's session logs, or lower runtime.num_actors"
                )
            losses += self._welcome(ready)

    def _welcome(self, ready: Sequence[ray.ObjectRef]) -> int:
        """Take in actors that have loaded; those that died over it are started again, without waiting. How many did."""
        lost = 0
        for index in [index for index, reference in self._loading.items() if reference in ready]:
            try:
                _get(self._loading[index])
            except _LOST as error:
                lost += 1
                self._bury(index, error)
            else:
                del self._loading[index]
        return lost

    def _bury(self, index: int, error: Exception) -> None:
        """Start a lost actor again, in its bundle, without waiting for it."""
        first = (str(error).splitlines() or [type(error).__name__])[0]
        self._tell(f"client actor {index} is lost ({type(error).__name__}: {first[:120]}); its work is done again")
        ray.kill(self._actors[index])
        self._actors[index] = self._actor(index, self._slots[index])
        self._loading[index] = self._load(self._actors[index])

    def _live(self) -> list[int]:
        """Slots whose actor answers. Where there is none, wait for one, and at last place all anew on what is left."""
        if self._loading:
            waiting = list(self._loading.values())
            self._welcome(ray.wait(waiting, num_returns=len(waiting), timeout=0)[0])
            if len(self._loading) == len(self._slots):
                self._welcome(ray.wait(list(self._loading.values()), timeout=self.config.placement_timeout_s)[0])
            if len(self._loading) == len(self._slots):
                self._tell("no client actor is left; placing them anew")
                self._start(self._plan(self._fleet, self._devices, self._cohort_size))
                self._settle()
        return [index for index in range(len(self._slots)) if index not in self._loading]

    def _run(self, calls: Sequence[_Call]) -> list[Any]:
        """The calls' answers, in their order, whatever happens to the actors."""
        answers: list[Any] = [None] * len(calls)
        undone, losses = list(range(len(calls))), 0
        while undone:
            live = self._live()
            sent: list[tuple[int, int, Any, ray.ObjectRef]] = []
            for number, index in enumerate(undone):
                call = calls[index]
                slot = call.slot if call.slot in live else self._stand_in(call.slot, live, number)
                actor = self._actors[slot]
                sent.append((index, slot, actor, actor.call.remote(call.method, *call.arguments)))
            undone = []
            for index, slot, actor, reference in sent:
                try:
                    answers[index] = _get(reference)
                except _LOST as error:
                    undone.append(index)
                    if self._actors[slot] is actor:
                        self._bury(slot, error)
            losses += bool(undone)
            if losses > _MOST_LOSSES:
                raise LostActorsError(
                    f"client actors died {losses} times in a row on the same work; they may be out of memory (lower "
                    "runtime.num_actors), or the model ends its process"
                )
        return answers

    def _stand_in(self, slot: int, live: list[int], number: int) -> int:
        """Whose turn it is to do a lost actor's work: those of its tier first."""
        tier = self._slots[slot].tier if slot < len(self._slots) else None
        fitting = [index for index in live if self._slots[index].tier == tier] or live
        return fitting[number % len(fitting)]

    def _actor(self, index: int, slot: Slot) -> Any:
        bundle = dict(slot.bundle)
        return HostActor.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            resources={"bandwidth": bundle["bandwidth"]},
            scheduling_strategy=self._bundles.at(index),
        ).remote()

    def assign(self, tasks: Sequence[Task], live: Sequence[int]) -> dict[int, list[Task]]:
        """Tasks by slot: each to the least loaded actor of its client's tier (or its own), the largest first."""
        own = {slot.client: index for index, slot in enumerate(self._slots) if slot.client is not None}
        by_tier: dict[int, list[int]] = {}
        for index in live:
            by_tier.setdefault(self._slots[index].tier, []).append(index)
        load = dict.fromkeys(live, 0)
        chosen: dict[int, list[Task]] = {}
        for task in sorted(tasks, key=lambda task: (-self._sizes[task.client], task.client)):
            index = own.get(task.client)
            if index not in load:  # pooled, or its own actor is lost
                index = min(by_tier.get(int(self._devices.tier[task.client]), live), key=load.__getitem__)
            load[index] += int(self._sizes[task.client])
            chosen.setdefault(index, []).append(task)
        return chosen

    def hold(self, weights: np.ndarray) -> Any:
        return ray.put(weights) if weights.nbytes > _INLINE_BYTES else weights

    def held(self, handle: Any) -> np.ndarray:
        return _fetch(handle)

    def device_kind(self) -> str:
        return self._run([_Call(self._live()[0], "device_kind", ())])[0]

    def resolve_path(self, wanted: str, clients: Sequence[int], weights: np.ndarray) -> tuple[TrainingPath, str]:
        at_once = -(-self._cohort_size // len(self._slots))
        return self._run([_Call(self._live()[0], "resolve_path", (wanted, clients, at_once, self.hold(weights)))])[0]

    def train(self, tasks: Sequence[Task], weights: np.ndarray, settings: RoundSettings, phases: Phases) -> RoundResult:
        with phases.phase("dispatch"):
            stored = self.hold(weights)
            calls = [
                _Call(index, "train", (share, stored, settings))
                for index, share in self.assign(tasks, self._live()).items()
            ]
        with phases.phase("train"):
            done = self._run(calls)
        with phases.phase("aggregate"):
            return merge(done, len(weights), settings.individual)

    def evaluate(
        self, models: Sequence[np.ndarray], images: tuple[ray.ObjectRef, ray.ObjectRef] | None = None
    ) -> list[Evaluation]:
        live = self._live()
        if images is not None:
            pairs = zip(itertools.cycle(live), models, strict=False)
            return self._run([_Call(slot, "evaluate_on", (*images, self.hold(model))) for slot, model in pairs])
        pieces = _runs(self._blocks, 1 if len(models) >= len(live) else len(live))
        jobs = [(self.hold(model), piece) for model in models for piece in pieces]
        slots = itertools.cycle(live)
        answers = self._run([_Call(slot, "evaluate_test", job) for slot, job in zip(slots, jobs, strict=False)])
        starts = range(0, len(answers), len(pieces))
        each = [answers[start : start + len(pieces)] for start in starts]
        return [sum_evaluations(list(itertools.chain.from_iterable(parts))) for parts in each]

    def evaluate_clients(
        self,
        models: Mapping[int | None, np.ndarray],
        clients: Sequence[int],
        part: ClientPart = "held_out",
    ) -> list[Evaluation | None]:
        live = self._live()
        if None in models:
            stored = self.hold(models[None])
            groups = [[clients[place] for place in run] for run in _runs(len(clients), len(live))]
            jobs = [(stored, group, part) for group in groups]
        else:
            jobs = [(self.hold(models[client]), [client], part, True) for client in clients]
        slots = itertools.cycle(live)
        answers = self._run([_Call(slot, "evaluate_clients", job) for slot, job in zip(slots, jobs, strict=False)])
        return [evaluation for found in answers for evaluation in found]

    def predict(
        self, models: Mapping[int, np.ndarray], images: tuple[ray.ObjectRef, ray.ObjectRef] | None = None
    ) -> dict[int, np.ndarray]:
        shown = None if images is None else images[0]
        slots = itertools.cycle(self._live())
        calls = [
            _Call(slot, "predict", (self.hold(weights), client, shown))
            for slot, (client, weights) in zip(slots, models.items(), strict=False)
        ]
        return dict(zip(models, self._run(calls), strict=True))

    def gradient_cosines(self, weights: np.ndarray, clients: Sequence[int], rows: np.ndarray) -> list[float]:
        live, stored = self._live(), self.hold(weights)
        wanted = self.hold(self._run([_Call(live[0], "gradient", (stored, rows))])[0])
        groups = [[clients[place] for place in run] for run in _runs(len(clients), len(live))]
        calls = [
            _Call(slot, "gradient_cosines", (stored, group, wanted)) for slot, group in zip(live, groups, strict=False)
        ]
        return [cosine for found in self._run(calls) for cosine in found]

    def put(self, images: np.ndarray, labels: np.ndarray) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        return ray.put(images), ray.put(labels)

    def labels_of(self, images: tuple[ray.ObjectRef, ray.ObjectRef]) -> np.ndarray:
        return ray.get(images[1])

    def train_on_server(
        self,
        images: tuple[ray.ObjectRef, ray.ObjectRef],
        weights: np.ndarray,
        round_number: int,
        epochs: int,
        training: TrainingConfig | None = None,
        head_only: bool = False,
    ) -> _OnServer:
        return self._on_server("train_on", *images, weights, round_number, epochs, training, head_only)

    def on_server(self, work: ServerWork, *arguments: Any) -> Any:
        return self._on_server("apply", work, *arguments).result()

    def train_epoch(
        self,
        images: tuple[ray.ObjectRef, ray.ObjectRef],
        before: ServerTraining,
        training: TrainingConfig,
        purpose: str,
        training_mode: bool = True,
    ) -> ServerTraining:
        return self._on_server("train_epoch", *images, before, training, purpose, training_mode).result()

    def _on_server(self, method: str, *arguments: Any) -> _OnServer:
        def again() -> ray.ObjectRef:
            self._tell("the server's actor is lost; its training is done again")
            if self._server is not None:
                ray.kill(self._server)
            self._server, self._server_ready = None, False
            return begin()

        def begin() -> ray.ObjectRef:
            return self._server_actor().call.remote(method, *arguments)

        return _OnServer(again, begin())

    def _server_actor(self) -> Any:
        """The server's actor, loaded; one that is lost meanwhile is started again, a bounded number of times."""
        for _ in range(_MOST_LOSSES):
            try:
                return self._loaded_server()
            except _LOST:
                ray.kill(self._server)
                self._server, self._server_ready = None, False
        raise LostActorsError(
            f"the server's actor died {_MOST_LOSSES} times while it was started; it may be out of memory (lower "
            "runtime.num_actors)"
        )

    def _loaded_server(self) -> Any:
        if self._server is None:
            gpus = {"num_gpus": self.config.gpus_per_actor} if self.config.gpus_per_actor > 0 else {}
            # The server only works while clients do or while they wait: it reserves no CPU of the emulated devices.
            self._server = HostActor.options(num_cpus=0, **gpus).remote()
        if not self._server_ready:
            ready, _ = ray.wait([self._load(self._server)], timeout=_LOAD_TIMEOUT_S)
            if not ready:
                raise PlacementError(
                    f"Ray did not start the server's actor (GPU {self.config.gpus_per_actor:g}) within "
                    f"{_LOAD_TIMEOUT_S} s; free: {ray.available_resources()}. Lower runtime.gpus_per_actor or "
                    "runtime.num_actors"
                )
            _get(ready[0])
            self._server_ready = True
        return self._server

    def memory_mb(self) -> dict[str, float]:
        peaks = self._run([_Call(index, "peak_memory_mb", ()) for index in self._live()])
        return {"driver": peak_memory_mb(), "actors": float(sum(peaks))}

    def _release(self) -> None:
        for actor in [*self._actors, *([self._server] if self._server is not None else [])]:
            ray.kill(actor)
        if self._bundles is not None:
            self._bundles.release()
        self._slots, self._actors, self._bundles, self._loading = [], [], None, {}
        self._server, self._server_ready = None, False

    def close(self) -> None:
        self._starting.join()
        if ray.is_initialized():
            self._release()
        self._connection.close()


def _changes_fleet(config: RunConfig) -> bool:
    """Whether the method changes the devices, and with them what actors of single clients are given."""
    from fl_ray.methods.base import Method  # which imports the runtimes' interface
    from fl_ray.registry import resolve_name

    return resolve_name("method", config.method.name).equip is not Method.equip


def _runs(count: int, pieces: int) -> list[list[int]]:
    """Numbers 0..count-1 in at most ``pieces`` contiguous runs."""
    return [run.tolist() for run in np.array_split(np.arange(count), min(pieces, count))]


def _get(references: Any) -> Any:
    """``ray.get`` that raises our own errors as they were raised in the actor."""
    try:
        return ray.get(references)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, FlRayError):
            raise error.cause from error
        raise
