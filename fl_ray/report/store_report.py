"""The report of a comparison from the tracking store: a table with intervals and tests, and figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fl_ray.comparison import write_comparison_csv
from fl_ray.pairs import compare_pairs, confidence_interval, p_text
from fl_ray.report import page as html
from fl_ray.report.comparison_report import Table, markdown_table
from fl_ray.report.figures import accuracy_figure, new_figure, save_svg
from fl_ray.store_comparison import StoredRun, series_of

__all__ = ["store_report"]

_METRIC = "final_accuracy"
_NOTE = (
    "Mean ± half width of Student's 95 % interval over seeds. Difference: to {baseline}, over the seeds that both "
    "have, with its interval; p: two-sided paired t-test, from three pairs on, not corrected for several comparisons."
)


def store_report(
    uri: str, experiment: str, runs: Sequence[StoredRun], older: int, baseline: str | None, output: Path
) -> Table:
    """Write comparison.csv, comparison.md, figures and report.html into ``output``; the table.

    Args:
        older: how many runs are left out because there are newer ones of their label and seed.
        baseline: the label that the others are held against; default: that whose first run began first, which is the
            first of a comparison's.
    """
    by_label: dict[str, list[StoredRun]] = {}
    for run in runs:
        by_label.setdefault(run.label, []).append(run)
    baseline = min(runs, key=lambda run: run.began).label if baseline is None else baseline
    note = _NOTE.format(baseline=baseline)
    rows = [_row(label, own, by_label[baseline]) for label, own in by_label.items()]
    rows.sort(key=lambda row: -row["final_accuracy"])
    write_comparison_csv(rows, output / "comparison.csv")
    table = _table(rows, baseline)
    (output / "comparison.md").write_text(f"{markdown_table(*table)}\n{note}\n", encoding="utf-8")
    histories = {label: [series_of(uri, run.run_id) for run in own] for label, own in by_label.items()}
    curves = save_svg(output, "accuracy", accuracy_figure(histories, (), "accuracy"))
    shown = save_svg(output, "differences", _differences_figure(rows, baseline))
    caption = "Accuracy, on the test part unless a method says otherwise; shaded: one standard deviation over seeds."
    sections = [
        html.section("Results", html.table(*table), f'<p class="note">{note}</p>'),
        html.section("Accuracy", html.figure(curves, caption)),
        html.section("Differences", html.figure(shown, f"Final accuracy less that of {baseline}, 95 % intervals.")),
    ]
    lead = f"{len(runs)} finished runs with {len(by_label)} labels, from {uri.split('@')[-1]}"
    if older:
        lead += f"; {older} that have newer ones of the same label and seed are left out"
    (output / "report.html").write_text(html.page(f"fl_ray: {experiment}", lead, sections), encoding="utf-8")
    return table


def _row(label: str, own: Sequence[StoredRun], base: Sequence[StoredRun]) -> dict[str, Any]:
    mean, half = confidence_interval([run.metrics[_METRIC] for run in own])
    row: dict[str, Any] = {"label": label, "runs": len(own), "seeds": " ".join(str(run.seed) for run in own)}
    row |= {"final_accuracy": mean, "final_accuracy_half_width": None if np.isnan(half) else half}
    for name in ("virtual_time_s", "energy_j"):
        row[name] = float(np.mean([run.metrics[name] for run in own if name in run.metrics] or [np.nan]))
    if own is not base:
        pairs = [{run.seed: run.metrics[_METRIC] for run in runs} for runs in (own, base)]
        row |= compare_pairs(*pairs)
    return row


def _table(rows: Sequence[dict[str, Any]], baseline: str) -> Table:
    columns = ["run", "seeds", "final accuracy [%]", f"difference to {baseline}", "p", "virtual time [s]", "energy [J]"]
    cells = []
    for row in rows:
        line = [row["label"], str(row["runs"]), _percent(row["final_accuracy"], row["final_accuracy_half_width"])]
        line.append("–" if row.get("difference") is None else _percent(row["difference"], row["half_width"]))
        line.append(p_text(row.get("p")))
        line += [f"{row[name]:,.1f}" for name in ("virtual_time_s", "energy_j")]
        cells.append(line)
    return columns, cells


def _percent(mean: float, half: float | None) -> str:
    return f"{100 * mean:.2f}" + ("" if half is None else f" ± {100 * half:.2f}")


def _differences_figure(rows: Sequence[dict[str, Any]], baseline: str) -> Figure:
    others = [row for row in rows if row.get("difference") is not None]
    figure, (axis,) = new_figure(7, 1.2 + 0.35 * max(1, len(others)))
    for place, row in enumerate(others):
        half = row["half_width"]
        error = None if half is None else 100 * half
        axis.errorbar(100 * row["difference"], place, xerr=error, fmt="o", color="C0", capsize=3)
    axis.axvline(0, color="0.5", linewidth=0.8)
    axis.set_yticks(range(len(others)), [row["label"] for row in others])
    axis.invert_yaxis()
    axis.set_xlabel(f"final accuracy less that of {baseline} [points]")
    return figure
