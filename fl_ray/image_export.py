"""Generated images as files: a PNG each, and a manifest that says how to make every one of them again."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

from fl_ray.synthesis import Synthesis

__all__ = ["MANIFEST_COLUMNS", "export_images"]

MANIFEST_COLUMNS = ("file", "class", "index", "seed", "generator_key", "weights", "sampling_key", "prompt", "sha256")


def export_images(synthesis: Synthesis, per_class: int, seed: int, folder: Path) -> int:
    """Write the first ``per_class`` images of every class as ``folder``/<class>/<index>.png; how many.

    ``manifest.csv`` has a row for each, in the order in which they are there (not by index, where a pool makes them),
    with a SHA-256 of the file; ``provenance.json`` says what the keys stand for, where there are any images. Memory
    does not grow with their number.
    """
    classes, written = synthesis.data.source.classes, 0
    counts = np.full(len(classes), per_class)
    with (folder / "manifest.csv").open("w", newline="", encoding="utf-8") as stream:
        manifest = csv.writer(stream)
        manifest.writerow(MANIFEST_COLUMNS)
        for block, images in synthesis.stream(counts, seed):
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
    if written:
        content = json.dumps(synthesis.provenance(), indent=2) + "\n"
        (folder / "provenance.json").write_text(content, encoding="utf-8")
    return written


def _folder_name(class_name: str) -> str:
    """A class's name, but for what no folder may be called; different for different names."""
    name = class_name.replace("%", "%25").replace("/", "%2F")
    return f"%2E{name[1:]}" if name.startswith(".") else name


def _png(image: np.ndarray) -> bytes:
    made = io.BytesIO()
    Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(made, "PNG")
    return made.getvalue()
