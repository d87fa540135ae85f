"""What a store of trained models is: folders by kind and key, that are visible whole and come back as they were.

The files go there first, then a manifest with each one's SHA-256. Only safetensors and JSON are shared, so nothing that
comes from there is unpickled; whoever can write to a store still decides what weights its readers use.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from fl_ray.errors import OutputError
from fl_ray.run_folder import environment
from fl_ray.storage import as_output_error

__all__ = ["KINDS", "MANIFEST", "ModelStore", "NotAsPublishedError", "Published"]

KINDS = ("generators", "client_models")
MANIFEST = "manifest.json"
FORMAT = 1  # of the manifest
_SHARED = (".safetensors", ".json")


class NotAsPublishedError(Exception):
    """What is in a store can't be what was published."""


class Published(ABC):
    """One folder in a store."""

    @abstractmethod
    def manifest(self) -> bytes:
        """Its manifest file."""

    @abstractmethod
    def get(self, name: str, sha256: str, to: Path) -> None:
        """Copy one of its files here.

        Raises:
            NotAsPublishedError: it is not there.
        """


class ModelStore(ABC):
    """Trained models by kind (KINDS) and key.

    Args:
        address: ``model_store`` of the recipe.
        tell: is told what is brought, published or damaged.
    """

    def __init__(self, address: str, tell: Callable[[str], None]) -> None:
        self.address, self._tell = address, tell

    @abstractmethod
    def reach(self) -> None:
        """See that it answers and can be written.

        Raises:
            OutputError: it does not.
        """

    @abstractmethod
    def _has(self, kind: str, key: str) -> bool:
        """Whether anything is published under the key."""

    @abstractmethod
    def _published(self, kind: str, key: str) -> Iterator[Published]:
        """What is, the newest first."""

    @abstractmethod
    def _put(self, kind: str, key: str, folder: Path, files: Mapping[str, str], manifest: bytes) -> None:
        """Copy the ``files`` (SHA-256 by name) of ``folder`` there, then the manifest."""

    def bring(self, kind: str, key: str, folder: Path) -> bool:
        """Put what is published under the key into ``folder``, in place of what is there; whether there is any.

        Files that are not as they were published are told, and so is a store that does not answer: the run then trains
        by itself.
        """
        draft = folder.with_name(f"{folder.name}.brought")
        try:
            with as_output_error(f"model_store {self.address}"):
                for published in self._published(kind, key):
                    try:
                        _take(published, kind, key, draft)
                    except NotAsPublishedError as error:
                        self._tell(f"{kind}/{key} in {self.address} is not as it was published: {error}")
                        continue
                    shutil.rmtree(folder, ignore_errors=True)
                    draft.rename(folder)
                    self._tell(f"{kind}/{key} is brought from {self.address}")
                    return True
        except OutputError as error:
            self._tell(f"{error}; what may be there is trained here")
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return False

    def publish(self, kind: str, key: str, folder: Path, again: bool) -> None:
        """Publish a folder under its key.

        Args:
            again: also where something is published under the key (which then is damaged, or came there meanwhile).

        Raises:
            OutputError: the store does not answer, or can't be written.
        """
        found = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))  # no drafts
        names = sorted(path.relative_to(folder).as_posix() for path in found)
        others = [name for name in names if not name.endswith(_SHARED)]
        if others:
            self._tell(f"{kind}/{key} is not published: it holds {others[0]}, and only safetensors and JSON are shared")
            return
        if not any(name.endswith(".safetensors") for name in names):
            return  # nothing was trained
        with as_output_error(f"model_store {self.address}"):
            if not again and self._has(kind, key):
                return
            files = {name: _sha256(folder / name) for name in names}
            content = {"format": FORMAT, "kind": kind, "key": key, "files": files, "made_by": environment()}
            self._put(kind, key, folder, files, json.dumps(content, indent=2).encode())
        self._tell(f"{kind}/{key} is published in {self.address}")


def _take(published: Published, kind: str, key: str, draft: Path) -> None:
    """Copy a published folder here, each file checked."""
    files = _files(published.manifest(), kind, key)
    shutil.rmtree(draft, ignore_errors=True)
    for name, sha256 in files.items():
        path = draft / name
        path.parent.mkdir(parents=True, exist_ok=True)
        published.get(name, sha256, path)
        if _sha256(path) != sha256:
            raise NotAsPublishedError(f"{name} has another SHA-256")


def _files(manifest: bytes, kind: str, key: str) -> dict[str, str]:
    """SHA-256 by name of a manifest's files."""
    try:
        content = json.loads(manifest)
    except ValueError as error:
        raise NotAsPublishedError("its manifest is no JSON") from error
    wanted = {"format": FORMAT, "kind": kind, "key": key}
    files: Any = content.get("files") if isinstance(content, dict) and wanted.items() <= content.items() else None
    if not isinstance(files, dict) or not files:
        raise NotAsPublishedError("its manifest is another's")
    for name, sha256 in files.items():
        path = PurePosixPath(name)
        outside = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
        if outside or not name.endswith(_SHARED):
            raise NotAsPublishedError(f"its manifest names {name!r}, which is no file of a model")
        if not (isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256)):
            raise NotAsPublishedError(f"its manifest has no SHA-256 of {name}")
    return files


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
