"""Figures of plans, searches and learning curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from fl_ray.allocation.learning_curve import CurveFit
from fl_ray.allocation.plan import Plan
from fl_ray.report.figures import new_figure

__all__ = ["allocation_figure", "curve_figure", "energy_figure", "search_figure", "searches_figure"]

_SHOWN_DEVICES = 100
_POINTS = 200  # of a curve


def energy_figure(plan: Plan) -> Figure:
    """Energy of each device for computing and uplink, the largest spenders first."""
    figure, (axis,) = new_figure(8, 3)
    order = np.argsort(-(plan.e_cmp_j + plan.e_com_j), kind="stable")[:_SHOWN_DEVICES]
    places = np.arange(len(order))
    axis.bar(places, plan.e_cmp_j[order], label="computing", color="C0")
    axis.bar(places, plan.e_com_j[order], bottom=plan.e_cmp_j[order], label="uplink", color="C1")
    if len(order) <= 40:
        axis.set_xticks(places, [str(device) for device in order], fontsize=7)
    axis.set_xlabel("device")
    axis.set_ylabel("energy of a round [J]")
    axis.legend()
    return figure


def allocation_figure(plan: Plan) -> Figure:
    """Synthetic samples, time split and bandwidth against the strength of devices and channels."""
    cell = plan.cell
    cost = cell.capacitance * cell.cycles**3  # computing energy at a fixed time goes with eps k^3
    figure, axes = new_figure(11, 3.2, 3)
    marks = {"s": 14, "alpha": 0.7}
    axes[0].scatter(cost, cell.d_loc, color="0.6", label="local", **marks)
    axes[0].scatter(cost, cell.d_loc + plan.d_gen, color="C2", label="with synthetic", **marks)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("cost of computing, ε k³")
    axes[0].set_ylabel("samples")
    axes[0].legend()
    axes[1].scatter(cost, plan.rho, color="C0", **marks)
    axes[1].set_xscale("log")
    axes[1].set_xlabel("cost of computing, ε k³")
    axes[1].set_ylabel("share of time for computing, ρ")
    for axis in axes[:2]:  # a range below a decade has too many labels
        axis.xaxis.set_minor_formatter(NullFormatter())
    axes[2].scatter(10 * np.log10(cell.gain), plan.b_hz / 1e6, color="C1", **marks)
    axes[2].set_xlabel("channel gain [dB]")
    axes[2].set_ylabel("bandwidth [MHz]")
    return figure


def search_figure(plan: Plan) -> Figure:
    """Gap of the best plan so far against evaluations."""
    figure, (axis,) = new_figure(6, 3)
    best = np.array(plan.history_j)
    axis.plot(np.arange(1, len(best) + 1), np.maximum(best / plan.lower_bound_j - 1, 1e-16), label=plan.search)
    axis.set_yscale("log")
    axis.set_xlabel("candidates looked at")
    axis.set_ylabel("energy above the lower bound")
    return figure


def searches_figure(gaps: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Gap against evaluations for several searches: the median over cells, shaded from the quarter to three quarters.

    Args:
        gaps: by search, of each cell the gap after every evaluation; inf where nothing was found yet.
    """
    figure, (axis,) = new_figure(8, 4)
    for number, (name, cells) in enumerate(gaps.items()):
        longest = max(map(len, cells))
        table = np.array([[*cell, *([cell[-1]] * (longest - len(cell)))] for cell in cells])
        x = np.unique(np.geomspace(1, longest, _POINTS).astype(int))  # thousands of points are seen as these are
        low, middle, high = np.quantile(table[:, x - 1], [0.25, 0.5, 0.75], axis=0, method="nearest")
        color = f"C{number % 10}"
        axis.plot(x, np.maximum(middle, 1e-13), color=color, label=name)
        axis.fill_between(x, np.maximum(low, 1e-13), np.maximum(high, 1e-13), color=color, alpha=0.15, linewidth=0)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("candidates looked at")
    axis.set_ylabel("energy above the dual bound")
    axis.legend(ncols=2)
    return figure


def curve_figure(fit: CurveFit) -> Figure:
    """Measured errors, the fitted curve and its 95 % band."""
    figure, (axis,) = new_figure(6, 3.5)
    x = np.geomspace(fit.samples.min() * 0.8, fit.samples.max() * 1.5, 200)
    low, high = fit.band(x)
    curve = fit.curve
    label = f"{curve.alpha:.3g} D^-{curve.beta:.3g} + {curve.gamma:.3g}"
    axis.plot(x, curve.error(x), color="C0", label=label)
    if np.isfinite(low).all():
        axis.fill_between(x, low.clip(0), high.clip(0, 1), color="C0", alpha=0.15, linewidth=0, label="95 % band")
    axis.scatter(fit.samples, fit.errors, color="C3", s=16, zorder=3, label="measured")
    axis.set_xscale("log")
    axis.set_xlabel("samples per device")
    axis.set_ylabel("test error")
    axis.legend()
    return figure
