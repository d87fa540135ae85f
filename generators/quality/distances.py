"""Euclidean distances between rows, in pieces that fit into memory."""

from __future__ import annotations

import numpy as np

__all__ = ["nearest", "squared_distances"]

_ELEMENTS = 2**24  # float64 numbers of one piece: 128 MiB


def squared_distances(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances of [N, D] and [M, D], float64 [N, M]."""
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    squares = (first**2).sum(axis=1)[:, None] + (second**2).sum(axis=1)[None, :]
    return np.maximum(squares - 2 * first @ second.T, 0.0)


def nearest(images: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Squared distance of each row of [N, ...] to the nearest of [M, ...], float64 [N]; exact for uint8 images."""
    first, second = images.reshape(len(images), -1), among.reshape(len(among), -1)
    rows = max(1, _ELEMENTS // first.shape[1])
    found = np.full(len(first), np.inf)
    for start in range(0, len(first), rows):
        piece = slice(start, start + rows)
        for other in range(0, len(second), rows):
            distances = squared_distances(first[piece], second[other : other + rows])
            found[piece] = np.minimum(found[piece], distances.min(axis=1))
    return found
