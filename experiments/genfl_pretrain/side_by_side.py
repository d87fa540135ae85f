"""The poster's tables on MNIST beside what was measured here, as Markdown.

    python experiments/genfl_pretrain/side_by_side.py experiments/genfl_pretrain/results

Reads the folder that ``fl-ray compare experiments/genfl_pretrain/mnist.yaml --output ...`` fills; cells that were not
run have a dash.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fl_ray.run_folder import RunFolder

# GenFL of TU Delft (P. K. Cho), MNIST: mean and standard deviation over 5 repeats, where the poster gives one.
PAPER: dict[str, dict[str, tuple[float, float | None]]] = {
    "IID": {"cas": (87.09, 0.17), "without": (87.08, 1.03), "with": (93.92, 0.28)},
    "a100": {"cas": (87.48, None), "without": (83.78, 5.32), "with": (93.80, 0.33)},
    "a10": {"cas": (86.77, None), "without": (81.70, 8.91), "with": (93.85, 0.16)},
    "a1": {"cas": (86.87, None), "without": (85.87, 2.87), "with": (93.59, 0.26)},
    "a0.1": {"cas": (84.38, None), "without": (41.35, 15.28), "with": (88.24, 2.43)},
    "a0.01": {"cas": (60.65, None), "without": (22.52, 5.24), "with": (57.45, 6.67)},
}
TITLES = {"cas": "CAS", "without": "FedAvg alone", "with": "pre-trained"}


def finished(output: Path) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """Summaries of finished runs by (partition, with or without)."""
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for file in sorted(output.glob("runs/*/*/summary.json")):
        folder = RunFolder(file.parent)
        if folder.finished():
            partition, kind = folder.summary()["label"].split()
            found.setdefault((partition, kind), []).append(folder.summary())
    return found


def text(values: Sequence[float]) -> str:
    """Mean, spread and number of repeats."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({len(values)})"


def verdict(values: Sequence[float], paper: tuple[float, float | None]) -> str:
    """Whether the mean is within two of the poster's standard deviations, or 2 points, the larger."""
    if not values:
        return ""
    allowed = max(2.0, 2 * (paper[1] or 0.0))
    off = statistics.fmean(values) - paper[0]
    return f"{off:+.2f}" + ("" if abs(off) <= allowed else f" (beyond {allowed:.1f})")


def main() -> None:
    runs = finished(Path(sys.argv[1]))
    parts = ("poster", "here", "off by")
    header = ["partition", *(f"{title}: {part}" for title in TITLES.values() for part in parts)]
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for partition, cells in PAPER.items():
        line = [partition]
        for kind, paper in cells.items():
            side = "with" if kind == "cas" else kind
            own = [run for run in runs.get((partition, side), []) if kind != "cas" or "cas" in run]
            measured = [run["cas"] if kind == "cas" else 100 * run["final_accuracy"] for run in own]
            given = f"{paper[0]:.2f}" + (f" ± {paper[1]:.2f}" if paper[1] is not None else "")
            line += [given, text(measured), verdict(measured, paper)]
        lines.append(line)
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))
    print("\nOn the 10,000 test images:\n")
    print("| partition | FedAvg alone | pre-trained, before FedAvg | after it |\n| --- | ---: | ---: | ---: |")
    for partition in PAPER:
        without, pretrained = runs.get((partition, "without"), []), runs.get((partition, "with"), [])
        columns = [
            [100 * run["clean_accuracy"] for run in without],
            [100 * run["pretrained_accuracy"] for run in pretrained],
            [100 * run["clean_accuracy"] for run in pretrained],
        ]
        print(f"| {partition} | {' | '.join(text(column) for column in columns)} |")


if __name__ == "__main__":
    main()
