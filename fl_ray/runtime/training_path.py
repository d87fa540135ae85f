"""Which training path a run takes: clients one after another (``plain``), or several as one program (``batched``)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from fl_ray.errors import FlRayError, SettingError
from fl_ray.runtime.batched import refusal
from fl_ray.runtime.tasks import RoundSettings, Task, TrainingPath

if TYPE_CHECKING:
    from fl_ray.runtime.host import ClientHost

__all__ = ["choose_path"]

_WORTH_IT = 1.25  # how much faster ``auto`` wants the batched path to be
_GROUPS = (1, 2, 3, 5, 16)  # sizes of groups that are compared with a whole one
_SLOW_STEP_S = 0.01  # above it, launching kernels is a small part of a step


def choose_path(
    host: ClientHost, wanted: str, clients: Sequence[int], at_once: int, weights: np.ndarray
) -> tuple[TrainingPath, str]:
    """Which training path ``runtime.training_path`` means here, and why.

    ``auto`` trains clients for an epoch by either path, and takes ``batched`` where it is clearly faster.

    Args:
        host: in which such trainings are cut to a few batches.
        clients: to try it with.
        at_once: how many a host has in a round.

    Raises:
        SettingError: ``batched`` was asked for and can't be had.
    """
    path, reason, can = _chosen(host, wanted, clients, at_once, weights)
    if wanted == "batched" and not can:
        raise SettingError(
            f"runtime.training_path is batched, but model {host.job.model.name} can't be trained so: {reason}; "
            "use plain or auto"
        )
    return path, reason


def _chosen(
    host: ClientHost, wanted: str, clients: Sequence[int], at_once: int, weights: np.ndarray
) -> tuple[TrainingPath, str, bool]:
    reason = refusal(host.module)
    if reason is not None:
        return "plain", reason, False
    tasks = [Task(client, 1 / len(clients)) for client in clients[:at_once]]
    if wanted == "auto":
        batches = -(-len(host.rows(tasks[0], RoundSettings(0))) // host.job.training.batch_size)
        step = _measured(host, tasks[:1], weights, "plain") / batches
        if step > _SLOW_STEP_S:
            return "plain", f"a step takes {1000 * step:.0f} ms, of which little is overhead", True
    reason = _unfit(host, clients, weights)
    if reason is not None:
        return "plain", reason, False
    if wanted == "batched":
        return "batched", "it is set", True
    seconds = {path: _measured(host, tasks, weights, path) for path in ("plain", "batched")}
    faster = seconds["plain"] / seconds["batched"]
    told = f"batched trains {len(tasks)} clients {faster:.1f} times as fast as plain"
    return ("batched" if faster >= _WORTH_IT else "plain"), told, True


def _unfit(host: ClientHost, clients: Sequence[int], weights: np.ndarray) -> str | None:
    """Try the batched path: any number of clients together must give each the same bits, and buffers must stay."""
    start = torch.from_numpy(weights)
    most = host.most_together()
    turns = range(-(-most // len(clients)))
    tasks = [Task(client, 1.0, turn=turn) for turn in turns for client in clients][:most]
    settings = RoundSettings(0, "batched")
    try:
        whole = host.train_batched(tasks, [start] * len(tasks), settings)
        for size in (size for size in _GROUPS if size < most):
            part = host.train_batched(tasks[:size], [start] * size, settings)
            pairs = zip(part, whole[:size], strict=True)
            if not all(torch.equal(_bits(one.trained), _bits(two.trained)) for one, two in pairs):
                return "on this processor its result depends on who is computed together"
        buffers = torch.from_numpy(~host.layout.is_parameter)
        if not torch.equal(host.train_one(tasks[0], start, settings).trained[buffers], start[buffers]):
            return "its buffers change in training"
    except FlRayError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever torch.func can't do with a user's module; it is told
        said = (str(error).splitlines() or [""])[0]
        return f"torch.func can't run it ({type(error).__name__}: {said})"
    return None


def _measured(host: ClientHost, tasks: list[Task], weights: np.ndarray, path: TrainingPath) -> float:
    """Seconds of one training of the tasks' clients; the faster of two, after one that isn't counted."""
    times = []
    for _ in range(3):
        begun = time.perf_counter()
        host.train(tasks, weights, RoundSettings(0, path))
        times.append(time.perf_counter() - begun)
    return min(times[1:])


def _bits(vector: torch.Tensor) -> torch.Tensor:
    """Float32 as integers, which are equal where NaN is."""
    return vector.view(torch.int32)
