"""Trained generators and generated blocks on disk, by a hash of all that decides them.

A file or folder appears under its name only when it is whole: it is written beside it and renamed.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock

from generators.base import Block

__all__ = ["BlockCache", "stored_folder"]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")


def stored_folder(folder: Path, write: Callable[[Path], None]) -> bool:
    """Make sure that ``folder`` is there, writing it with ``write`` if it is not; whether it was written now.

    ``write`` is given a draft beside it, which stays where it is interrupted, so that the next call can go on from it.
    Of two processes that ask at once, the second waits for the first.
    """
    if folder.exists():
        return False
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_name(f".{folder.name}.lock")):
        if folder.exists():
            return False
        draft = folder.with_name(f".{folder.name}.part")
        draft.mkdir(exist_ok=True)
        write(draft)
        draft.rename(folder)
    return True


class BlockCache:
    """Generated blocks of one generator with one set of sampling settings; uint8 arrays as .npy files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _path(self, block: Block) -> Path:
        return self.folder / f"seed_{block.seed}" / f"class_{block.label:04d}" / f"block_{block.number:06d}.npy"

    def get(self, block: Block) -> np.ndarray | None:
        """The block's images, or None where they have not been made (or a crash of the machine cut their file)."""
        try:
            return np.load(self._path(block), allow_pickle=False)
        except (FileNotFoundError, EOFError, ValueError):
            return None

    def put(self, block: Block, images: np.ndarray) -> None:
        """Keep a block."""
        path = self._path(block)
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = _beside(path)
        try:
            with draft.open("wb") as stream:
                np.save(stream, images)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
