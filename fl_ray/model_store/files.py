"""A store of trained models at an fsspec address: ADDRESS/KIND/KEY/ has files named by their hashes, and a manifest."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fl_ray.model_store.base import MANIFEST, ModelStore, NotAsPublishedError, Published
from fl_ray.storage import as_output_error, file_system

__all__ = ["FileStore"]


class FileStore(ModelStore):
    """See ``ModelStore``.

    Of two that publish at once, the last manifest counts; it names files of its own, unless both have the same.
    """

    def __init__(self, address: str, tell: Callable[[str], None]) -> None:
        super().__init__(address, tell)
        self._there, self._root = file_system(address, "model_store")

    def reach(self) -> None:
        probe = f"{self._root}/.probe-{uuid.uuid4().hex[:8]}"
        with as_output_error(f"model_store {self.address}", "name an address that can be written, or leave it out"):
            self._there.makedirs(self._root, exist_ok=True)
            self._there.pipe_file(probe, b"")
            self._there.rm_file(probe)

    def _home(self, kind: str, key: str) -> str:
        return f"{self._root}/{kind}/{key}"

    def _has(self, kind: str, key: str) -> bool:
        self._there.invalidate_cache()  # of listings, which others may have outdated
        return self._there.exists(f"{self._home(kind, key)}/{MANIFEST}")

    def _published(self, kind: str, key: str) -> Iterator[Published]:
        if self._has(kind, key):
            yield _Folder(self._there, self._home(kind, key))

    def _put(self, kind: str, key: str, folder: Path, files: Mapping[str, str], manifest: bytes) -> None:
        home = self._home(kind, key)
        self._there.makedirs(home, exist_ok=True)
        for name, sha256 in files.items():
            with self._whole(f"{home}/{sha256}") as draft:
                self._there.put_file(str(folder / name), draft)
        with self._whole(f"{home}/{MANIFEST}") as draft:
            self._there.pipe_file(draft, manifest)

    @contextmanager
    def _whole(self, path: str) -> Iterator[str]:
        """A path to write to, which then takes the place of ``path``: not all file systems write files whole."""
        draft = f"{path}.{uuid.uuid4().hex[:8]}"
        yield draft
        self._there.mv(draft, path)


@dataclass(frozen=True)
class _Folder(Published):
    there: Any
    home: str

    def manifest(self) -> bytes:
        return self.there.cat_file(f"{self.home}/{MANIFEST}")

    def get(self, name: str, sha256: str, to: Path) -> None:
        try:
            self.there.get_file(f"{self.home}/{sha256}", str(to))
        except FileNotFoundError as error:
            raise NotAsPublishedError(f"{name} is missing") from error
