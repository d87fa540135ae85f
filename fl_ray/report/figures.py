"""Figures as SVG text (or PNG for images), drawn by matplotlib without a display."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fl_ray.summary import worst_decile

__all__ = [
    "accuracy_figure",
    "client_accuracy_figure",
    "gain_figure",
    "kappa_figure",
    "new_figure",
    "partition_figure",
    "samples_png",
    "save_svg",
    "timeline_figure",
]

mpl.use("Agg")
_STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "fl_ray",
}
_SHOWN_CLIENTS = 60
_MARKERS = "os^Dv"


def save_svg(folder: Path, name: str, figure: Figure) -> str:
    """Keep the figure as ``folder/figures/name.svg``; its SVG element."""
    text = _svg(figure)
    path = folder / "figures" / f"{name}.svg"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return text


def _svg(figure: Figure) -> str:
    stream = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(stream, format="svg", metadata={"Date": None})
    text = stream.getvalue()
    return text[text.index("<svg") :]


def new_figure(width: float, height: float, columns: int = 1, rows: int = 1) -> tuple[Figure, Any]:
    """An empty figure in the style of all, and its axes."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
    return figure, axes


def accuracy_figure(
    runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]], targets: Sequence[float], of: str = "test accuracy"
) -> Figure:
    """Accuracy against rounds, virtual time and energy.

    Args:
        runs: histories by label, one for each seed. Several seeds: the mean over them at each round (and at the mean
            time or energy of that round), shaded by one standard deviation.
        targets: dashed lines.
        of: what the accuracy is.
    """
    figure, axes = new_figure(11, 3.4, 3)
    kinds = (("round", "round"), ("virtual_time_s", "virtual time [s]"), ("energy_j", "energy of devices [J]"))
    for axis, (column, label) in zip(axes, kinds, strict=True):
        for number, (name, histories) in enumerate(runs.items()):
            x, mean, std = _mean_curve(histories, column)
            if len(x) == 0 or (column == "energy_j" and x.max() == 0):
                continue  # a method without devices has no place on the energy axis
            color = f"C{number % 10}"
            axis.plot(x, mean, color=color, label=name, marker="." if len(x) < 3 else None)
            axis.fill_between(x, mean - std, mean + std, color=color, alpha=0.15, linewidth=0)
        for target in targets:
            axis.axhline(target, color="0.5", linestyle="--", linewidth=0.8)
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel(of)
    if len(runs) > 1:
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(runs), 5))
    return figure


def _mean_curve(
    histories: Sequence[Sequence[Mapping[str, Any]]], column: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rounds = min((len(history) for history in histories), default=0)
    values = np.array([[row["test_accuracy"] for row in history[:rounds]] for history in histories], dtype=float)
    places = np.array([[row[column] for row in history[:rounds]] for history in histories], dtype=float)
    if rounds == 0:
        return np.empty(0), np.empty(0), np.empty(0)
    shown = ~np.isnan(values).any(axis=0)
    values, places = values[:, shown], places[:, shown]
    spread = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1])
    return places.mean(axis=0), values.mean(axis=0), spread


def client_accuracy_figure(tests: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """How the accuracy is spread over clients: the share of clients that have at most so much.

    Args:
        tests: every client's accuracy by label, a list for each seed; a curve has the clients of all seeds. A dot marks
            the mean of the worst tenth (the mean over seeds).
    """
    figure, (axis,) = new_figure(6, 3.4)
    for number, (name, seeds) in enumerate(tests.items()):
        pooled = np.sort(np.concatenate([np.asarray(seed, dtype=float) for seed in seeds]))
        shares = np.arange(1, len(pooled) + 1) / len(pooled)
        color = f"C{number % 10}"
        axis.step([0, *pooled, 1], [0, *shares, 1], where="post", color=color, label=name)
        axis.plot(float(np.mean([worst_decile(seed) for seed in seeds])), 0.1, "o", color=color, markersize=5)
    axis.axhline(0.1, color="0.5", linestyle="--", linewidth=0.8)
    axis.set_xlim(0, 1)
    axis.set_ylim(0, 1.02)
    axis.set_xlabel("accuracy on the client's own held-out images")
    axis.set_ylabel("share of clients")
    axis.grid(alpha=0.25)
    figure.legend(loc="outside lower center", ncols=min(len(tests), 4))
    return figure


def kappa_figure(kappas: Sequence[float]) -> Figure:
    """The weight of GenFL's augmented model in each round."""
    figure, (axis,) = new_figure(6, 2.6)
    axis.plot(range(1, len(kappas) + 1), kappas, marker="." if len(kappas) < 30 else None)
    axis.set_ylim(-0.02, 1.02)
    axis.set_xlabel("round")
    axis.set_ylabel("κ2")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure


def gain_figure(
    labels: Sequence[str],
    gains: Sequence[float],
    spreads: Sequence[float | None],
    groups: Sequence[int],
    panels: Mapping[str, Sequence[float | None]],
) -> Figure:
    """What labels gain, late in training, against each measure of their synthetic images, a panel for each measure.

    Args:
        gains, spreads: means and standard deviations of each label, in percentage points.
        groups: a label's marker.
        panels: a value of each label by the measure's title; None: not measured.
    """
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = new_figure(2.75 * columns, 2.5 * rows + 0.5, columns, rows)
    for axis, (title, values) in zip(axes, panels.items(), strict=False):
        for number, (label, gain, spread, value) in enumerate(zip(labels, gains, spreads, values, strict=True)):
            if value is not None:
                marker = _MARKERS[groups[number] % len(_MARKERS)]
                axis.errorbar(
                    value,
                    gain,
                    yerr=spread,
                    fmt=marker,
                    color=f"C{number % 10}",
                    label=label,
                    capsize=2,
                    elinewidth=0.8,
                )
        axis.axhline(0, color="0.5", linestyle="--", linewidth=0.8)
        axis.set_xlabel(title)
        axis.grid(alpha=0.25)
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[::columns]:
        axis.set_ylabel("late gain [points]")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(labels), 4))
    return figure


