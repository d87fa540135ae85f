"""Intervals over seeds, and two settings held against each other seed by seed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

__all__ = ["compare_pairs", "confidence_interval", "p_text"]


def confidence_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Mean and half width of Student's interval; the half width is NaN for a single value."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return mean, math.nan
    error = statistics.stdev(values) / math.sqrt(len(values))
    return mean, float(stats.t.ppf((1 + level) / 2, len(values) - 1)) * error


def compare_pairs(own: Mapping[Any, float], other: Mapping[Any, float]) -> dict[str, Any]:
    """The difference own - other over the keys (seeds) that both have: mean, half width of its 95 % interval, and p.

    p is that of the two-sided paired t-test. It is None for fewer than three pairs, and where all differ by the same.
    """
    seeds = sorted(set(own) & set(other))
    differences = np.array([own[seed] - other[seed] for seed in seeds])
    if len(seeds) == 0:
        return {"pairs": 0, "difference": None, "half_width": None, "p": None}
    mean, half = confidence_interval(differences.tolist())
    tested = len(seeds) >= 3 and differences.std() > 0
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if tested else None
    return {"pairs": len(seeds), "difference": mean, "half_width": None if math.isnan(half) else half, "p": p}


def p_text(p: float | None) -> str:
    """p for a table; a dash where there was no test."""
    if p is None:
        return "–"
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
