"""FIMI's metrics beside accuracy, over seeds: energy and virtual time to a target, delivery, gradients, label entropy.

    fl-ray compare experiments/fimi/mnist.yaml --seeds 0 1 2 --output runs/fimi-mnist
    python experiments/fimi/metrics_table.py runs/fimi-mnist 0.8 0.9

Reads the finished runs of a comparison; writes metrics.md into its folder. The targets must be among the recipe's.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from fl_ray.commands.reports import run_folders
from fl_ray.comparison import rows_of_runs
from fl_ray.report.comparison_report import markdown_table
from fl_ray.run_folder import RunFolder
from fl_ray.summary import spread_text, target_key, values_text


def _plan(folder: RunFolder, name: str) -> float:
    plan = folder.summary().get("plan") or {}
    return float(plan.get(name, np.nan))


def _cosines(folder: RunFolder) -> float:
    """The mean cosine of a run's clients' gradients with that of IID data, over the rounds that were looked at."""
    seen = [row["gradient_cosine"] for row in folder.history() if np.isfinite(row["gradient_cosine"])]
    return float(np.mean(seen)) if seen else float("nan")


def main() -> int:
    if len(sys.argv) < 3:
        print(__doc__, file=sys.stderr)
        return 2
    output, targets = Path(sys.argv[1]), [target_key(float(word)) for word in sys.argv[2:]]
    rows, by_label, known = rows_of_runs(run_folders(output))
    missing = set(targets) - {target_key(target) for target in known}
    if missing:
        print(f"{output}: no target {', '.join(sorted(missing))} in its recipe", file=sys.stderr)
        return 2
    columns = ["run", "energy [J]", "synthetic samples", "delivery [s]", "gradient cosine", "label entropy [bit]"]
    for target in targets:
        columns += [f"energy to {float(target):.0%} [J]", f"time to {float(target):.0%} [s]"]
    cells = []
    for row in rows:
        members = by_label[row["label"]]
        line = [row["label"], spread_text(row, "energy_j", 0)]
        line += [values_text([_plan(each, "synthetic_samples") for each in members], 0)]
        line.append(values_text([_plan(each, "delivery_s") for each in members], 1))
        line.append(values_text([_cosines(each) for each in members], 3))
        line.append(values_text([each.summary().get("label_entropy_after", np.nan) for each in members], 2))
        for target in targets:
            hits = row[f"reached_{target}"]
            suffix = "" if hits == row["runs"] else f" ({hits} of {row['runs']})"
            line += [spread_text(row, f"{name}_to_{target}", 0) + suffix for name in ("energy_j", "virtual_time_s")]
        cells.append(line)
    text = markdown_table(columns, cells)
    (output / "metrics.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
