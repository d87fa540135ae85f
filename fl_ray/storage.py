"""Storage at fsspec addresses (file, s3, gs, memory, ...), and outputs there: a folder here that is mirrored."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fl_ray.errors import FlRayError, OutputError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

__all__ = ["Mirror", "as_output_error", "file_system", "is_address", "is_temporary", "opened_output"]

_EVERY_S = 20.0
_PREFIX = "fl-ray-output-"


def is_address(output: str) -> bool:
    """Whether an output is an address as ``s3://bucket/run``, not a folder."""
    return "://" in output


def is_temporary(folder: Path) -> bool:
    """Whether ``opened_output`` has made the folder for an address."""
    return folder.parent.name.startswith(_PREFIX)


@contextlib.contextmanager
def as_output_error(setting: str, way_out: str | None = None) -> Iterator[None]:
    """What a storage's client raises, as an OutputError that names the setting and its value."""
    try:
        yield
    except FlRayError:
        raise
    except Exception as error:  # botocore's, aiohttp's and MLflow's errors have no root in common
        told = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(f"{setting}: {told}" + (f"; {way_out}" if way_out else "")) from error


def file_system(address: str, setting: str) -> tuple[AbstractFileSystem, str]:
    """What an address lies on, and the path there.

    Raises:
        OutputError: the protocol is unknown or not installed.
    """
    with as_output_error(f"{setting} {address}"):
        import fsspec

        return fsspec.core.url_to_fs(address)


class Mirror:
    """A folder here, and its copy at an address: what is written or taken away here is copied or taken away there.

    Files of fl_ray are replaced whole or grow by lines, so a copy that is taken in between is one that a run can go on
    from, as after a crash.

    Raises:
        OutputError: nothing there can be reached, or the protocol is unknown or not installed.
    """

    def __init__(self, address: str, folder: Path) -> None:
        self.folder = folder
        self._there, self._root = file_system(address, "--output")
        with as_output_error(f"--output {address}"):
            self._there.exists(self._root)
        self._copied: dict[str, tuple[int, int]] = {}

    def pull(self) -> None:
        """Bring what is there here."""
        found = self._there.find(self._root) if self._there.exists(self._root) else []
        for remote in found:
            name = remote[len(self._root) :].lstrip("/")
            local = self.folder / name
            local.parent.mkdir(parents=True, exist_ok=True)
            self._there.get_file(remote, str(local))
            self._copied[name] = _state(local)

    def push(self) -> int:
        """Copy what has changed, and take away what is gone; how many files were copied."""
        here: dict[str, tuple[int, int]] = {}
        for path in sorted(self.folder.rglob("*")):
            if path.is_file() and not path.name.endswith((".draft", ".lock")):
                with contextlib.suppress(FileNotFoundError):  # replaced or removed at this moment
                    here[path.relative_to(self.folder).as_posix()] = _state(path)
        changed = [name for name, state in here.items() if self._copied.get(name) != state]
        for name in changed:
            with contextlib.suppress(FileNotFoundError):
                remote = f"{self._root}/{name}"
                self._there.makedirs(remote.rsplit("/", 1)[0], exist_ok=True)
                self._there.put_file(str(self.folder / name), remote)
                self._copied[name] = here[name]
        for name in set(self._copied) - set(here):
            with contextlib.suppress(FileNotFoundError):
                self._there.rm_file(f"{self._root}/{name}")
            del self._copied[name]
        return len(changed)


def _state(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


@contextlib.contextmanager
def opened_output(output: str | Path) -> Iterator[Path]:
    """The folder to write into: ``output`` itself, or, of an address, one here that is mirrored there.

    What is there already is brought here first, so that a run goes on on another machine; changes are copied every
    twenty seconds, and at the end.

    Raises:
        OutputError: the last copy could not be made; the folder here stays, and is named.
    """
    if not is_address(str(output)):
        yield Path(output)
        return
    address = str(output).rstrip("/")
    temporary = Path(tempfile.mkdtemp(prefix=_PREFIX))
    folder = temporary / "output"
    folder.mkdir()
    mirror = Mirror(address, folder)
    mirror.pull()
    ended = threading.Event()

    def work() -> None:
        while not ended.wait(_EVERY_S):
            # Storage may be away for a while; the last copy is made below.
            with contextlib.suppress(OutputError), as_output_error(f"--output {address}"):
                mirror.push()

    copying = threading.Thread(target=work, name="mirror", daemon=True)
    copying.start()
    try:
        yield folder
    finally:
        ended.set()
        copying.join()
        with as_output_error(f"--output {address}", f"what was written is kept in {folder}"):
            mirror.push()
        shutil.rmtree(temporary)
