"""What guidance did and brought, over seeds: accuracy, the guide's loss, who recognises the images, seconds and bytes.

    fl-ray compare experiments/fedlmg/digit_domains.yaml --seeds 0 1 2 --output runs/fedlmg-digits
    python experiments/fedlmg/guidance_table.py runs/fedlmg-digits

Reads the finished runs of a comparison; writes guidance.md into its folder. Losses and seconds of images are those of
the run that made them: rows that share images find them in the cache, and show a dash, or how many runs their numbers
are of. Columns of dashes alone are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fl_ray.commands.reports import run_folders
from fl_ray.comparison import rows_of_runs
from fl_ray.report.comparison_report import markdown_table
from fl_ray.summary import values_text

Summary = dict[str, Any]


def _of(part: str, name: str, factor: float = 1.0) -> Callable[[Summary], float]:
    def of(summary: Summary) -> float:
        value = (summary.get(part) or {}).get(name)
        return np.nan if value is None else factor * value

    return of


def _seconds_per_image(part: str) -> Callable[[Summary], float]:
    def of(summary: Summary) -> float:
        made = summary.get(part) or {}
        return made["sampling_seconds"] / made["images_made"] if made.get("images_made") else np.nan

    return of


def clients_seconds(summary: Summary) -> float:
    """Of the clients' training, when it was done; not a number where no client trained."""
    if summary["bytes_up"] == 0:
        return np.nan
    return _of("client_models", "train_seconds")(summary) if "client_models" in summary else summary["wall_s"]["train"]


def server_seconds(summary: Summary) -> float:
    """Of the server's training and aggregation; images are not in it."""
    wall, clients = summary["wall_s"], clients_seconds(summary)
    return wall["train"] + wall["aggregate"] - (0.0 if np.isnan(clients) else clients)


COLUMNS: dict[str, tuple[Callable[[Summary], float], int]] = {
    "final accuracy [%]": (lambda summary: 100 * summary["final_accuracy"], 2),
    "loss, first": (_of("guided_synthesis", "loss_first"), 2),
    "loss, last": (_of("guided_synthesis", "loss_last"), 2),
    "of it L_CE, first": (_of("guided_synthesis", "cross_entropy_first"), 2),
    "of it L_CE, last": (_of("guided_synthesis", "cross_entropy_last"), 2),
    "own classifier [%]": (_of("guided_accuracy", "own_classifier", 100), 1),
    "another of the domain [%]": (_of("guided_accuracy", "other_classifiers_of_the_domain", 100), 1),
    "all others [%]": (_of("guided_accuracy", "other_classifiers", 100), 1),
    "guided [s/image]": (_seconds_per_image("guided_synthesis"), 3),
    "unguided [s/image]": (_seconds_per_image("synthesis"), 3),
    "clients' training [s]": (clients_seconds, 0),
    "server's [s]": (server_seconds, 0),
    "uploads [MB]": (lambda summary: summary["bytes_up"] / 1e6, 2),
}


def _text(values: list[float], digits: int) -> str:
    """Mean and spread, and of how many runs where some have no such number."""
    there = int(np.isfinite(values).sum())
    some = f" ({there} of {len(values)})" if 0 < there < len(values) else ""
    return values_text(values, digits) + some


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    output = Path(sys.argv[1])
    rows, by_label, _ = rows_of_runs(run_folders(output))
    summaries = {row["label"]: [folder.summary() for folder in by_label[row["label"]]] for row in rows}
    values = {
        name: {label: [of(summary) for summary in runs] for label, runs in summaries.items()}
        for name, (of, _) in COLUMNS.items()
    }
    shown = [name for name, found in values.items() if any(np.isfinite(each).any() for each in found.values())]
    body = [[label, *(_text(values[name][label], COLUMNS[name][1]) for name in shown)] for label in summaries]
    text = markdown_table(["run", *shown], body)
    (output / "guidance.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
