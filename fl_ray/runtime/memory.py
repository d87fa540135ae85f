"""Memory of a process."""

from __future__ import annotations

import ctypes
import os
import platform
import resource
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["keep_freed_memory", "peak_memory_mb", "reuse_aligned_memory"]

# Parameters of glibc's mallopt(3), from malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3


def peak_memory_mb() -> float:
    """The largest resident size that this process has had, MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def keep_freed_memory() -> None:
    """Have glibc keep freed blocks of up to 32 MiB for the next allocation, instead of giving them back.

    Each step of a training or a sampler frees and allocates the same activations (and gradients); given back, their
    pages are faulted in and zeroed anew every time. Elsewhere than on glibc nothing happens.
    """
    if platform.libc_ver()[0] == "glibc":
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        mallopt(_M_TOP_PAD, 16 * 2**20)


@contextmanager
def reuse_aligned_memory() -> Iterator[None]:
    """Processes that are started within have a glibc that uses freed tensors' memory again; belongs to the above.

    Torch aligns its tensors. What glibc cuts off for that goes to a per-thread cache and stays there when the tensor is
    freed, so that the gap is a little too small for the next tensor of the same size, which then takes new pages.
    """
    before = os.environ.get("GLIBC_TUNABLES")
    if before is None:  # a user's own are left as they are
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.tcache_count=0"
    try:
        yield
    finally:
        if before is None:
            del os.environ["GLIBC_TUNABLES"]
