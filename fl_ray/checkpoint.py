"""Checkpoints: one safetensors file each, whole or not there."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fl_ray.runtime.tasks import TrainingPath

__all__ = ["Checkpoint", "latest", "save"]

_KEPT = 2
_HEADER = ("rounds_done", "ledger", "faults", "phases", "wall_s", "path", "notes", "starting")


@dataclass
class Checkpoint:
    """The state after ``rounds_done`` rounds.

    Attributes:
        state: arrays by part of the run (method, sampler, schedule, best) and name.
        faults: how many updates were left out, by kind; and how many clients were trained again.
        path: how clients are trained.
        notes: what else belongs to the run: the tracker's run, the generator's cache keys, notes for its summary.
        starting: the method's work before its first round has begun, and goes on from here.
    """

    rounds_done: int
    weights: np.ndarray
    state: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    ledger: dict[str, Any] = field(default_factory=dict)
    faults: dict[str, int] = field(default_factory=dict)
    phases: dict[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    path: TrainingPath = "plain"
    notes: dict[str, Any] = field(default_factory=dict)
    starting: bool = False


def _files(folder: Path) -> list[Path]:
    return sorted(folder.glob("round_*.safetensors"), reverse=True)


def save(folder: Path, state: Checkpoint, kept: int = _KEPT) -> None:
    """Write a checkpoint and remove all but the last few."""
    folder.mkdir(exist_ok=True)
    tensors = {"weights": state.weights}
    for part, arrays in state.state.items():
        tensors |= {f"{part}/{name}": value for name, value in arrays.items()}
    header = {name: getattr(state, name) for name in _HEADER}
    path = folder / f"round_{state.rounds_done:06d}.safetensors"
    draft = folder / f".{path.name}.draft"
    save_file(
        {name: np.ascontiguousarray(value) for name, value in tensors.items()}, draft, {"run": json.dumps(header)}
    )
    with draft.open("rb") as stream:
        os.fsync(stream.fileno())
    draft.replace(path)
    for old in _files(folder)[kept:]:
        old.unlink()


def latest(folder: Path, at_most: int | None = None) -> Checkpoint | None:
    """The newest checkpoint (after at most so many rounds) that can be read, or None. A damaged one is passed over
    with a warning.
    """
    for path in _files(folder):
        if at_most is not None and int(path.stem.removeprefix("round_")) > at_most:
            continue
        try:
            with safe_open(path, framework="numpy") as stored:
                header = json.loads(stored.metadata()["run"])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            warnings.warn(f"checkpoint {path} is damaged ({error}); going back to the one before", stacklevel=2)
            continue
        return Checkpoint(weights=tensors.pop("weights"), state=_nested(tensors), **header)
    return None


def _nested(tensors: dict[str, np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    state: dict[str, dict[str, np.ndarray]] = {}
    for name, value in tensors.items():
        part, _, inner = name.partition("/")
        state.setdefault(part, {})[inner] = value
    return state
