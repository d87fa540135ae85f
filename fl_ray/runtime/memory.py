"""Memory of a process."""

from __future__ import annotations

import resource

__all__ = ["peak_memory_mb"]


def peak_memory_mb() -> float:
    """The largest resident size that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
