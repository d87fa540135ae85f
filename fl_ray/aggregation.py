"""Sums of clients' updates that are the same to the bit in any order and grouping."""

from __future__ import annotations

import numpy as np
import torch

__all__ = ["ExactSum", "combine"]

_BITS = 42
_LIMIT = 2.0**20


class ExactSum:
    """Order-independent sum of ``share * update`` in fixed point: int64 with a quantum of 2^-42.

    Integer addition is associative, so the sum does not depend on order or on how clients are spread over actors. The
    shares of a round add up to at most 1, so with entries below 2^20 (larger ones count as diverged, see ``fits``) the
    sum can't overflow. Each addition rounds to the quantum: an absolute error of at most 1.2e-13 a client and entry.
    """

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, dtype=torch.int64)

    @staticmethod
    def fits(update: torch.Tensor) -> bool:
        """Whether all entries are finite and below 2^20 in size."""
        if update.numel() == 0:
            return True
        low, high = torch.aminmax(update)  # NaN passes through both, and fails both comparisons
        return bool(low > -_LIMIT) and bool(high < _LIMIT)

    def add(self, update: torch.Tensor, share: float) -> None:
        """Add ``share * update``; float32 [size], 0 <= share <= 1."""
        self.total += update.double().mul_(share * 2.0**_BITS).round_().to(torch.int64)

    def merge(self, total: np.ndarray) -> None:
        """Add another sum's ``total``."""
        mine = self.total.numpy()
        np.add(mine, total, out=mine)

    def value(self) -> np.ndarray:
        """The sum, float64 [size]."""
        return self.total.double().mul_(2.0**-_BITS).numpy()


def combine(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Weighted sum of flat weights, in float64 and in the order given, rounded once to float32."""
    total = np.zeros_like(parts[0][1], dtype=np.float64)
    for weight, values in parts:
        total += weight * values.astype(np.float64)
    return total.astype(np.float32)
