"""The Ray backend: client actors in the bundles of one placement group, and one server actor beside them."""

from __future__ import annotations

import itertools
import os
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fl_ray.config import FleetConfig, RayConfig, RuntimeConfig
from fl_ray.errors import FlRayError, PlacementError
from fl_ray.runtime.base import Phases, RoundResult, Runtime, merge, sum_evaluations
from fl_ray.runtime.host import ClientHost, Evaluation, Job, JobData, PartialResult, Task, peak_memory_mb
from fl_ray.runtime.placement import Slot, plan_slots

__all__ = ["RayRuntime", "connect"]


def connect(config: RayConfig) -> bool:
    """Start Ray here, or join the cluster at ``config.address``; whether it was this call that did.

    Raises:
        PlacementError: no cluster answers at the address.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if config.address is not None:
        try:
            _answers(config.address)
            ray.init(address=config.address, **common)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise PlacementError(
                f"ray.address is {config.address}, but no Ray cluster answers there ({error}); start one with "
                "`ray start --head`, put its token into ~/.ray/auth_token (or RAY_AUTH_TOKEN; "
                "RAY_AUTH_MODE=disabled for a cluster without), or leave ray.address out to start Ray here"
            ) from error
    else:
        ray.init(
            address="local",  # without it Ray joins whatever cluster was last started on this machine
            num_cpus=config.num_cpus or os.cpu_count(),
            resources={"bandwidth": config.bandwidth},
            include_dashboard=False,
            **common,
        )
    return True


def _answers(address: str) -> None:
    """Fail at once where nobody listens; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()


@ray.remote
class HostActor:
    """A ClientHost in a process of its own."""

    def load(self, job: Job, data: JobData) -> None:
        """Get ready for a run."""
        gpu = torch.cuda.is_available() and ray.get_gpu_ids()
        self.host = ClientHost(job, data, torch.device("cuda" if gpu else "cpu"))

    def train(self, tasks: list[Task], weights: np.ndarray, round_number: int, individual: bool) -> PartialResult:
        return self.host.train(tasks, weights, round_number, individual)

    def train_on(
        self, images: np.ndarray, labels: np.ndarray, weights: np.ndarray, round_number: int, epochs: int
    ) -> tuple[np.ndarray, float]:
        return self.host.train_on(images, labels, weights, round_number, epochs)

    def evaluate_test(self, weights: np.ndarray, blocks: list[int]) -> list[Evaluation]:
        return self.host.evaluate_test(weights, blocks)

    def evaluate_clients(self, weights: np.ndarray, clients: list[int]) -> list[Evaluation | None]:
        return self.host.evaluate_clients(weights, clients)

    def peak_memory_mb(self) -> float:
        return peak_memory_mb()


@dataclass(frozen=True)
class _Remote:
    reference: ray.ObjectRef

    def result(self) -> tuple[np.ndarray, float]:
        return _get(self.reference)


