"""Trained generators and generated blocks on disk, by a hash of all that decides them.

A file or folder appears under its name only when it is whole: it is written beside it and renamed. No file is shared by
writers: what is known of a block stands in the block's own file.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from generators.base import Block

__all__ = ["COST_FILE", "TRAINED_FILE", "BlockCache", "Claim", "stored_folder", "weights_hash", "write_whole"]

TRAINED_FILE = "trained.json"  # beside the weights: their hash, and what their training took
COST_FILE = "federated.json"  # beside the weights: what their training has cost the clients


def weights_hash(folder: Path) -> str:
    """SHA-256 of the names and contents of all files below a generator's folder, but for what tells of its training."""
    made = hashlib.sha256()
    about = (TRAINED_FILE, COST_FILE)
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path.name not in about):
        made.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
        with path.open("rb") as stream:
            made.update(hashlib.file_digest(stream, "sha256").digest())
    return made.hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Put a file under its name when it is whole."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{uuid.uuid4().hex[:8]}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


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
        try:
            write(draft)
        finally:
            if not any(draft.iterdir()):  # it has ended before anything that could be gone on from
                draft.rmdir()
        for path in draft.rglob("*"):  # a file that its name promises is on the disk, whatever happens to the power
            if path.is_file():
                with path.open("rb") as stream:
                    os.fsync(stream.fileno())
        draft.rename(folder)
    return True


class Claim:
    """The making of a block, until it is kept or given up."""

    def __init__(self, lock: FileLock) -> None:
        self._lock = lock

    def release(self) -> None:
        """Let others have it. The lock's file goes with it: there may be thousands of blocks."""
        Path(self._lock.lock_file).unlink(missing_ok=True)
        self._lock.release()


class BlockCache:
    """Generated blocks of one generator with one set of sampling settings.

    A safetensors file each. Its header holds what fixes the block (seed, class, first index, count, the hash of the
    weights), the ``versions`` of the libraries that made it, and a SHA-256 of its shape and pixels. ``manifest.json``
    beside them holds what all blocks have in common; it is written once, by whoever is first.

    Args:
        folder: of these blocks.
        block_size: images of a whole block.
        manifest: what decides the images (JSON values), and on what they are made.
        weights: hash of the generator's weights.
        versions: of the libraries, by name.
        tell: is told of files that are damaged.
    """

    def __init__(
        self,
        folder: Path,
        block_size: int,
        manifest: Mapping[str, Any],
        weights: str,
        versions: Mapping[str, str],
        tell: Callable[[str], None],
    ) -> None:
        self.folder, self.block_size = folder, block_size
        self.manifest, self.versions, self._tell = dict(manifest), dict(versions), tell
        self.weights = weights

    def _file(self, block: Block) -> str:
        # No Path: it would intern the names of all blocks that are asked for, and there may be thousands.
        return f"{self.folder}/seed_{block.seed}/class_{block.label:04d}/block_{block.number:06d}.safetensors"

    def _fixed(self, block: Block, images: np.ndarray) -> dict[str, str]:
        pixels = hashlib.sha256(str(images.shape).encode() + images.tobytes()).hexdigest()
        first = block.number * self.block_size
        numbers = {"seed": block.seed, "class": block.label, "first": first, "count": len(images)}
        fixed = {name: str(number) for name, number in numbers.items()}
        return {**fixed, "weights": self.weights, "sha256": pixels}

    def get(self, block: Block) -> np.ndarray | None:
        """The block's images, uint8; None where they have not been made with these weights, or their file is not as it
        was written: then it is taken away.
        """
        path = self._file(block)
        if not os.path.exists(path):  # noqa: PTH110 - as above
            return None
        try:
            with safe_open(path, "numpy") as file:
                header, images = file.metadata() or {}, file.get_tensor("images")
        except FileNotFoundError:  # taken away meanwhile
            return None
        except SafetensorError:
            header, images = {}, np.empty(0, dtype=np.uint8)
        if images.dtype != np.uint8 or not self._fixed(block, images).items() <= header.items():
            others = header.get("weights", self.weights) != self.weights
            what = "was made by weights of another training" if others else "is damaged"
            self._tell(f"{path} {what}, so its images are made again")
            Path(path).unlink(missing_ok=True)
            return None
        return images

    def claim(self, block: Block, wait: bool = False) -> Claim | None:
        """Take the making of a block upon oneself; None where another process has it, unless one waits for that.

        The claim of a process that was killed is free, and what it has left of the block is taken away.
        """
        path = Path(f"{self._file(block)}.lock")
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path, thread_local=False)  # another thread may go on with a stream
        left = path.exists()
        try:
            lock.acquire(blocking=wait)
        except Timeout:
            return None
        for draft in path.parent.glob(f".{path.stem}.*") if left else ():
            draft.unlink(missing_ok=True)
        return Claim(lock)

    def put(self, block: Block, images: np.ndarray) -> None:
        """Keep a block."""
        path = Path(self._file(block))
        path.parent.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "manifest.json").exists():
            content = json.dumps({**self.manifest, "versions": self.versions}, indent=2)
            write_whole(self.folder / "manifest.json", content.encode() + b"\n")
        header = {**self._fixed(block, images), "versions": json.dumps(self.versions, sort_keys=True)}
        write_whole(path, save({"images": np.ascontiguousarray(images)}, header))
