"""The folder that keeps what was trained, for runs to come."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fl_ray.config import GeneratorConfig
from fl_ray.errors import FlRayError, OutputError

__all__ = ["cache_errors", "cache_root", "make_writable"]


def cache_root(config: GeneratorConfig | None) -> Path:
    """``generator.cache``, else $FL_RAY_CACHE, else ~/.cache/fl_ray."""
    own = config.cache if config is not None else None
    return Path(own or os.environ.get("FL_RAY_CACHE") or "~/.cache/fl_ray").expanduser()


@contextmanager
def cache_errors(config: GeneratorConfig | None) -> Iterator[None]:
    """Name the setting where the cache can't be read or written.

    Raises:
        OutputError: in place of the system's own error.
    """
    try:
        yield
    except FlRayError:
        raise
    except OSError as error:
        raise OutputError(
            f"generator.cache {cache_root(config)}: {error.strerror}; name a folder that can be written, or set "
            "FL_RAY_CACHE"
        ) from error


def make_writable(folder: Path, config: GeneratorConfig | None) -> Path:
    """A folder below the root, made if it is not there.

    Raises:
        OutputError: it can't be written.
    """
    probe = folder / f".writable.{uuid.uuid4().hex[:8]}"  # of this process: others may probe, too
    with cache_errors(config):
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    return folder
