"""When what happens on the virtual clock: which clients' updates arrive in a round, and when the round ends.

Events (a client is done, drops out, is too late) lie in a heap by their virtual time. Nothing here trains or sleeps:
latencies follow from the cost model alone, so a schedule knows what arrives before anything is trained.
"""

from __future__ import annotations

import heapq
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fl_ray.config import RunConfig
from fl_ray.devices.cost import RoundCost, round_cost
from fl_ray.errors import SettingError
from fl_ray.randomness import numpy_generator
from fl_ray.runtime.tasks import LeftOut, Task

if TYPE_CHECKING:
    from fl_ray.context import RunContext
    from fl_ray.methods.base import Method

__all__ = ["RoundPlan", "Schedule", "make_schedule"]


@dataclass
class RoundPlan:
    """What the virtual clock says of a round; arrays are [cohort].

    Attributes:
        cohort: the clients that were sent the model; a synchronous round's in ascending order.
        cost: what they would need and spend if nothing stopped them.
        until_s: virtual seconds after its start at which each is done, or is stopped.
        left_out: the reason, by place in the cohort, of those whose update does not arrive.
        weight: multiplies a client's share of the average.
        scale: multiplies its update.
        start: handles on the weights that each started from; empty: the round's.
        turn: the number in the key of each one's draws; empty: the round's.
        ends_s: virtual time at which the last awaited event happens.
    """

    cohort: np.ndarray
    cost: RoundCost
    until_s: np.ndarray
    left_out: dict[int, LeftOut]
    weight: np.ndarray
    scale: np.ndarray
    ends_s: float
    start: list[Any] = field(default_factory=list)
    turn: list[int] = field(default_factory=list)

    @property
    def arrived(self) -> np.ndarray:
        """Places in the cohort of those whose update arrives."""
        return np.array([place for place in range(len(self.cohort)) if place not in self.left_out], dtype=np.int64)

    def adapt(self, tasks: Sequence[Task]) -> list[Task]:
        """A method's tasks for the clients that arrive, with shares, scales, starts and latencies as planned.

        ``tasks`` may lack clients (those without samples), but is in the order of ``arrived``.
        """
        adapted, own = [], iter(tasks)
        task = next(own, None)
        for place in self.arrived.tolist():
            if task is None or task.client != self.cohort[place]:
                continue
            changes: dict[str, Any] = {
                "share": task.share * float(self.weight[place]),
                "scale": task.scale * float(self.scale[place]),
                "latency_s": float(self.until_s[place]),
            }
            if self.start:  # FedBuff's buffer counts every update alike
                changes |= {"share": 1 / len(tasks), "start": self.start[place], "turn": self.turn[place]}
            adapted.append(replace(task, **changes))
            task = next(own, None)
        return adapted

    def spent(self) -> tuple[float, int]:
        """Energy [J] that the cohort spent until each was done or stopped, and how many sent their update."""
        cost = self.cost
        computed = np.clip((self.until_s - cost.t_down_s) / np.maximum(cost.t_cmp_s, 1e-300), 0, 1)
        sent = np.clip((self.until_s - cost.t_down_s - cost.t_cmp_s) / np.maximum(cost.t_up_s, 1e-300), 0, 1)
        stopped = np.zeros(len(self.cohort), dtype=bool)
        stopped[list(self.left_out)] = True  # not by comparing times: differences of virtual times are rounded
        computed, sent = np.where(stopped, computed, 1.0), np.where(stopped, sent, 1.0)
        energy = float((cost.e_cmp_j * computed).sum() + (cost.e_up_j * sent).sum())
        return energy, int((~stopped).sum())


class Schedule(ABC):
    """Plans the rounds of one run."""

    @abstractmethod
    def plan(self, run: RunContext, method: Method, number: int, weights: np.ndarray, attempt: int = 0) -> RoundPlan:
        """The next round, from ``run.ledger.virtual_time_s`` on; the ledger's clock is moved where nobody is there yet.

        Args:
            attempt: 1: too few updates came in, and the time that this took is in the ledger already. Synchronous
                rounds choose as before, among those who are there now; asynchronous ones wait for the next updates.
        """

    def state(self) -> dict[str, np.ndarray]:
        """What a checkpoint must hold."""
        return {}

    def load_state(self, state: dict[str, np.ndarray], run: RunContext) -> None:
        """Take back what ``state`` gave."""


