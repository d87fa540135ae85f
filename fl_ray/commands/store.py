"""``fl-ray compare --mlflow`` and ``fl-ray ui``: the tracking store, read."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fl_ray.commands.output import default_output, print_table
from fl_ray.errors import SettingError

__all__ = ["compare_store", "ui"]


def _uri(overrides: Mapping[str, Any], command: str) -> str:
    """The store that the overrides name, else the one of this folder."""
    from fl_ray.tracking_store import default_store

    others = sorted(key for key in overrides if key != "tracking.uri")
    if others:
        raise SettingError(f"{command} reads a tracking store and runs nothing; leave --{others[0]} out")
    return str(overrides.get("tracking.uri") or default_store())


def compare_store(options: Any, overrides: Mapping[str, Any]) -> int:
    """A comparison's table and figures from the tracking store alone."""
    from fl_ray.commands.reports import check_baseline
    from fl_ray.report.store_report import store_report
    from fl_ray.run_folder import new_folder
    from fl_ray.store_comparison import runs_of_experiment
    from fl_ray.tracking_store import is_missing_file

    uri = _uri(overrides, "fl-ray compare --mlflow")
    if is_missing_file(uri):
        raise SettingError(f"tracking.uri {uri}: there is no such file; give --tracking.uri")
    runs, older = runs_of_experiment(uri, options.mlflow, options.filter or "")
    labels = sorted({run.label for run in runs})
    check_baseline(options.baseline, labels)
    output = new_folder(Path(options.output) if options.output else default_output(options.mlflow))
    table = store_report(uri, options.mlflow, runs, older, options.baseline, output)
    print_table(*table, f"{options.mlflow}, from the tracking store")
    print("±: half width of the 95 % interval over seeds")
    if older:
        print(f"left out: {older} runs that have newer ones of the same label and seed (--filter chooses others)")
    print(f"report: {output / 'report.html'}")
    return 0


def ui(options: Any, overrides: Mapping[str, Any]) -> int:
    """MLflow's page for the store, on this machine alone, until it is interrupted.

    Raises:
        SettingError: the port is in use.
    """
    uri = _uri(overrides, "fl-ray ui")
    if uri.startswith("http"):
        print(f"MLflow's page is {uri}")
        return 0
    _free(options.port)
    # One worker is enough for one user, and nothing here asks for MLflow's jobs: they would be eight more processes.
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", uri, "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(options.port)]
    page = subprocess.Popen(command, env={"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", **os.environ})
    print(f"MLflow's page: http://127.0.0.1:{options.port} (Ctrl-C ends it)", flush=True)
    try:
        return page.wait()
    except KeyboardInterrupt:
        page.terminate()  # it ends its workers; killed, it would leave them behind
        page.wait()
        raise


def _free(port: int) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind(("127.0.0.1", port))
        except (OSError, OverflowError) as error:
            raise SettingError(f"--port {port}: it can't be used ({error}); give another --port") from error