def partition_figure(counts: np.ndarray, classes: Sequence[str]) -> Figure:
    """Clients against classes, the bubble's area being the number of samples; int [clients, classes]."""
    shown = counts[:_SHOWN_CLIENTS]
    figure, (axis,) = new_figure(min(11, 2.5 + 0.16 * len(shown)), min(9, 1.4 + 0.24 * len(classes)))
    clients, labels = np.nonzero(shown)
    area = shown[clients, labels] / max(shown.max(), 1) * 180
    axis.scatter(clients, labels, s=np.maximum(area, 1.5), color="C0", alpha=0.7, linewidth=0)
    axis.set_xlabel("client" + (f" (the first {_SHOWN_CLIENTS} of {len(counts)})" if len(counts) > len(shown) else ""))
    axis.set_xlim(-1, len(shown))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set_ylim(-1, len(classes))
    if len(classes) <= 45:
        axis.set_yticks(range(len(classes)), [str(name)[:14] for name in classes])
    else:
        axis.set_ylabel("class")
    axis.grid(alpha=0.2)
    return figure


def timeline_figure(rounds: Sequence[Mapping[str, Any]]) -> Figure:
    """Down-link, computing and uplink of each device over the virtual time of a few rounds."""
    clients = sorted({client for entry in rounds for client in entry["clients"]})
    row_of = {client: row for row, client in enumerate(clients)}
    figure, (axis,) = new_figure(10, min(8, 1.2 + 0.2 * len(clients)))
    parts = (("t_down_s", "down-link", "C2"), ("t_cmp_s", "computing", "C0"), ("t_up_s", "uplink", "C1"))
    for entry in rounds:
        rows = [row_of[client] for client in entry["clients"]]
        start = np.full(len(rows), entry["start_s"])
        for key, label, color in parts:
            width = np.array(entry[key])
            axis.barh(rows, width, left=start, color=color, height=0.7, label=label if entry is rounds[0] else None)
            start = start + width
        axis.axvline(entry["start_s"], color="0.6", linewidth=0.7)
    axis.set_yticks(range(len(clients)), [str(client) for client in clients], fontsize=7)
    axis.set_ylabel("client")
    axis.set_xlabel("virtual time [s]")
    axis.grid(visible=False)
    figure.legend(loc="outside upper center", ncols=3)
    return figure


def samples_png(real: np.ndarray, synthetic: np.ndarray, names: Sequence[str], of: str) -> bytes:
    """Real images on the left, synthetic ones on the right, of the first twenty rows.

    Args:
        real, synthetic: uint8 [rows, columns, C, H, W]; real ones may have no columns, and are left away then.
        names: of the rows: classes, or clients.
        of: what the real ones are.
    """
    rows = min(len(names), 20)
    sides = {of: real, "synthetic": synthetic} if real.shape[1] else {"synthetic": synthetic}
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(4.5 * len(sides), 0.5 + min(0.46, 3.6 / synthetic.shape[1]) * rows))
        figure.set_layout_engine("constrained")
        axes = figure.subplots(1, len(sides), squeeze=False).ravel()
    for axis, (title, images) in zip(axes, sides.items(), strict=True):
        axis.imshow(_tiles(images[:rows]), cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="equal")
        axis.set_title(title)
        height = images.shape[3] + 1
        axis.set_yticks([height * row + height / 2 for row in range(rows)], [str(name)[:18] for name in names[:rows]])
        axis.set_xticks([])
        axis.grid(visible=False)
        for side in axis.spines.values():
            side.set_visible(False)
        axis.tick_params(length=0)
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=110)
    return stream.getvalue()


def _tiles(images: np.ndarray) -> np.ndarray:
    """One picture of [rows, columns] images with a white line between."""
    rows, columns, channels, height, width = images.shape
    sheet = np.full((rows, columns, channels, height + 1, width + 1), 255, dtype=np.uint8)
    sheet[..., :height, :width] = images
    sheet = sheet.transpose(0, 3, 1, 4, 2).reshape(rows * (height + 1), columns * (width + 1), channels)
    return sheet[..., 0] if channels == 1 else sheet
