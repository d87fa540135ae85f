"""What a run leaves behind: its folder's files, written and read in one place."""

from __future__ import annotations

import contextlib
import csv
import errno
import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from filelock import FileLock, Timeout

from fl_ray.config import RunConfig
from fl_ray.errors import OutputError
from fl_ray.recipes import load_recipe, make_config, to_dict
from fl_ray.version import __version__

__all__ = [
    "HISTORY_COLUMNS",
    "RunFolder",
    "at_work",
    "environment",
    "filled_folder",
    "new_folder",
    "plain",
    "write_json",
]

HISTORY_COLUMNS = (
    "round",
    "virtual_time_s",
    "energy_j",
    "bytes_up",
    "bytes_down",
    "clients",
    "train_loss",
    "test_accuracy",
    "test_loss",
    "client_accuracy",
    "client_accuracy_worst_decile",
    "gradient_cosine",
    "wall_s",
)
CLIENT_COLUMNS = ("round", "client", "samples", "accuracy", "loss")
_INTEGERS = {"round", "bytes_up", "bytes_down", "clients", "client", "samples"}
_PACKAGES = ("ray", "torch", "torchvision", "pytorch-lightning", "diffusers", "mlflow", "numpy")
_EXTRAS = ("transformers", "peft")  # of setup.cfg's extra ``text``


