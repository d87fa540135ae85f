"""Label statistics of a partition: counts, entropy, distance to the global distribution."""

from __future__ import annotations

import numpy as np

from fl_ray.data.rows import Rows

__all__ = ["emd", "label_counts", "label_entropy"]


def label_counts(rows: Rows, clients: np.ndarray, labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Samples of each class at each of the given clients, int64 [clients, classes]."""
    counts = np.zeros((len(clients), num_classes), dtype=np.int64)
    for place, client in enumerate(clients):
        counts[place] = np.bincount(labels[rows.of(int(client))], minlength=num_classes)
    return counts


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / np.maximum(counts.sum(axis=-1, keepdims=True), 1)


def label_entropy(counts: np.ndarray) -> np.ndarray:
    """Entropy in bits of each client's label distribution; [clients]. 0: one class, log2(classes): even."""
    shares = _shares(counts)
    return 0.0 - np.sum(np.where(shares > 0, shares * np.log2(np.where(shares > 0, shares, 1)), 0), axis=-1)


def emd(counts: np.ndarray, overall: np.ndarray | None = None) -> np.ndarray:
    """Distance sum_c |p_n(c) - p_g(c)| of each client's label distribution to the global one, in [0, 2]; [clients].

    Args:
        counts: [clients, classes].
        overall: of all clients together, [classes]; default: the sum of ``counts``.

    The "earth mover's distance" of arXiv 1806.00582, eq. 3; ``methods.md`` section 2 weighs GenFL's kappa by it.
    """
    return np.abs(_shares(counts) - _shares(counts.sum(axis=0) if overall is None else overall)).sum(axis=-1)
