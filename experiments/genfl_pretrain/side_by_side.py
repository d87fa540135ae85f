"""The poster's tables on MNIST beside what was measured here, as Markdown.

    python experiments/genfl_pretrain/side_by_side.py experiments/genfl_pretrain/results*

Reads the folders that ``fl-ray compare --output ...`` fills with mnist.yaml and initialise.yaml; cells that were not
run have a dash.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from fl_ray.run_folder import RunFolder

# GenFL of TU Delft (P. K. Cho), MNIST: mean and standard deviation over 5 repeats. Where the poster gives none (CAS but
# for the first two), it is that of the five repeats in the project's public logs (data/mnist_cvae_data.md).
PAPER: dict[str, dict[str, tuple[float, float]]] = {
    "local": {"cas": (89.03, 0.33)},
    "IID": {"cas": (87.09, 0.17), "without": (87.08, 1.03), "with": (93.92, 0.28)},
    "a100": {"cas": (87.48, 0.52), "without": (83.78, 5.32), "with": (93.80, 0.33)},
    "a10": {"cas": (86.77, 0.32), "without": (81.70, 8.91), "with": (93.85, 0.16)},
    "a1": {"cas": (86.87, 0.56), "without": (85.87, 2.87), "with": (93.59, 0.26)},
    "a0.1": {"cas": (84.38, 0.30), "without": (41.35, 15.28), "with": (88.24, 2.43)},
    "a0.01": {"cas": (60.65, 1.16), "without": (22.52, 5.24), "with": (57.45, 6.67)},
}
TITLES = {"cas": "CAS", "without": "FedAvg alone", "with": "pre-trained"}
Runs = dict[tuple[str, str], dict[int, dict[str, Any]]]


def finished(outputs: Iterable[Path]) -> Runs:
    """Summaries of finished runs by (partition, with or without or initialise) and seed."""
    found: Runs = {}
    for file in sorted(file for output in outputs for file in output.glob("runs/*/*/summary.json")):
        folder = RunFolder(file.parent)
        if folder.finished():
            summary = folder.summary()
            partition, kind = summary["label"].split()
            found.setdefault((partition, kind), {})[summary["seed"]] = summary
    return found


def pretrained(runs: Runs, partition: str) -> list[dict[str, Any]]:
    """By seed: whole runs, and those that only initialise."""
    both = runs.get((partition, "initialise"), {}) | runs.get((partition, "with"), {})
    return [run for _, run in sorted(both.items())]


def text(values: Sequence[float]) -> str:
    """Mean, spread and number of repeats."""
    if not values:
        return "–"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({len(values)})"


def verdict(values: Sequence[float], paper: tuple[float, float]) -> str:
    """Whether the mean is within two of the poster's standard deviations, or 2 points, the larger."""
    if not values:
        return ""
    allowed = max(2.0, 2 * paper[1])
    off = statistics.fmean(values) - paper[0]
    return f"{off:+.2f}" + ("" if abs(off) <= allowed else f" (beyond {allowed:.1f})")


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """As Markdown: names to the left, numbers to the right."""
    for line in (header, ["---"] + ["---:"] * (len(header) - 1), *lines):
        print(f"| {' | '.join(line)} |")


def main() -> None:
    runs = finished(Path(name) for name in sys.argv[1:])
    scores = {name: [run["cas"] for run in pretrained(runs, name) if "cas" in run] for name in PAPER}
    parts = ("poster", "here", "off by")
    lines = []
    for partition, cells in PAPER.items():
        line = [partition]
        for kind in TITLES:
            if kind not in cells:
                line += ["", "", ""]
                continue
            given = runs.get((partition, kind), {}).values()
            own = scores[partition] if kind == "cas" else [100 * run["final_accuracy"] for run in given]
            mean, spread = cells[kind]
            line += [f"{mean:.2f} ± {spread:.2f}", text(own), verdict(own, cells[kind])]
        lines.append(line)
    table(["partition", *(f"{title}: {part}" for title in TITLES.values() for part in parts)], lines)
    print("\nOn the 10,000 test images:\n")
    lines = []
    for partition in PAPER:
        before = [100 * run["pretrained_accuracy"] for run in pretrained(runs, partition)]
        cells = (runs.get((partition, kind), {}).values() for kind in ("without", "with"))
        alone, after = ([100 * run["clean_accuracy"] for run in cell] for cell in cells)
        lines.append([partition, text(alone), text(before), text(after)])
    table(["partition", "FedAvg alone", "pre-trained, before FedAvg", "after it"], lines)
    print("\nCAS, partition by partition (a seed each):\n")
    lines = [[name, ", ".join(f"{cas:.1f}" for cas in scores[name]) or "–"] for name in PAPER]
    table(["partition", "CAS"], lines)


if __name__ == "__main__":
    main()
