"""Kappa2 of a round, the weight of GenFL's augmented model; kappa1 = 1 - kappa2 weighs the clients' average.

How kappa should adapt is an open question of GenFL's paper (arXiv 2503.20166); these policies are our reconstruction.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["KappaPolicy", "kappa_by_accuracy", "kappa_by_decay", "kappa_by_emd", "kappa_by_loss"]

KappaPolicy = Literal["static", "emd", "heldout_accuracy", "heldout_loss", "decay"]


def kappa_by_emd(shares: np.ndarray, distances: np.ndarray, most: float) -> float:
    """min(most, 1/2 sum_n rho_n EMD_n): 0 (FedAvg) where all clients have the global label distribution. Of noisy
    counts the distances, and with them kappa2, come out too large: noise makes alike clients differ.

    Args:
        shares: rho_n of the round's clients, which add up to 1.
        distances: their EMD_n, in [0, 2].
    """
    return min(most, 0.5 * float(shares @ distances))


def kappa_by_accuracy(clients: float, augmented: float) -> float:
    """a_a / (a_a + a_c) of the accuracies of the clients' average and of the augmented model; 1/2 where both are 0."""
    return augmented / (augmented + clients) if augmented + clients > 0 else 0.5


def kappa_by_loss(clients: float, augmented: float) -> float:
    """exp(-l_a) / (exp(-l_a) + exp(-l_c)) of their mean cross-entropies: softmax of the negative losses."""
    return 0.5 * (1 + float(np.tanh((clients - augmented) / 2)))  # the same, without overflow


def kappa_by_decay(first: float, factor: float, floor: float, round_number: int) -> float:
    """max(floor, first * factor^t), with t counted from 0."""
    return max(floor, first * factor**round_number)