def new_folder(path: Path) -> Path:
    """Make an output folder.

    Raises:
        OutputError: there is something in it already (nothing is ever overwritten), or it can't be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        used = any(path.iterdir())
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise OutputError(f"--output {path}: {error.strerror}; name a folder that can be written") from error
    if used:
        raise OutputError(
            f"--output {path}: the folder is in use, and nothing is overwritten; name another one, or go on with "
            "an interrupted run or study: fl-ray run --resume DIR, fl-ray tune --resume DIR"
        )
    return path


@contextlib.contextmanager
def filled_folder(path: Path) -> Iterator[Path]:
    """A new output folder, taken away again where nothing was put into it, as by a command that is refused.

    Raises:
        OutputError: as ``new_folder``, before anything is done.
    """
    folder = new_folder(path)
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


@contextlib.contextmanager
def at_work(path: Path) -> Iterator[None]:
    """For the one process at a time that writes into the folder of a run, a comparison or a study, by a lock beside it.
    The lock of a killed process is free.

    Raises:
        OutputError: another process is at work in it, or its file system takes no locks.
    """
    lock = _lock_beside(path)
    try:
        yield
    finally:
        if lock is not None:
            try:
                Path(lock.lock_file).unlink(missing_ok=True)
            finally:
                lock.release()


def _lock_beside(path: Path) -> FileLock | None:
    """An acquired lock; None where no file can be beside the folder: it may be writable where the one around it is not,
    as one that a container is given.
    """
    whole = path.resolve()  # "." has no name
    lock = FileLock(whole.parent / f".{whole.name}.lock")
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        if not Path(lock.lock_file).exists():  # nobody's: a file system said "no such file" in place of "not permitted"
            return None
        raise OutputError(
            f"{path}: another process is at work in this folder; wait for its end, or name another one by --output"
        ) from error
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise OutputError(f"--output {path}: {error.strerror}; name a folder that can be written") from error
        return None
    return lock


def write_json(path: Path, content: Any) -> None:
    """Write JSON so that the file is whole or not there; NaN becomes null."""
    draft = path.with_name(f".{path.name}.draft")
    draft.write_text(json.dumps(plain(content), indent=2) + "\n", encoding="utf-8")
    draft.replace(path)


def plain(value: Any) -> Any:
    """A value as JSON has it: arrays as lists, NaN and infinity as null."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def environment() -> dict[str, Any]:
    """What runs this: versions, revision, machine."""
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    for name in _EXTRAS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "fl_ray": __version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "packages": versions,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _git_revision() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(
            command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None  # installed without its repository
    return done.stdout.strip()


class RunFolder:
    """The folder of one run."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    def begin(self, config: RunConfig, label: str, tags: Mapping[str, str], inputs: Mapping[str, str]) -> None:
        """What a run's folder holds before anything is done; ``fl-ray run --resume`` takes it from there.

        Args:
            inputs: the files that its settings name, see ``fl_ray.input_files``.
        """
        self.write_config(config)
        write_json(self / "run.json", {"label": label, "tags": dict(tags), "inputs": dict(inputs)})

    def begun(self) -> dict[str, Any]:
        """What ``begin`` has left beside the settings; empty where it was not called."""
        known = self / "run.json"
        return json.loads(known.read_text(encoding="utf-8")) if known.exists() else {}

    def write_config(self, config: RunConfig) -> None:
        """config.yaml: the resolved recipe, and what ran it. It is a recipe itself: ``fl-ray run`` takes it."""
        content = to_dict(config) | {"environment": environment()}
        draft = self / ".config.draft"
        draft.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        draft.replace(self / "config.yaml")

    def config(self) -> RunConfig:
        """The resolved recipe.

        Raises:
            OutputError: this is no run's folder.
        """
        if not (self / "config.yaml").exists():
            raise OutputError(f"{self.path}: no config.yaml in it, so this is no run's folder")
        return make_config(load_recipe(self / "config.yaml"))

    def environment(self) -> dict[str, Any]:
        """What ran it."""
        return yaml.safe_load((self / "config.yaml").read_text(encoding="utf-8")).get("environment", {})

    def start_history(self, keep_rounds: int = 0) -> None:
        """A history.csv with the first ``keep_rounds`` rounds of what is there; clients.csv likewise."""
        _rewrite(self / "history.csv", HISTORY_COLUMNS, [row for row in self.history() if row["round"] <= keep_rounds])
        kept = [row for row in self.clients() if row["round"] <= keep_rounds]
        if kept or (self / "clients.csv").exists():
            _rewrite(self / "clients.csv", CLIENT_COLUMNS, kept)

    def add_history(self, row: dict[str, Any]) -> None:
        """Append a round; columns that it lacks are NaN."""
        _append(self / "history.csv", HISTORY_COLUMNS, [row])

    def add_clients(self, rows: list[dict[str, Any]]) -> None:
        """Append the clients' own tests of a round."""
        if not (self / "clients.csv").exists():
            _rewrite(self / "clients.csv", CLIENT_COLUMNS, [])
        _append(self / "clients.csv", CLIENT_COLUMNS, rows)

    def history(self) -> list[dict[str, Any]]:
        """All rounds; counts are int, the rest float (NaN where a round was not evaluated)."""
        return _read_csv(self / "history.csv")

    def clients(self) -> list[dict[str, Any]]:
        """Every client's own tests."""
        return _read_csv(self / "clients.csv")

    def tested_rounds(self) -> set[int]:
        """After which rounds the clients were tested."""
        return {row["round"] for row in self.clients()}

    def last_client_test(self) -> list[dict[str, Any]]:
        """The rows of the clients' last test; empty where there was none."""
        rows = self.clients()
        return [row for row in rows if row["round"] == rows[-1]["round"]]

    def timeline(self) -> list[dict[str, Any]]:
        """The device timeline of the first rounds; empty where there is none."""
        path = self / "timeline.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else []

    def partition_digest(self) -> str | None:
        """The digest of the run's partition, or None where it was not written yet."""
        path = self / "partition.json"
        return json.loads(path.read_text(encoding="utf-8"))["digest"] if path.exists() else None

    def summary(self) -> dict[str, Any] | None:
        """summary.json, or None where there is none."""
        path = self / "summary.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def replay_command(self, round_number: int, client: int) -> str:
        """What shows a client's training of a round (counted from 1) once more, with the traceback of its error."""
        return f"fl-ray replay {shlex.quote(str(self.path))} --round {round_number} --client {client}"

    def finished(self) -> bool:
        """Whether the run came to its end."""
        summary = self.summary()
        return summary is not None and summary["status"] == "finished"


def _rewrite(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    draft = path.with_name(f".{path.name}.draft")
    with draft.open("w", newline="", encoding="utf-8") as stream:
        csv.DictWriter(stream, columns).writeheader()
        csv.DictWriter(stream, columns, restval="nan").writerows(rows)
    draft.replace(path)


def _append(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with path.open("a", newline="", encoding="utf-8") as stream:
        csv.DictWriter(stream, columns, restval="nan").writerows(rows)


def _read_csv(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    if lines and not lines[-1].endswith("\n"):
        lines.pop()  # a kill or a full disk cut the last line
    rows = csv.DictReader(lines)
    return [{key: int(value) if key in _INTEGERS else float(value) for key, value in row.items()} for row in rows]
