"""``fl-ray submit``, ``jobs``, ``logs`` and ``stop``: a Ray cluster's jobs."""

from __future__ import annotations

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from fl_ray.commands.output import print_table
from fl_ray.errors import SettingError

__all__ = ["jobs", "logs", "stop", "submit"]

_POLL_S = 0.5


def submit(options: Any, overrides: dict[str, Any]) -> int:
    """Run a recipe or a study on a cluster; with ``--wait`` follow it, and return its exit code."""
    from fl_ray.cluster import Jobs, entrypoint

    environment = {}
    for word in options.env:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise SettingError(f"--env {word}: it must be NAME=VALUE")
        environment[name] = value
    if options.output is None:
        raise SettingError("--output is missing: a folder that all nodes see, or an address as s3://bucket/run")
    file = Path(options.file)
    requirements = Path(options.requirements) if options.requirements is not None else None
    if requirements is not None and not requirements.is_file():
        raise SettingError(f"--requirements {requirements}: there is no such file")
    command, tracking = entrypoint(file, options.seeds, options.output, overrides)
    cluster = Jobs(options.address)
    job = cluster.submit(command, file.stem, requirements, environment)
    print(f"job {job}: {command}", flush=True)
    if tracking.enabled and tracking.uri is None:
        print(
            "fl-ray: tracking.uri is not set: what the job logs to MLflow goes with the job's own folder. Give "
            "--tracking.uri http://..., or --tracking.enabled false",
            file=sys.stderr,
        )
    if not options.wait:
        print(f"fl-ray logs {job} --address {options.address} --follow shows it, fl-ray stop ends it")
        return 0
    return _follow(cluster, job)


def _follow(cluster: Any, job: str) -> int:
    """Show a job until it ends; its exit code. Ctrl-C asks whether to leave or to stop it."""
    from fl_ray.cluster import ENDED

    try:
        for text in cluster.follow(job):
            print(text, end="", flush=True)
        while cluster.status(job) not in ENDED:
            time.sleep(_POLL_S)
    except KeyboardInterrupt:
        stopping = False
        if sys.stdin.isatty():
            print(f"\njob {job} goes on. Stop it? [y/N] ", end="", file=sys.stderr, flush=True)
            stopping = sys.stdin.readline().strip().lower() in ("y", "yes")
        if stopping:
            cluster.stop(job)
            print(f"fl-ray: job {job} is stopped", file=sys.stderr)
        else:
            print(f"fl-ray: job {job} goes on; fl-ray stop {job} ends it", file=sys.stderr)
        raise
    status = cluster.status(job)
    print(f"job {job}: {status.lower()}")
    return cluster.exit_code(job)


def jobs(options: Any, overrides: dict[str, Any]) -> int:
    """Our jobs on a cluster."""
    from fl_ray.cluster import Jobs

    _no_settings("jobs", overrides)
    rows = [
        [job["id"], job["name"], job["status"].lower(), _when(job["began"]), job["command"]]
        for job in Jobs(options.address).ours()
    ]
    print_table(["job", "name", "status", "began", "command"], rows)
    return 0


def _when(milliseconds: int | None) -> str:
    return "–" if milliseconds is None else f"{datetime.fromtimestamp(milliseconds / 1000):%Y-%m-%d %H:%M}"


def logs(options: Any, overrides: dict[str, Any]) -> int:
    """What a job has said; with ``--follow`` until it ends, and then its exit code."""
    from fl_ray.cluster import Jobs

    _no_settings("logs", overrides)
    cluster = Jobs(options.address)
    if options.follow:
        return _follow(cluster, options.job)
    print(cluster.logs(options.job), end="")
    return 0


def stop(options: Any, overrides: dict[str, Any]) -> int:
    """End a job."""
    from fl_ray.cluster import Jobs

    _no_settings("stop", overrides)
    running = Jobs(options.address).stop(options.job)
    print(f"job {options.job}: {'stopped' if running else 'it had ended before'}")
    return 0


def _no_settings(command: str, overrides: dict[str, Any]) -> None:
    if overrides:
        raise SettingError(f"fl-ray {command} runs nothing; leave --{min(overrides)} out")
