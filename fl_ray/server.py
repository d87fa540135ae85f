"""The one round loop. Methods fill in its stages; the schedule says who comes through, and when."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fl_ray.checkpoint import Checkpoint
from fl_ray.client_models import train_or_find
from fl_ray.context import RunContext
from fl_ray.devices.cost import server_time_s
from fl_ray.errors import TooFewClientsError
from fl_ray.methods.base import Method
from fl_ray.runtime.base import RoundResult
from fl_ray.runtime.tasks import ClientRecord, RoundSettings
from fl_ray.schedule import RoundPlan

__all__ = ["REPLAYED", "RoundReport", "begin", "checkpoint_of", "rounds", "train_clients"]

_TOLD = 3  # reasons that an error names
REPLAYED = ("raised", "not_finite")  # faults of the training itself, that a replay shows


@dataclass
class RoundReport:
    """A finished round: its row of the history, and what hooks may want beside it."""

    row: dict[str, Any]
    weights: np.ndarray
    result: RoundResult
    plan: RoundPlan | None
    started_virtual_s: float
    """Virtual time at which the round began."""


def begin(run: RunContext, method: Method, weights: np.ndarray) -> Iterator[np.ndarray]:
    """What comes before the rounds, see ``Method.start``: the weights after each of its steps.

    Raises:
        TypeError: a method of the user's own has returned weights in place of an iterator over them.
    """
    for found in method.start(run, weights):
        if np.shape(found) != weights.shape:
            raise TypeError(f"{type(method).__name__}.start must yield weights {weights.shape}, not return them")
        yield found


def rounds(run: RunContext, method: Method, weights: np.ndarray, done: int = 0) -> Iterator[RoundReport]:
    """Run the rounds from ``done`` on, one report each.

    Raises:
        TooFewClientsError: twice in a round, fewer updates than ``runtime.min_clients`` came in.
    """
    config = run.config
    ended = time.perf_counter()
    for number in range(done, config.rounds):
        asked, plan = run.ledger.virtual_time_s, None
        method.begin_round(run, number)
        with run.phases.phase("dispatch"):
            if method.trains_clients:
                plan = run.schedule.plan(run, method, number, weights)
            # A server that trains alone may still ask a cohort for its label statistics.
            cohort = plan.cohort if plan is not None else method.cohort(run, number, weights)
        virtual = run.ledger.virtual_time_s  # later, where the plan waited for clients
        method.before_training(run, number, weights, cohort)
        result = RoundResult(np.zeros(len(weights)), {}, [])
        if plan is not None:
            plan, result = _train(run, method, number, weights, plan)
            run.sampler.observe(run, number, plan, result)
        with run.phases.phase("train"):
            method.after_training(run)
        with run.phases.phase("aggregate"):
            weights = method.aggregate(run, number, weights, result)
        samples = method.server_samples(run, number)
        run.ledger.samples_trained += samples
        clients_end = plan.ends_s if plan is not None else virtual
        server_starts = clients_end if method.server_waits else virtual
        run.ledger.advance(max(clients_end, server_starts + server_time_s(run.config.fleet, run.fleet, samples)))
        if config.runtime.emulate == "realtime":  # waiting for late, lost and absent clients takes wall time, too
            with run.phases.phase("train"):
                lasts = (run.ledger.virtual_time_s - asked) * config.runtime.time_scale
                time.sleep(max(0.0, ended + lasts - time.perf_counter()))
        evaluation = None
        if (number + 1) % config.evaluate_every == 0 or number + 1 == config.rounds:
            with run.phases.phase("evaluate"):
                evaluation = method.evaluate(run, weights)
        began, ended = ended, time.perf_counter()
        row = {
            "round": number + 1,
            "virtual_time_s": run.ledger.virtual_time_s,
            "energy_j": run.ledger.energy_j,
            "bytes_up": run.ledger.bytes_up,
            "bytes_down": run.ledger.bytes_down,
            "clients": len(result.included),
            "train_loss": method.train_loss(result),
            "test_accuracy": evaluation.accuracy if evaluation else float("nan"),
            "test_loss": evaluation.loss if evaluation else float("nan"),
            "wall_s": ended - began + result.earlier_s,
        }
        yield RoundReport(row, weights, result, plan, virtual)


def _train(
    run: RunContext, method: Method, number: int, weights: np.ndarray, plan: RoundPlan
) -> tuple[RoundPlan, RoundResult]:
    """Train the planned clients; once more where too few updates come in. What it costs is booked, twice if need be."""
    wanted = run.config.runtime.min_clients
    result = train_clients(run, method, number, weights, plan)
    _book(run, method, plan, result)
    if len(result.included) >= wanted:
        return plan, result
    run.progress.message(f"round {number + 1} is repeated: {len(result.included)} of {wanted} updates came in")
    run.ledger.advance(plan.ends_s)
    plan = run.schedule.plan(run, method, number, weights, attempt=1)
    result = train_clients(run, method, number, weights, plan)
    _book(run, method, plan, result)
    if len(result.included) >= wanted:
        return plan, result
    reasons = [f"client {record.client}: {record.left_out}" for record in result.left_out]
    shown = next((record.client for record in result.left_out if record.left_out.kind in REPLAYED), None)
    raise TooFewClientsError(
        f"round {number + 1}: {len(result.included)} updates came in, twice, but runtime.min_clients is {wanted}. "
        + "; ".join(reasons[:_TOLD])
        + (f"; and {len(reasons) - _TOLD} more" if len(reasons) > _TOLD else "")
        + ". Ways out: lower runtime.min_clients or fleet.dropout, raise clock.deadline_s or clients_per_round"
        + (f". See what happened: {run.folder.replay_command(number + 1, shown)}" if shown is not None else "")
    )


def train_clients(run: RunContext, method: Method, number: int, weights: np.ndarray, plan: RoundPlan) -> RoundResult:
    """The planned clients' training; the records of those that don't come through say why."""
    with run.phases.phase("dispatch"):
        arrived = plan.cohort[plan.arrived]
        tasks = plan.adapt(method.tasks(run, number, arrived)) if len(arrived) else []
        pace = run.config.runtime.time_scale if run.config.runtime.emulate == "realtime" else None
        settings = RoundSettings(number, run.path, method.needs == "individual", method.proximal, pace)
    result = RoundResult(np.zeros(len(weights)), {}, [])
    if tasks and method.keeps_client_models and pace is None and not plan.left_out:
        result = train_or_find(run, method, tasks, weights, settings)
    elif tasks:
        result = run.runtime.train(tasks, weights, settings, run.phases)
    now = time.time()
    missing = [
        ClientRecord(int(plan.cohort[place]), 0, float("nan"), 0.0, now, now, why)
        for place, why in sorted(plan.left_out.items())
    ]
    return replace(result, records=sorted(result.records + missing, key=lambda record: record.client))


def _book(run: RunContext, method: Method, plan: RoundPlan, result: RoundResult) -> None:
    """Energy, bytes, samples and faults of a round's clients."""
    run.faults.update(record.left_out.kind for record in result.left_out)
    run.faults["retried"] += sum(record.raised is not None for record in result.included)
    down, up = method.link_bytes(run, plan.cohort)
    energy, _ = plan.spent()
    done = plan.cohort[plan.arrived]
    training = run.config.training
    run.ledger.samples_trained += training.local_epochs * int(training.samples_of(run.data.partition.sizes[done]).sum())
    run.ledger.advance(run.ledger.virtual_time_s, energy, int(up[plan.arrived].sum()), int(down.sum()))


def checkpoint_of(rounds_done: int, weights: np.ndarray, run: RunContext, method: Method, wall_s: float) -> Checkpoint:
    """What going on after so many rounds needs."""
    state = {"method": method.state(), "sampler": run.sampler.state(), "schedule": run.schedule.state()}
    ledger, phases = run.ledger.state(), dict(run.phases.seconds)
    return Checkpoint(rounds_done, weights, state, ledger, dict(run.faults), phases, wall_s, run.path)
