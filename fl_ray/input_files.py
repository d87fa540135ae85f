"""Files that a recipe names and that decide results: whoever goes on with a run must find them as they were."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from fl_ray.config import RunConfig
from fl_ray.errors import OutputError
from fl_ray.methods.base import Method
from fl_ray.recipes import build, start_of

__all__ = ["check_inputs", "input_files"]


def input_files(config: RunConfig) -> dict[str, str]:
    """Weights to start from, learning curve and device traces that the settings name: SHA-256 by path, as it is written
    there. A file that is missing is left out: whatever reads it tells.
    """
    method: Method = build("method", config.method)
    named = [start_of(model) for model in (config.model, *method.own_models)]
    named += [config.allocation.curve] if isinstance(config.allocation.curve, str) else []
    if config.fleet.trace is not None:
        named += [config.fleet.trace.capacity, config.fleet.trace.availability]
    paths = {name: Path(name).expanduser() for name in named if name is not None}
    return {name: _digest(path) for name, path in paths.items() if path.is_file()}


def check_inputs(stored: Mapping[str, str], config: RunConfig, label: str) -> None:
    """Refuse files that have changed since a run began.

    Args:
        stored: of ``input_files``, then.
        label: what names the run in the message.

    Raises:
        OutputError: a file has another content.
    """
    changed = [name for name, found in input_files(config).items() if stored.get(name, found) != found]
    if changed:
        raise OutputError(
            f"{label}: it was made with another content of {', '.join(changed)}; bring that back, or begin anew with "
            "another --output"
        )


def _digest(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
