"""How many synthetic images of each class: water-filling, or in proportion to what is missing."""

from __future__ import annotations

from typing import Literal

import numpy as np

__all__ = ["ClassChoice", "apportion", "class_amounts", "water_fill"]

ClassChoice = Literal["deficit", "uniform", "proportional"]


def class_amounts(choice: ClassChoice, counts: np.ndarray, made: np.ndarray, amount: int) -> np.ndarray:
    """How many images of each class come next; int64 [classes] that sum to ``amount``.

    GenFL generates under-represented classes (arXiv 2503.20166); what that comes to is our reconstruction:

    - ``deficit``: the scarcest classes of ``counts`` first, until all are as even as can be (``water_fill``). Images of
      earlier rounds are not counted in: each round's share answers its own cohort, so where the same clients take part
      in every round, each adds the same amounts again, and images of the scarcest classes pile up.
    - ``uniform``: all classes alike, whatever the counts: what is made so far stays as even as can be.
    - ``proportional``: in proportion to max(0, 1/C - p(c)), p = counts / sum: what a class's share lacks of an even
      one. A class at or above 1/C gets nothing; where all are even, all get the same (``apportion``).

    Args:
        counts: int64 [classes], what the round's clients have told of their labels, added up.
        made: int64 [classes], images made in earlier rounds.
        amount: >= 0.
    """
    if choice == "deficit":
        return water_fill(counts, amount)
    if choice == "uniform":
        return water_fill(made, amount)
    return apportion(np.maximum(0, 1 / len(counts) - counts / max(1, int(counts.sum()))), amount)


def water_fill(counts: np.ndarray, amount: int) -> np.ndarray:
    """Integers g >= 0 that sum to ``amount`` and make ``counts + g`` as even as possible.

    Solves max entropy of (counts + g) / total: g_c = max(0, nu - counts_c) (FIMI's category problem, our
    reconstruction), rounded so that the sum is kept. What is left over by rounding goes to the lowest class numbers.

    Args:
        counts: int64 [classes], >= 0.
        amount: how many to hand out, >= 0.
    """
    counts = np.asarray(counts, dtype=np.int64)
    if amount < 0 or (counts < 0).any():
        raise ValueError(f"amount {amount} and counts {counts.tolist()} must not be negative")
    order = np.sort(counts)
    # With the k smallest classes filled to the level nu_k = (amount + their sum) / k, k is right when nu_k lies between
    # the k-th and the next count.
    levels = (amount + np.cumsum(order)) / np.arange(1, len(order) + 1)
    reached = int(np.flatnonzero(levels >= order).max())
    level = (amount + int(order[: reached + 1].sum())) // (reached + 1)
    given = np.maximum(0, level - counts)
    at_level = np.flatnonzero(counts <= level)
    given[at_level[: amount - int(given.sum())]] += 1
    return given


def apportion(weights: np.ndarray, amount: int) -> np.ndarray:
    """Integers >= 0 that sum to ``amount`` in proportion to ``weights`` [classes], >= 0: by largest remainders, of
    equal ones the lowest class numbers first. Weights that are all 0 count as equal.
    """
    weights = weights if weights.any() else np.ones_like(weights)
    ideal = weights / weights.sum() * amount
    given = np.floor(ideal + 1e-9).astype(np.int64)
    remainders = np.round(ideal - given, 9)
    given[np.argsort(-remainders, kind="stable")[: amount - int(given.sum())]] += 1
    return given