def make_schedule(config: RunConfig, method: Method) -> Schedule:
    """The schedule that ``clock`` names.

    Raises:
        SettingError: the method can't be run asynchronously.
    """
    if config.clock.late == "weight_down" and not method.weighs_clients:
        raise SettingError(
            f"clock.late is weight_down, but method {config.method.name} counts all clients alike; use leave_out"
        )
    if config.clock.mode != "asynchronous":
        return Synchronous()
    if not method.asynchronous:
        raise SettingError(
            f"clock.mode is asynchronous, but method {config.method.name} needs whole rounds; use synchronous or "
            "deadline, or fedavg or fedprox"
        )
    return Asynchronous(config)


def _cost(run: RunContext, method: Method, cohort: np.ndarray, total_share: float | None = None) -> RoundCost:
    down, up = method.link_bytes(run, cohort)
    samples = run.config.training.samples_of(run.data.partition.sizes[cohort])
    epochs = run.config.training.local_epochs
    return round_cost(run.config.fleet, run.fleet, cohort, samples, epochs, down, up, total_share)


def _without_samples(run: RunContext) -> np.ndarray:
    """Clients that are not worth waiting for."""
    return np.flatnonzero(run.data.partition.sizes == 0)


def _stops(run: RunContext, cohort: np.ndarray, latency_s: np.ndarray, now_s: float, *key: int) -> np.ndarray:
    """Seconds after its start at which each client drops out or becomes unavailable; inf where it does not."""
    stops = np.full(len(cohort), np.inf)
    chance = run.config.fleet.dropout
    if chance > 0:
        rng = numpy_generator(run.config.seed, "dropout", *key)
        drawn, part = rng.random(len(cohort)), rng.random(len(cohort))
        stops[drawn < chance] = (part * latency_s)[drawn < chance]
    if run.fleet.availability is not None:
        stops = np.minimum(stops, run.fleet.availability.closes_s(cohort, now_s) - now_s)
    return stops


_PATIENCE = 1000  # clients that may end per update that is waited for: windows may be too short for any to get through
_DROPPED = LeftOut("dropped_out", "it dropped out or went away")
_LATE = LeftOut("late", "it missed the deadline")


class Synchronous(Schedule):
    """A round ends with its last client, or at the deadline."""

    def plan(self, run: RunContext, method: Method, number: int, weights: np.ndarray, attempt: int = 0) -> RoundPlan:
        if run.fleet.availability is not None:  # wait until somebody is there
            run.ledger.advance(run.fleet.availability.next_s(run.ledger.virtual_time_s, _without_samples(run)))
        cohort = method.cohort(run, number, weights)
        cost = _cost(run, method, cohort)
        clock, now = run.config.clock, run.ledger.virtual_time_s
        latency = cost.latency_s
        stops = _stops(run, cohort, latency, now, number, attempt)
        cut = clock.deadline_s if clock.deadline_s is not None and clock.late == "leave_out" else np.inf
        heap = [(min(latency[place], stops[place]), place) for place in range(len(cohort))]
        heapq.heapify(heap)
        until, left_out, end = np.zeros(len(cohort)), {}, 0.0
        while heap:
            at, place = heapq.heappop(heap)
            if at > cut:
                left_out[place], at = _LATE, cut
            elif stops[place] < latency[place]:
                left_out[place] = _DROPPED
            until[place], end = at, max(end, at)
        weight = np.ones(len(cohort))
        if clock.deadline_s is not None and clock.late == "weight_down":
            weight = np.minimum(1.0, clock.deadline_s / np.maximum(latency, 1e-300))
        return RoundPlan(cohort, cost, until, left_out, weight, np.ones(len(cohort)), now + end)


@dataclass(order=True)
class _Flight:
    """A client that trains: an event at the virtual time at which it is done or stops."""

    at_s: float
    turn: int
    client: int = field(compare=False)
    version: int = field(compare=False)
    started_s: float = field(compare=False)
    stopped: bool = field(compare=False)


