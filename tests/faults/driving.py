"""Runs of the real command that are killed and go on, for tests."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from fl_ray.run_folder import HISTORY_COLUMNS, RunFolder

COMMAND = [sys.executable, "-m", "fl_ray"]


def recipe(folder: Path, **settings: Any) -> Path:
    """A recipe whose rounds take some tenths of a second, on two pooled actors."""
    content = {
        "name": "killed",
        "data": {"name": "digits", "clients": 12, "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 8}},
        "model": {"name": "small_cnn", "dropout": 0.2},
        "method": {"name": "scaffold"},
        "training": {"lr": 0.05, "batch_size": 8, "local_epochs": 3},
        "runtime": {"actors": "pooled", "num_actors": 2, "training_path": "plain"},
        "ray": {"num_cpus": 2},
        "fleet": {"dropout": 0.1},
        "rounds": 40,
        "clients_per_round": 6,
        "checkpoint": {"every": 3},
        "tracking": {"uri": f"sqlite:///{folder / 'mlflow.db'}"},
        **settings,
    }
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump(content), encoding="utf-8")
    return path


def run(*arguments: str) -> None:
    """The command, to its end."""
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]


def killed(arguments: list[str], output: Path, wait_s: float, number: int = signal.SIGKILL) -> int:
    """Start the command, send it a signal ``wait_s`` after its first new round; how many rounds the history then has.

    It may end before.
    """
    before = len(RunFolder(output).history())
    process = subprocess.Popen([*COMMAND, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    give_up = time.monotonic() + 120
    while len(RunFolder(output).history()) <= before and process.poll() is None:
        assert time.monotonic() < give_up, "no round was finished in two minutes"
        time.sleep(0.02)
    time.sleep(wait_s)
    if process.poll() is None:
        os.kill(process.pid, number)
    process.wait(60)
    return len(RunFolder(output).history())


def run_with_kills(path: Path, output: Path, kills: int, seed: int) -> int:
    """Kill -9 the driver at random moments, resume each time, and run to the end; how many kills met a run alive."""
    draws, met = random.Random(seed), 0
    arguments = ["run", str(path), "--output", str(output)]
    for _ in range(kills):
        killed(arguments, output, draws.uniform(0.0, 1.0))
        if RunFolder(output).finished():
            return met
        met += 1
        arguments = ["run", "--resume", str(output)]
    run(*arguments)
    return met


def assert_same_run(one: Path, other: Path) -> None:
    """Equal weights, and equal histories in all columns but wall time."""
    mine, its = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert mine.keys() == its.keys()
    assert all(torch.equal(value, its[name]) for name, value in mine.items())
    kept = [column for column in HISTORY_COLUMNS if column != "wall_s"]
    first, second = RunFolder(one).history(), RunFolder(other).history()
    assert [[repr(row[column]) for column in kept] for row in first] == [
        [repr(row[column]) for column in kept] for row in second
    ]


def assert_one_tracked_run(folder: Path, rounds: int, runs: int) -> None:
    """MLflow holds so many runs in all, and of each one every step once."""
    import mlflow

    client = mlflow.MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("killed")
    found = client.search_runs([experiment.experiment_id])
    assert len(found) == runs
    for tracked in found:
        assert tracked.info.status == "FINISHED"
        history = client.get_metric_history(tracked.info.run_id, "train_loss")
        assert sorted(metric.step for metric in history) == list(range(1, rounds + 1))
