"""Connecting to Ray: a cluster that runs, or one started here. Needs neither torch nor Lightning."""

from __future__ import annotations

import os
import socket
import threading
from typing import Any

import ray

from fl_ray.config import RayConfig
from fl_ray.errors import PlacementError
from fl_ray.runtime.memory import reuse_aligned_memory

__all__ = ["Connection", "connect"]


class Connection:
    """Connects in a thread of its own, which stays: Linux ends Ray's processes with the thread that started them."""

    def __init__(self, config: RayConfig) -> None:
        self.config = config
        self._owns, self._failure = False, None
        self._ready, self._closing = threading.Event(), threading.Event()
        threading.Thread(target=self._work, name="Ray", daemon=True).start()

    def _work(self) -> None:
        try:
            self._owns = connect(self.config)
        except BaseException as error:  # noqa: BLE001 - handed to whoever waits
            self._failure = error
        self._ready.set()
        if self._owns:
            self._closing.wait()

    def wait(self) -> None:
        """Until Ray answers.

        Raises:
            PlacementError: what stood in the way.
        """
        self._ready.wait()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """End a Ray that was started here; leave any other."""
        self._ready.wait()
        if self._owns and ray.is_initialized():
            ray.shutdown()
        self._closing.set()


def connect(config: RayConfig) -> bool:
    """Start Ray here, or join the cluster at ``config.address``; whether it was this call that did.

    Raises:
        PlacementError: no cluster answers at the address.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray would run its workers at niceness 15: any other program would take the machine from the clients' training.
    os.environ.setdefault("RAY_worker_niceness", "0")
    common: dict[str, Any] = {"logging_level": "ERROR", "log_to_driver": False}
    if config.address is not None:
        try:
            _answers(config.address)
            ray.init(address=config.address, **common)
        except (OSError, ValueError, RuntimeError, ray.exceptions.RayError) as error:
            raise PlacementError(
                f"ray.address is {config.address}, but no Ray cluster answers there ({error}); start one with "
                "`ray start --head`, put its token into ~/.ray/auth_token (or RAY_AUTH_TOKEN; "
                "RAY_AUTH_MODE=disabled for a cluster without), or leave ray.address out to start Ray here"
            ) from error
    else:
        with reuse_aligned_memory():
            ray.init(
                address="local",  # without it Ray joins whatever cluster was last started on this machine
                num_cpus=config.num_cpus or os.cpu_count(),
                resources={"bandwidth": config.bandwidth},
                include_dashboard=False,
                **common,
            )
    return True


def _answers(address: str) -> None:
    """Fail at once where nobody listens; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=5).close()
