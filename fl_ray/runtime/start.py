"""Opening a backend, early: what takes long goes on in the background."""

from __future__ import annotations

import importlib
import threading

from fl_ray.config import RunConfig
from fl_ray.progress import Progress
from fl_ray.runtime.base import Runtime

__all__ = ["open_runtime"]

_HEAVY = ("torch", "pytorch_lightning", "mlflow")


def open_runtime(config: RunConfig, progress: Progress | None = None) -> Runtime:
    """The backend that ``runtime.backend`` names; a context manager, used by one run after another.

    Ray is started in the background, with the actors for this run: errors on the way come from ``Runtime.open``.
    """
    if config.runtime.backend == "in_process":
        from fl_ray.runtime.in_process import InProcessRuntime

        return InProcessRuntime()
    # The driver's heavy imports, beside Ray's start and before the actors' own.
    threading.Thread(target=lambda: [importlib.import_module(name) for name in _HEAVY], daemon=True).start()
    from fl_ray.runtime.ray_backend import RayRuntime

    tell = progress.message if progress is not None else None
    if tell is not None:
        tell("starting Ray" if config.ray.address is None else f"joining Ray at {config.ray.address}")
    return RayRuntime(config.runtime, config.ray, tell, config)
