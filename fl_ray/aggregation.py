"""Sums of clients' updates that are the same to the bit in any order and grouping."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # imported where it is used: a driver merges sums without it
    import torch

__all__ = ["ExactSum", "combine"]

_BITS = 42
_LIMIT = 2.0**20
_SHIFT = 1.5 * 2.0**52
_SHIFT_BITS = int(np.float64(_SHIFT).view(np.int64))
_CHUNK = 2**16  # entries that are worked on while they are in the processor's cache


class ExactSum:
    """Order-independent sum of ``share * update`` in fixed point: int64 with a quantum of 2^-42.

    Integer addition is associative, so the sum does not depend on order or on how clients are spread over actors. The
    shares of a round add up to at most 1, so with entries below 2^20 (larger ones count as diverged, see ``fits``) the
    sum can't overflow. Each addition rounds to the quantum: an absolute error of at most 1.2e-13 a client and entry.
    """

    def __init__(self, size: int) -> None:
        self._total = np.zeros(size, dtype=np.int64)
        self._shifts = 0  # how often _SHIFT_BITS is in every entry, see _add_small

    @property
    def total(self) -> np.ndarray:
        """The sum in quanta, int64 [size]."""
        if self._shifts:
            self._total -= np.int64(_wrapped(self._shifts * _SHIFT_BITS))
            self._shifts = 0
        return self._total

    @staticmethod
    def fits(updates: torch.Tensor) -> torch.Tensor:
        """Which updates [updates, size] have entries that are all finite and below 2^20 in size; bool [updates]."""
        return _largest(updates) < _LIMIT

    def add(self, updates: torch.Tensor, shares: Sequence[float]) -> None:
        """Add the sum of ``share * update``; float32 [updates, size] that ``fits``, each share in [0, 1]."""
        import torch

        for update, share, largest in zip(updates, shares, _largest(updates).tolist(), strict=True):
            factor = share * 2.0**_BITS
            if largest * factor < 2.0**51:
                self._add_small(update.numpy(), factor)
            else:
                self._total += update.double().mul_(factor).round_().to(torch.int64).numpy()

    def _add_small(self, update: np.ndarray, factor: float) -> None:
        """Products below 2^51: adding 1.5 * 2^52 rounds to an integer (half to even), which then is in the low bits.

        So the conversion, for which processors have no vector instruction, is left out. The bits of the shift itself
        are taken off at the end; int64 wraps around meanwhile, which does no harm.
        """
        exact = np.empty(min(_CHUNK, len(update)))
        for start in range(0, len(update), _CHUNK):
            values = update[start : start + _CHUNK]
            shifted = exact[: len(values)]
            shifted[:] = values
            shifted *= factor
            shifted += _SHIFT
            self._total[start : start + _CHUNK] += shifted.view(np.int64)
        self._shifts += 1

    def merge(self, total: np.ndarray) -> None:
        """Add another sum's ``total``."""
        self._total += total

    def value(self) -> np.ndarray:
        """The sum, float64 [size]."""
        return self.total * 2.0**-_BITS


def _largest(updates: torch.Tensor) -> torch.Tensor:
    """The largest size of an entry in each update [updates, size]; NaN where one is NaN."""
    import torch

    if updates.shape[1] == 0:
        return torch.zeros(len(updates))
    ends = [torch.stack(torch.aminmax(update)) for update in updates]  # NaN passes through both
    return torch.stack(ends).abs().amax(dim=1)


def _wrapped(value: int) -> int:
    """An integer as int64 has it after wrapping around."""
    return (value + 2**63) % 2**64 - 2**63


def combine(parts: list[tuple[float, np.ndarray]]) -> np.ndarray:
    """Weighted sum of flat weights, in float64 and in the order given, rounded once to float32."""
    total = np.zeros_like(parts[0][1], dtype=np.float64)
    for weight, values in parts:
        total += weight * values.astype(np.float64)
    return total.astype(np.float32)
