"""Runs of a comparison in processes of their own, several at a time: for runs that keep one core busy each."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fl_ray.config import RunConfig
from fl_ray.errors import FlRayError
from fl_ray.progress import Progress
from fl_ray.run_folder import RunFolder

__all__ = ["PlannedRun", "run_at_once"]

_POLL_S = 0.5
LOG = "log.txt"


@dataclass(frozen=True)
class PlannedRun:
    """A run that waits: its folder holds config.yaml and run.json, so that ``fl-ray run --resume`` carries it out."""

    name: str
    config: RunConfig
    folder: Path


def run_at_once(runs: Sequence[PlannedRun], jobs: int, progress: Progress) -> None:
    """Carry out the runs, ``jobs`` at a time, each in a process whose words go to log.txt in its folder.

    An interrupt is handed on: every run leaves its checkpoint.

    Raises:
        FlRayError: some failed; the others were finished first.
    """
    waiting, failed = list(reversed(runs)), []
    running: list[tuple[PlannedRun, subprocess.Popen[bytes], float]] = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop()
                progress.message(f"{run.name}: begun; see {run.folder / LOG}")
                running.append((run, _begin(run), time.monotonic()))
            time.sleep(_POLL_S)
            for entry in [entry for entry in running if entry[1].poll() is not None]:
                running.remove(entry)
                run, process, began = entry
                if process.returncode == 0 or RunFolder(run.folder).finished():  # by ``fl-ray run --resume``
                    accuracy = (RunFolder(run.folder).summary() or {}).get("final_accuracy")
                    minutes = (time.monotonic() - began) / 60
                    progress.message(f"{run.name}: finished after {minutes:.1f} min, accuracy {accuracy:.4f}")
                else:
                    failed.append(run)
                    progress.message(f"{run.name}: failed with exit code {process.returncode}")
    finally:
        for _, process, _ in running:
            process.send_signal(signal.SIGTERM)
        for _, process, _ in running:
            process.wait()
    if failed:
        raise FlRayError(
            f"{len(failed)} of {len(runs)} runs failed: {', '.join(run.name for run in failed)}; the reason is at the "
            f"end of {failed[0].folder / LOG}"
        )


def _begin(run: PlannedRun) -> subprocess.Popen[bytes]:
    threads = str(run.config.runtime.threads)
    with (run.folder / LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "fl_ray", "run", "--resume", str(run.folder)],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": threads},
            start_new_session=True,  # Ctrl-C reaches the parent alone, which hands it on once
        )