class RayRuntime(Runtime):
    """Client actors by ``runtime.actors``; kept for the next run when that asks for the same bundles.

    Args:
        tell: is told when actors are started, which takes seconds.
    """

    def __init__(self, config: RuntimeConfig, ray_config: RayConfig, tell: Callable[[str], None] | None = None) -> None:
        self.config, self._tell = config, tell
        self._owns_ray = connect(ray_config)
        self._slots: list[Slot] = []
        self._group: PlacementGroup | None = None
        self._actors: list[Any] = []
        self._server: Any = None  # started when a method first trains on the server
        self._server_ready = False

    def open(self, job: Job, data: JobData, fleet: FleetConfig, tier_of: np.ndarray, cohort_size: int) -> None:
        cluster = ray.cluster_resources()
        slots = plan_slots(self.config, fleet, tier_of, cohort_size, cluster)
        if slots != self._slots:
            self._release()
            if self._tell is not None:
                self._tell(f"starting {len(slots)} actors for {len(tier_of)} clients")
            self._group = self._place(slots, cluster)
            self._slots = slots
            self._actors = [self._actor(index, slot) for index, slot in enumerate(slots)]
        self._job, self._data = job, ray.put(data)
        _get([actor.load.remote(job, self._data) for actor in self._actors])
        self._server_ready = False
        self._tier_of, self._sizes = tier_of, data.partition.sizes
        self._blocks = data.test_blocks

    def _place(self, slots: list[Slot], cluster: dict[str, float]) -> PlacementGroup:
        group = placement_group([dict(slot.bundle) for slot in slots], strategy="PACK")
        if not group.wait(self.config.placement_timeout_s):
            remove_placement_group(group)
            kinds = {slot.bundle for slot in slots}
            asked = "; ".join(f"{sum(slot.bundle == kind for slot in slots)} x {dict(kind)}" for kind in kinds)
            raise PlacementError(
                f"Ray did not place the client actors within {self.config.placement_timeout_s:g} s. Asked for: {asked}."
                f" The cluster has {cluster}, of which {ray.available_resources()} is free. Lower runtime.num_actors "
                "or the tiers' cpus and bandwidth, wait for other jobs, or raise runtime.placement_timeout_s"
            )
        return group

    def _actor(self, index: int, slot: Slot) -> Any:
        bundle = dict(slot.bundle)
        return HostActor.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            resources={"bandwidth": bundle["bandwidth"]},
            scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=index),
        ).remote()

    def assign(self, tasks: Sequence[Task]) -> dict[int, list[Task]]:
        """Tasks by actor: each to the least loaded actor of its client's tier (or its own), the largest first."""
        own = {slot.client: index for index, slot in enumerate(self._slots) if slot.client is not None}
        load = np.zeros(len(self._slots))
        chosen: dict[int, list[Task]] = {}
        for task in sorted(tasks, key=lambda task: (-self._sizes[task.client], task.client)):
            tier = self._tier_of[task.client]
            fitting = [index for index, slot in enumerate(self._slots) if slot.tier == tier]
            index = own[task.client] if own else min(fitting, key=lambda index: load[index])
            load[index] += self._sizes[task.client]
            chosen.setdefault(index, []).append(task)
        return chosen

    def train(
        self, tasks: Sequence[Task], weights: np.ndarray, round_number: int, individual: bool, phases: Phases
    ) -> RoundResult:
        with phases.phase("dispatch"):
            stored = ray.put(weights)
            parts = [
                self._actors[index].train.remote(share, stored, round_number, individual)
                for index, share in self.assign(tasks).items()
            ]
        with phases.phase("train"):
            done = _get(parts)
        with phases.phase("aggregate"):
            return merge(done, len(weights), individual)

    def evaluate(self, models: Sequence[np.ndarray]) -> list[Evaluation]:
        pieces = _runs(self._blocks, 1 if len(models) >= len(self._actors) else len(self._actors))
        jobs = [(ray.put(model), piece) for model in models for piece in pieces]
        actors = itertools.cycle(self._actors)
        answers = _get([actor.evaluate_test.remote(*job) for actor, job in zip(actors, jobs, strict=False)])
        starts = range(0, len(answers), len(pieces))
        each = [answers[start : start + len(pieces)] for start in starts]
        return [sum_evaluations(list(itertools.chain.from_iterable(parts))) for parts in each]

    def evaluate_clients(self, models: Mapping[int | None, np.ndarray]) -> list[Evaluation | None]:
        if None not in models:
            actors = itertools.cycle(self._actors)
            each = zip(actors, sorted(models), strict=False)
            return [part[0] for part in _get([a.evaluate_clients.remote(models[c], [c]) for a, c in each])]
        stored = ray.put(models[None])
        pairs = zip(self._actors, _runs(len(self._sizes), len(self._actors)), strict=False)
        answers = _get([actor.evaluate_clients.remote(stored, part) for actor, part in pairs])
        return [evaluation for part in answers for evaluation in part]

    def put(self, images: np.ndarray, labels: np.ndarray) -> tuple[ray.ObjectRef, ray.ObjectRef]:
        return ray.put(images), ray.put(labels)

    def train_on_server(
        self, images: tuple[ray.ObjectRef, ray.ObjectRef], weights: np.ndarray, round_number: int, epochs: int
    ) -> _Remote:
        if self._server is None:
            gpus = {"num_gpus": self.config.gpus_per_actor} if self.config.gpus_per_actor > 0 else {}
            # The server only works while clients do or while they wait: it reserves no CPU of the emulated devices.
            self._server = HostActor.options(num_cpus=0, **gpus).remote()
        if not self._server_ready:
            loaded = self._server.load.remote(self._job, self._data)
            ready, _ = ray.wait([loaded], timeout=self.config.placement_timeout_s)
            if not ready:
                raise PlacementError(
                    f"Ray did not start the server's actor (GPU {self.config.gpus_per_actor:g}) within "
                    f"{self.config.placement_timeout_s:g} s; free: {ray.available_resources()}. Lower "
                    "runtime.gpus_per_actor or runtime.num_actors, or raise runtime.placement_timeout_s"
                )
            self._server_ready = True
        return _Remote(self._server.train_on.remote(*images, weights, round_number, epochs))

    def memory_mb(self) -> dict[str, float]:
        actors = ray.get([actor.peak_memory_mb.remote() for actor in self._actors])
        sizes = {"driver": peak_memory_mb(), "actors": float(sum(actors))}
        if self._server_ready:
            sizes["server"] = float(ray.get(self._server.peak_memory_mb.remote()))
        return sizes

    def _release(self) -> None:
        for actor in [*self._actors, *([self._server] if self._server is not None else [])]:
            ray.kill(actor)
        if self._group is not None:
            remove_placement_group(self._group)
            self._wait_until_free()
        self._slots, self._actors, self._server, self._group = [], [], None, None

    def _wait_until_free(self) -> None:
        """Ray gives the bundles back a moment after it says so; the next placement would count them as taken."""
        wanted = sum(dict(slot.bundle)["CPU"] for slot in self._slots)
        deadline = time.monotonic() + 5
        while ray.available_resources().get("CPU", 0.0) < wanted and time.monotonic() < deadline:
            time.sleep(0.05)

    def close(self) -> None:
        if not ray.is_initialized():
            return
        self._release()
        if self._owns_ray:
            ray.shutdown()


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
