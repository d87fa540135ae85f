"""Generated images as files: a PNG each, and a manifest that says how to make every one of them again."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fl_ray.errors import OutputError
from fl_ray.run_folder import filled_folder, write_json
from fl_ray.synthesis import Synthesis

__all__ = ["MANIFEST_COLUMNS", "export_images"]

MANIFEST_COLUMNS = ("file", "class", "index", "seed", "generator_key", "weights", "sampling_key", "prompt", "sha256")
_PROVENANCE = "provenance.json"
_DECIDES = ("generator", "training", "classes", "seed")  # which images these are
_MADE = ("weights_sha256", "sampling")  # the same, known when the generator is trained


def export_images(synthesis: Synthesis, per_class: int, seed: int, folder: Path) -> int:
    """Write the first ``per_class`` images of every class as ``folder``/<class>/<index>.png; how many.

    ``provenance.json`` says what is made, from the first image on; ``manifest.csv``, which is there when all are, has a
    row for each, in the order in which they were made (not by index, where a pool does it), with a SHA-256 of the file.
    Memory does not grow with their number.

    Args:
        folder: a new one, or one with fewer of the same images: what an interrupted call has left, or a smaller number.

    Raises:
        OutputError: there is something else in it, or it can't be written.
        SettingError: the generator has not so many.
    """
    synthesis.check_counts(np.full(synthesis.data.num_classes, per_class))
    if not (folder / _PROVENANCE).exists():
        with filled_folder(folder):
            return _write(synthesis, per_class, seed, folder)
    before = json.loads((folder / _PROVENANCE).read_text(encoding="utf-8"))
    _check_same(before, {**synthesis.trained.manifest, "seed": seed}, _DECIDES, folder)
    if before["per_class"] > per_class:
        raise OutputError(
            f"--output {folder}: it was begun with {before['per_class']} images of each class, more than --per_class "
            f"{per_class}; name another folder"
        )
    _check_same(before, synthesis.provenance(), _MADE, folder)
    return _write(synthesis, per_class, seed, folder)


def _check_same(before: dict[str, Any], now: dict[str, Any], names: tuple[str, ...], folder: Path) -> None:
    now = json.loads(json.dumps(now))
    other = [name for name in names if before.get(name) != now[name]]
    if other:
        raise OutputError(
            f"--output {folder}: it holds other images (another {', '.join(other)}, see its {_PROVENANCE}); "
            "name another folder"
        )


def _write(synthesis: Synthesis, per_class: int, seed: int, folder: Path) -> int:
    classes, written = synthesis.data.source.classes, 0
    stream = synthesis.stream(np.full(len(classes), per_class), seed)
    # Before anything is written: what is refused leaves nothing behind, and no images are nothing to train a generator
    # for.
    first = list(itertools.islice(stream, 1))
    if first:
        (folder / "manifest.csv").unlink(missing_ok=True)  # of fewer images
        write_json(folder / _PROVENANCE, {**synthesis.provenance(), "seed": seed, "per_class": per_class})
    draft = folder / ".manifest.csv.draft"
    with draft.open("w", newline="", encoding="utf-8") as table:
        manifest = csv.writer(table)
        manifest.writerow(MANIFEST_COLUMNS)
        for block, images in itertools.chain(first, stream):
            keys = synthesis.trained.key, synthesis.trained.weights, synthesis.sampling_key
            name = _folder_name(classes[block.label])
            (folder / name).mkdir(exist_ok=True)
            for index, image in enumerate(images, block.number * synthesis.generator.block_size):
                file, content = f"{name}/{index:06d}.png", _png(image)
                (folder / file).write_bytes(content)
                prompt = synthesis.prompt(block.label, index)
                made = hashlib.sha256(content).hexdigest()
                manifest.writerow((file, classes[block.label], index, seed, *keys, prompt, made))
            written += len(images)
    draft.replace(folder / "manifest.csv")
    return written


def _folder_name(class_name: str) -> str:
    """A class's name, but for what no folder may be called; different for different names."""
    name = class_name.replace("%", "%25").replace("/", "%2F")
    return f"%2E{name[1:]}" if name.startswith(".") else name


def _png(image: np.ndarray) -> bytes:
    made = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(made, "PNG")
    return made.getvalue()
