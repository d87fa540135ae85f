"""Energy, time and accuracy over Delta_max x Tmax, and over alpha: the tables and figures of a sensitivity comparison.

    fl-ray compare experiments/fimi/sensitivity_mnist.yaml --seeds 0 --output runs/fimi-sensitivity
    python experiments/fimi/heat_maps.py runs/fimi-sensitivity

Reads settings and results of every finished run in the folder; writes heat_maps.md and figures/heat_maps.svg into it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from fl_ray.report.comparison_report import markdown_table
from fl_ray.report.figures import new_figure, save_svg
from fl_ray.run_folder import RunFolder

MEASURES = ("energy of a round [J]", "time of a round [s]", "final accuracy [%]")


def cells(folder: Path) -> list[dict[str, Any]]:
    """Settings and results of each finished run."""
    found = []
    for path in sorted(folder.glob("runs/*/*/config.yaml")):
        run = RunFolder(path.parent)
        if not run.finished():
            continue
        config, summary, last = run.config(), run.summary(), run.history()[-1]
        found.append(
            {
                "alpha": config.data.partition.settings["alpha"],
                "error_max": config.allocation.error_max,
                "t_max_s": config.allocation.t_max_s,
                "synthetic": summary["plan"]["synthetic_samples"],
                "energy of a round [J]": last["energy_j"] / last["round"],
                "time of a round [s]": last["virtual_time_s"] / last["round"],
                "final accuracy [%]": 100 * summary["final_accuracy"],
            }
        )
    return found


def mean_of(rows: list[dict[str, Any]], measure: str, **wanted: float) -> float:
    """Mean over seeds of a measure at some settings; NaN where no run has them."""
    values = [row[measure] for row in rows if all(row[name] == value for name, value in wanted.items())]
    return float(np.mean(values)) if values else float("nan")


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(sys.argv[1])
    rows = cells(folder)
    if not rows:
        print(f"{folder}: no finished runs", file=sys.stderr)
        return 2
    errors, times, alphas = (sorted({row[name] for row in rows}) for name in ("error_max", "t_max_s", "alpha"))
    counts = {alpha: sum(row["alpha"] == alpha for row in rows) for alpha in alphas}
    common = max(counts, key=counts.get)  # the alpha that the grid was run at
    grid = [row for row in rows if row["alpha"] == common]
    figure, axes = new_figure(11, 3.2, len(MEASURES))
    lines = [f"Grid at alpha = {common:g}; mean over {len(grid) // (len(errors) * len(times)) or 1} seeds.\n"]
    for axis, measure in zip(axes, MEASURES, strict=True):
        table = np.array([[mean_of(grid, measure, error_max=e, t_max_s=t) for t in times] for e in errors])
        axis.imshow(table, cmap="viridis", origin="lower", aspect="auto")
        middle = (np.nanmin(table) + np.nanmax(table)) / 2
        for (row, column), value in np.ndenumerate(table):
            colour = "k" if value > middle else "w"  # the map goes from dark to bright
            axis.text(column, row, f"{value:.4g}", ha="center", va="center", color=colour, fontsize=8)
        axis.set_xticks(range(len(times)), [f"{value:g}" for value in times])
        axis.set_yticks(range(len(errors)), [f"{value:g}" for value in errors])
        axis.set_xlabel("Tmax [s]")
        axis.set_ylabel("Δmax")
        axis.set_title(measure)
        axis.grid(visible=False)
        body = [[f"{error:g}", *(f"{value:.4g}" for value in line)] for error, line in zip(errors, table, strict=True)]
        lines.append(f"{measure}:\n\n" + markdown_table(["Δmax \\ Tmax", *(f"{t:g} s" for t in times)], body))
    limits = [{(row["error_max"], row["t_max_s"]) for row in rows if row["alpha"] == alpha} for alpha in alphas]
    shared = set.intersection(*limits)  # that every alpha was run at
    over = []
    for alpha in alphas:
        own = [row for row in rows if row["alpha"] == alpha and (row["error_max"], row["t_max_s"]) in shared]
        over.append(
            [f"{alpha:g}", *(f"{np.mean([row[name] for row in own]):.4g}" for name in ("synthetic", *MEASURES))]
        )
    lines.append("Over alpha:\n\n" + markdown_table(["alpha", "synthetic samples", *MEASURES], over))
    text = "\n".join(lines)
    (folder / "heat_maps.md").write_text(text, encoding="utf-8")
    save_svg(folder, "heat_maps", figure)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
