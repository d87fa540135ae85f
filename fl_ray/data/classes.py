"""A data set with some of its classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from fl_ray.data.datasets import ImageData
from fl_ray.errors import SettingError

__all__ = ["keep_classes"]


def keep_classes(data: ImageData, classes: list[int] | int) -> ImageData:
    """The images of some classes, in the training and the test part, with labels 0, 1, ... in the order given.

    Args:
        classes: labels to keep, or how many: then the first ones.

    Raises:
        SettingError: a label that the data set does not have.
    """
    kept, known = list(range(classes)) if isinstance(classes, int) else classes, len(data.classes)
    if max(kept) >= known:
        raise SettingError(f"data.classes is {classes}, but the data set has {known} classes, 0 to {known - 1}")
    new_label = np.full(known, -1, dtype=np.int64)
    new_label[kept] = np.arange(len(kept))

    def part(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = np.flatnonzero(new_label[labels] >= 0)
        return images[rows], new_label[labels[rows]], rows

    images, labels, rows = part(data.images, data.labels)
    changes = {"images": images, "labels": labels, "classes": [data.classes[label] for label in kept]}
    changes |= {name: getattr(data, name)[rows] for name in ("domains", "owners") if getattr(data, name) is not None}
    if data.test_images is not None:
        changes["test_images"], changes["test_labels"], rows = part(data.test_images, data.test_labels)
        if data.test_domains is not None:
            changes["test_domains"] = data.test_domains[rows]
    return replace(data, **changes)
