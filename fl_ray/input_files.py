"""What settings name and what decides results by its content: who goes on with a run must find it as it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fl_ray.config import Component, RunConfig
from fl_ray.errors import OutputError, SettingError
from fl_ray.methods.base import Method
from fl_ray.recipes import build, start_of

__all__ = ["check_inputs", "input_files", "trace_files"]


def input_files(config: RunConfig) -> dict[str, str]:
    """SHA-256 of files, by their path as it is written in the settings: weights to start from, learning curve, plan and
    device traces; and of what the generator takes from outside, by its setting. A file that is missing is left out:
    whatever reads it tells.

    Raises:
        SettingError: the generator's files can't be read.
    """
    method: Method = build("method", config.method)
    named = [start_of(model) for model in (config.model, *method.own_models)] + method.input_files()
    named += [config.allocation.curve] if isinstance(config.allocation.curve, str) else []
    found = _hashes(named) | trace_files(config)
    if method.uses_generator and config.generator is not None:
        component = Component(config.generator.name, config.generator.settings)
        try:
            content = build("generator", component).content()
        except ValueError as error:
            raise SettingError(f"generator {config.generator.name}: {error}") from error
        found |= {f"generator.{setting}": made for setting, made in content.items()}
    return found


def trace_files(config: RunConfig) -> dict[str, str]:
    """Of these, the files of ``fleet.trace``."""
    trace = config.fleet.trace
    return {} if trace is None else _hashes([trace.capacity, trace.availability])


def _hashes(names: list[str | None]) -> dict[str, str]:
    paths = {name: Path(name).expanduser() for name in names if name is not None}
    return {name: _content_hash(path) for name, path in paths.items() if path.is_file()}


def check_inputs(stored: Mapping[str, str], found: Mapping[str, str], label: str) -> None:
    """Refuse what has changed since a run began.

    Args:
        stored, found: of ``input_files``, then and now.
        label: what names the run in the message.

    Raises:
        OutputError: a file has another content.
    """
    changed = [name for name, made in found.items() if stored.get(name, made) != made]
    if changed:
        raise OutputError(
            f"{label}: it was made with another content of {', '.join(changed)}; bring that back, or begin anew with "
            "another --output"
        )


def _content_hash(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
