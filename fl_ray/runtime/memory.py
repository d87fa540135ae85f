"""Memory of a process."""

from __future__ import annotations

import ctypes
import platform
import resource

__all__ = ["keep_freed_memory", "peak_memory_mb"]

# Parameters of glibc's mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def peak_memory_mb() -> float:
    """The largest resident size that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB for the next allocation, instead of giving them back.

    Each training step frees and allocates the same activations and gradients; given back, their pages are faulted in
    and zeroed anew every time. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 16 * 2**20)