class Asynchronous(Schedule):
    """FedBuff (Nguyen et al., arXiv 2106.06639): a fixed number of clients train at any time, the server steps when
    ``buffer_size`` updates have come in. The version that a client starts from is that of the moment it is chosen.
    Clients without samples come back with nothing, which does not count; fewer clients train while fewer are there.
    """

    def __init__(self, config: RunConfig) -> None:
        self._clock = config.clock
        self._concurrency = config.clock.concurrency or config.cohort_size
        if self._concurrency > config.data.clients:
            raise SettingError(
                f"clock.concurrency is {self._concurrency}, but data.clients is {config.data.clients}; lower it"
            )
        self._heap: list[_Flight] = []
        self._turns = 0
        self._versions: dict[int, tuple[np.ndarray, Any]] = {}  # weights and their handle, while somebody needs them

    def plan(self, run: RunContext, method: Method, number: int, weights: np.ndarray, attempt: int = 0) -> RoundPlan:
        if number not in self._versions:
            self._versions[number] = (weights, run.runtime.hold(weights))
        now, sizes = run.ledger.virtual_time_s, run.data.partition.sizes
        landed: list[_Flight] = []
        arrived = 0
        # Who takes the place of the last to land starts in the next round, from the weights that it brings.
        while arrived < self._clock.buffer_size and len(landed) < _PATIENCE * self._clock.buffer_size:
            while len(self._heap) < self._concurrency and self._launch(run, method, number, weights, now):
                pass
            opens = self._opens(run, now)
            if opens < (self._heap[0].at_s if self._heap else np.inf):
                now = opens
                continue
            if not self._heap:
                break
            flight = heapq.heappop(self._heap)
            now = flight.at_s
            landed.append(flight)
            arrived += not flight.stopped and sizes[flight.client] > 0
        plan = self._planned(run, method, landed, number, now)
        needed = {flight.version for flight in self._heap}
        self._versions = {version: held for version, held in self._versions.items() if version in needed}
        return plan

    def _opens(self, run: RunContext, now: float) -> float:
        """When somebody comes who can take a free place; inf: there is none, or nobody comes (or the sampler refuses
        who is there).
        """
        if run.fleet.availability is None or len(self._heap) >= self._concurrency:
            return np.inf
        flying = [flight.client for flight in self._heap]
        opens = run.fleet.availability.next_s(now, np.union1d(flying, _without_samples(run)))
        return opens if opens > now else np.inf

    def _launch(self, run: RunContext, method: Method, version: int, weights: np.ndarray, now: float) -> bool:
        flying = {flight.client for flight in self._heap}
        run.clock_s = now
        chosen = run.sampler.choose(run, self._turns, 1, weights, flying)
        run.clock_s = None
        if len(chosen) == 0:
            return False
        cost = _cost(run, method, chosen, self._total_share(run))
        latency = float(cost.latency_s[0])
        stop = float(_stops(run, chosen, cost.latency_s, now, self._turns)[0])
        end = now + min(latency, stop)
        heapq.heappush(self._heap, _Flight(end, self._turns, int(chosen[0]), version, now, stop < latency))
        self._turns += 1
        return True

    def _total_share(self, run: RunContext) -> float:
        """The band is split over as many clients as train at a time, of average share."""
        return self._concurrency * float(run.fleet.bandwidth_share.mean())

    def _planned(self, run: RunContext, method: Method, landed: list[_Flight], number: int, now: float) -> RoundPlan:
        cohort = np.array([flight.client for flight in landed], dtype=np.int64)
        staleness = np.array([number - flight.version for flight in landed], dtype=np.float64)
        return RoundPlan(
            cohort=cohort,
            cost=_cost(run, method, cohort, self._total_share(run)),
            until_s=np.array([flight.at_s - flight.started_s for flight in landed]),
            left_out={place: _DROPPED for place, flight in enumerate(landed) if flight.stopped},
            weight=np.ones(len(landed)),
            scale=(1.0 + staleness) ** -self._clock.staleness_exponent,
            ends_s=now,
            start=[self._versions[flight.version][1] for flight in landed],
            turn=[flight.turn for flight in landed],
        )

    def state(self) -> dict[str, np.ndarray]:
        flights = [
            [flight.at_s, flight.turn, flight.client, flight.version, flight.started_s, flight.stopped]
            for flight in sorted(self._heap)
        ]
        versions = {f"version/{version}": weights for version, (weights, _) in self._versions.items()}
        return {"flights": np.array(flights, dtype=np.float64), "turns": np.array([self._turns]), **versions}

    def load_state(self, state: dict[str, np.ndarray], run: RunContext) -> None:
        self._heap = [
            _Flight(at, int(turn), int(client), int(version), started, bool(stopped))
            for at, turn, client, version, started, stopped in state["flights"].tolist()
        ]
        self._turns = int(state["turns"][0])
        for name, weights in state.items():
            if name.startswith("version/"):
                self._versions[int(name.removeprefix("version/"))] = (weights, run.runtime.hold(weights))
