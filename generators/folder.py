"""Images made earlier, by whatever made them, from a folder for each class."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from generators.base import TrainingImages
from generators.stored import StoredGenerator, store_images

__all__ = ["FolderGenerator"]

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp"}
_MODES = {1: "L", 3: "RGB"}  # Pillow's, by channels


class FolderGenerator(StoredGenerator):
    """``root``/<class name>/*.png (or jpg, webp): image i of a class is its file i in the order of the names.

    Class names are the data set's, in upper or lower case. Images are resized to the data's (bilinear, antialiased) and
    converted to its channels, and kept with the weights: other nodes need no ``root``.

    Args:
        root: folder of the class folders.
        block_size: images read together.
    """

    learns_from = "none"

    def __init__(self, root: str, block_size: int = 100) -> None:
        super().__init__(block_size)
        self.root = Path(root).expanduser()
        if not self.root.is_dir():
            raise ValueError(f"root is {root}, but there is no such folder; it holds a folder of images for each class")
        self.more_from = f"add files to its folder in {root}"

    def training_settings(self) -> dict[str, Any]:
        return {"kind": "folder", "files": self._digest}

    def content(self) -> dict[str, str]:
        return {"root": self._digest}

    def fit(self, data: TrainingImages, folder: Path, progress: Callable[[int, int, float], None]) -> None:
        found, shape = self._of(data), data.images.shape[1:]
        if shape[0] not in _MODES:
            raise ValueError(f"the data's images have {shape[0]} channels, but files give 1 or 3")
        classes = ((self._read(file, shape) for file in files) for files in found)
        store_images(folder, classes, self.available(data), shape)

    def available(self, data: TrainingImages) -> np.ndarray:
        return np.array([len(files) for files in self._of(data)])

    def order(self, seed: int, label: int, count: int) -> np.ndarray:
        return np.arange(count)

    @cached_property
    def _files(self) -> dict[str, list[Path]]:
        """The image files of each class folder, by its name in lower case; looked at once, as is their digest."""
        found: dict[str, list[Path]] = {}
        for entry in sorted(self.root.iterdir()):
            if entry.is_dir():
                name = entry.name.lower()
                if name in found:
                    raise ValueError(
                        f"root {self.root} holds two folders {entry.name} in upper and lower case; rename one"
                    )
                found[name] = sorted(file for file in entry.iterdir() if file.suffix.lower() in _SUFFIXES)
        return found

    @cached_property
    def _contents(self) -> dict[Path, bytes]:
        """A hash of each file's content."""
        return {file: _content(file)[1] for files in self._files.values() for file in files}

    @cached_property
    def _digest(self) -> str:
        """Of the names and contents of all files."""
        made = hashlib.sha256()
        for name, files in sorted(self._files.items()):
            for file in files:
                made.update(f"{name}/{file.name}:".encode() + self._contents[file])
        return made.hexdigest()

    def _read(self, file: Path, shape: tuple[int, ...]) -> np.ndarray:
        """One image, uint8 ``shape`` ([C, H, W]), of the content that the digest is of."""
        content, found = _content(file)
        if found != self._contents[file]:
            raise ValueError(f"{file} has changed since the files of root were hashed; run again")
        channels, height, width = shape
        with _reading(file), Image.open(io.BytesIO(content)) as image:
            made = image.convert(_MODES[channels]).resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(made).reshape(height, width, channels).transpose(2, 0, 1)

    def _of(self, data: TrainingImages) -> list[list[Path]]:
        """The files of each class of the data."""
        missing = [name for name in data.classes if not self._files.get(name.lower())]
        if missing:
            raise ValueError(
                f"root {self.root} holds no images (png, jpg or webp) of class {', '.join(missing)}; the folders are "
                f"named as the data's classes: {', '.join(data.classes)}"
            )
        return [self._files[name.lower()] for name in data.classes]


def _content(file: Path) -> tuple[bytes, bytes]:
    """A file's content, and a hash of it."""
    with _reading(file):
        content = file.read_bytes()
    return content, hashlib.sha256(content).digest()


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError) as error:  # Pillow raises either, by what is wrong in the file
        raise ValueError(f"{file} can't be read as an image ({error}); repair or remove it") from error
