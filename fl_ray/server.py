"""The one round loop. Methods fill in its stages."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fl_ray.checkpoint import Checkpoint
from fl_ray.context import RunContext
from fl_ray.devices.cost import RoundCost, round_cost, server_time_s
from fl_ray.methods.base import Method
from fl_ray.runtime.base import RoundResult

__all__ = ["RoundReport", "checkpoint_of", "rounds"]


@dataclass
class RoundReport:
    """A finished round: its row of the history, and what hooks may want beside it."""

    row: dict[str, Any]
    weights: np.ndarray
    result: RoundResult
    cost: RoundCost | None
    cohort: np.ndarray
    started_virtual_s: float
    """Virtual time at which the round began."""


def rounds(run: RunContext, method: Method, weights: np.ndarray, done: int = 0) -> Iterator[RoundReport]:
    """Run the rounds from ``done`` on, one report each."""
    config = run.config
    for number in range(done, config.rounds):
        started, virtual = time.perf_counter(), run.ledger.virtual_time_s
        cohort = method.cohort(run, number)
        method.before_training(run, number, weights, cohort)
        result, cost = RoundResult(np.zeros(len(weights)), {}, []), None
        if method.trains_clients:
            tasks = method.tasks(run, number, cohort)
            individual = method.needs == "individual"
            result = run.runtime.train(tasks, weights, number, individual, run.phases)
            cost = _cost(run, method, cohort)
        with run.phases.phase("train"):
            method.after_training(run)
        with run.phases.phase("aggregate"):
            weights = method.aggregate(run, number, weights, result)
        _book(run, method, number, cohort, cost)
        evaluation = None
        if (number + 1) % config.evaluate_every == 0 or number + 1 == config.rounds:
            with run.phases.phase("evaluate"):
                evaluation = method.evaluate(run, weights)
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
            "wall_s": time.perf_counter() - started,
        }
        yield RoundReport(row, weights, result, cost, cohort, virtual)


def _link_bytes(run: RunContext, method: Method) -> int:
    return run.model_bytes if method.exchanges_weights else 0


def _cost(run: RunContext, method: Method, cohort: np.ndarray) -> RoundCost:
    link = _link_bytes(run, method)
    samples = run.data.partition.sizes[cohort]
    return round_cost(run.config.fleet, run.fleet, cohort, samples, run.config.training.local_epochs, link, link)


def _book(run: RunContext, method: Method, number: int, cohort: np.ndarray, cost: RoundCost | None) -> None:
    server = server_time_s(run.config.fleet, run.fleet, method.server_samples(run, number))
    run.ledger.samples_trained += method.server_samples(run, number)
    if cost is not None:
        run.ledger.samples_trained += run.config.training.local_epochs * int(run.data.partition.sizes[cohort].sum())
    moved = len(cohort) * _link_bytes(run, method) if cost is not None else 0
    run.ledger.add_round(cost, server, moved, moved)


def checkpoint_of(report: RoundReport, run: RunContext, method: Method, left_out: int, wall_s: float) -> Checkpoint:
    """What resuming after this round needs."""
    ledger, phases = run.ledger.state(), dict(run.phases.seconds)
    return Checkpoint(report.row["round"], report.weights, method.state(), ledger, left_out, phases, wall_s)
