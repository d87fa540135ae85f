"""Figures of a study: history, importance, parallel coordinates, and the front of accuracy, energy and time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import matplotlib.ticker
import numpy as np
from matplotlib.figure import Figure

from fl_ray.report.figures import new_figure

__all__ = ["COSTS", "front_figure", "history_figure", "importance_figure", "parallel_figure"]

COSTS = {"energy_j": "energy of devices [J]", "virtual_time_s": "virtual time [s]"}


def history_figure(values: Mapping[str, Sequence[float | None]], modes: Sequence[str]) -> Figure:
    """Each metric of every trial in its order, and the best so far.

    Args:
        values: by metric, one of each trial; None where it did not come to its end.
        modes: ``max`` or ``min`` of each.
    """
    figure, axes = new_figure(5.5 * len(values), 3.4, len(values))
    for axis, (name, found), mode in zip(axes, values.items(), modes, strict=True):
        shown = np.array([np.nan if value is None else value for value in found])
        best = np.fmax.accumulate(shown) if mode == "max" else np.fmin.accumulate(shown)
        axis.plot(np.arange(len(shown)), shown, "o", color="C0", markersize=4, label="trial")
        axis.step(np.arange(len(shown)), best, where="post", color="C1", label="best so far")
        if np.nanmin(shown) > 0 and np.nanmax(shown) > 10 * np.nanmin(shown):
            axis.set_yscale("log")  # else one bad trial hides how the good ones differ
        axis.set_xlabel("trial")
        axis.xaxis.set_major_locator(mpl.ticker.MaxNLocator(integer=True))
        axis.set_ylabel(name)
    axes[0].legend(frameon=False)
    return figure


def importance_figure(importances: Mapping[str, Mapping[str, float]]) -> Figure:
    """By metric, the share of its variance that each setting explains."""
    names = list(next(iter(importances.values())))
    height = 0.4 + 0.35 * len(names) * len(importances)
    figure, (axis,) = new_figure(6.5, max(1.6, height))
    for place, (metric, shares) in enumerate(importances.items()):
        at = np.arange(len(names)) + place / (len(importances) + 1)
        axis.barh(at, [shares.get(name, 0.0) for name in names], 1 / (len(importances) + 1), label=metric)
    axis.set_yticks(np.arange(len(names)) + (len(importances) - 1) / 2 / (len(importances) + 1), names)
    axis.invert_yaxis()
    axis.set_xlabel("share of the variance (fANOVA)")
    if len(importances) > 1:
        figure.legend(frameon=False, loc="outside upper center", ncols=len(importances))
    return figure


def parallel_figure(
    params: Sequence[Mapping[str, Any]], logarithmic: set[str], values: Sequence[float], metric: str
) -> Figure:
    """A line for each finished trial through the settings that it has, to its metric, which colours it."""
    names = list(dict.fromkeys(name for each in params for name in each))
    apart = min(1.6, max(0.5, 11 / (len(names) + 1)))  # inches: many settings must not make a figure of tiny letters
    figure, (axis,) = new_figure(apart * (len(names) + 1) + 1.2, 3.8)
    columns, ticks = [], []
    for name in names:
        places, labels = _scale([each.get(name) for each in params], name in logarithmic)
        columns.append(places)
        ticks.append(labels)
    shown = np.asarray(values, dtype=float)
    low, high = shown.min(), shown.max()
    columns.append((shown - low) / (high - low) if high > low else np.full(len(shown), 0.5))
    ticks.append([(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")] if high > low else [(0.5, f"{low:.4g}")])
    colours = mpl.colormaps["viridis"](columns[-1])
    lines = np.array(columns).T
    for number in np.argsort(columns[-1]):
        has = np.flatnonzero(~np.isnan(lines[number]))
        axis.plot(has, lines[number][has], color=colours[number], linewidth=1.2, alpha=0.8, marker=".")
    for place, marks in enumerate(ticks):
        axis.axvline(place, color="0.6", linewidth=0.8)
        for y, label in marks:
            axis.text(place + 0.03, y, label, fontsize=7, va="center")
    last = [name.rpartition(".")[2] for name in names]
    words = [name if last.count(word) > 1 else word for name, word in zip(names, last, strict=True)]
    axis.set_xticks(range(len(names) + 1), [*words, metric], rotation=15)
    axis.set_yticks([])
    axis.set_ylim(-0.06, 1.06)
    axis.grid(visible=False)
    return figure


def _scale(values: Sequence[Any], logarithmic: bool) -> tuple[np.ndarray, list[tuple[float, str]]]:
    """Places in [0, 1] of a setting's values (NaN where a trial has none), and what stands beside the axis."""
    known = [value for value in values if value is not None]
    if all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in known):
        numbers = np.array([np.nan if value is None else float(value) for value in values])
        low, high = np.nanmin(numbers), np.nanmax(numbers)
        marks = [(0.0, f"{low:.4g}"), (1.0, f"{high:.4g}")]
        if low == high:
            return np.where(np.isnan(numbers), np.nan, 0.5), [(0.5, f"{low:.4g}")]
        if logarithmic:
            numbers, low, high = np.log(numbers), np.log(low), np.log(high)
        return (numbers - low) / (high - low), marks
    choices = list(dict.fromkeys(str(value) for value in known))
    at = {choice: (place + 0.5) / len(choices) for place, choice in enumerate(choices)}
    places = np.array([np.nan if value is None else at[str(value)] for value in values])
    return places, [(place, choice) for choice, place in at.items()]


def front_figure(metrics: Mapping[int, Mapping[str, float]], fronts: Mapping[str, Sequence[int]]) -> Figure:
    """Final accuracy of trials against what it costs; the Pareto fronts are joined and numbered.

    Args:
        metrics: of each trial, by its number.
        fronts: by metric that is to be low (those of COSTS, say), the numbers of the trials on the front.
    """
    figure, axes = new_figure(5 * len(fronts), 3.6, len(fronts))
    for axis, name in zip(axes, fronts, strict=True):
        axis.plot(
            [each[name] for each in metrics.values()],
            [each["final_accuracy"] for each in metrics.values()],
            "o",
            color="0.6",
            markersize=4,
        )
        front = sorted((metrics[number][name], metrics[number]["final_accuracy"], number) for number in fronts[name])
        axis.step(*zip(*(at[:2] for at in front), strict=True), where="post", color="C3", marker="o", markersize=5)
        numbered = {(x, y): number for x, y, number in reversed(front)}  # of several in one place, the first
        for at, number in numbered.items():
            axis.annotate(str(number), at, xytext=(3, 4), textcoords="offset points")
        axis.set_xlabel(COSTS.get(name, name))
    axes[0].set_ylabel("final accuracy")
    return figure
