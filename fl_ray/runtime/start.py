"""Opening a backend, early: what takes long goes on in the background."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from fl_ray.config import RunConfig

if TYPE_CHECKING:
    from fl_ray.progress import Progress
    from fl_ray.runtime.base import Runtime
    from fl_ray.runtime.connection import Connection

__all__ = ["OpenRuntimes", "connect_ahead", "open_runtime"]

_begun: list[Connection] = []


def connect_ahead(recipe: Mapping[str, Any]) -> None:
    """Begin to start Ray for a recipe that is not checked yet: the check imports torch, which takes as long.

    Nothing happens where the recipe wants no Ray, or its ``ray`` section is wrong: that is told when it is checked. A
    running cluster is joined later, with nothing beside it: in the first jobs of a fresh cluster, torch could not be
    imported while Ray connected ("oneMKL: cannot load libtorch_cpu").
    """
    from fl_ray.errors import SettingError
    from fl_ray.recipes import ray_settings

    try:
        settings = ray_settings(recipe)
    except SettingError:
        return
    if settings is not None and settings.address is None and not _begun:
        from fl_ray.runtime.connection import Connection

        _begun.append(Connection(settings))


def open_runtime(config: RunConfig, progress: Progress | None = None, ahead: bool = True) -> Runtime:
    """The backend that ``runtime.backend`` names; a context manager, used by one run after another.

    Args:
        ahead: Ray is started in the background, with the clients' actors for this run: errors on the way come from
            ``Runtime.open``. Otherwise Ray answers when this returns, and actors are started by ``Runtime.open``.
    """
    if config.runtime.backend == "in_process":
        from fl_ray.runtime.in_process import InProcessRuntime

        return InProcessRuntime()
    connection = _begun.pop() if _begun else None
    if connection is not None and connection.config != config.ray:  # begun for a recipe that was refused
        connection.close()
        connection = None
    tell = progress.message if progress is not None else None
    if tell is not None:
        tell("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    if config.ray.address is not None:
        from fl_ray.runtime.connection import Connection

        connection = Connection(config.ray)
        connection.wait()
    from fl_ray.runtime.ray_backend import RayRuntime
    from fl_ray.runtime.spare import spare

    # Whoever asked imports torch and MLflow now, in this thread: two threads within a package's circular imports fail.
    return RayRuntime(config.runtime, config.ray, tell, config if ahead else None, connection, spare(config))


class OpenRuntimes:
    """The backend of one run after another: kept while the next run's settings ask for the same."""

    def __init__(self, progress: Progress | None = None) -> None:
        self._progress = progress
        self._key, self._open = "", None

    def of(self, config: RunConfig) -> Runtime:
        """The backend that the run's settings ask for."""
        from fl_ray.runtime.spare import spare

        key = repr((config.runtime, config.ray))
        if self._open is None or key != self._key:
            self.close()
            self._key, self._open = key, open_runtime(config, self._progress)
        self._open.leave(spare(config))
        return self._open

    def close(self) -> None:
        """Close what is open."""
        if self._open is not None:
            self._open.close()
        self._open = None
