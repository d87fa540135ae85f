"""What a second classifier of the same client takes its images for, over seeds: guided, and as plainly sampled.

    fl-ray compare experiments/fedlmg/digit_domains.yaml --seeds 0 1 2 --output runs/fedlmg-digits
    fl-ray compare experiments/fedlmg/other_classifiers.yaml --seeds 0 1 2 --output runs/fedlmg-others
    python experiments/fedlmg/second_opinion.py runs/fedlmg-digits runs/fedlmg-others

Reads the finished runs of both comparisons, and the images from the generator's cache; writes second_opinion.md into
the first one's folder. The second classifiers are of other kinds, and have learned from the same images of the client.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from fl_ray.commands.reports import run_folders
from fl_ray.errors import OutputError
from fl_ray.finished_run import FinishedRun
from fl_ray.model import ImageShape
from fl_ray.progress import Progress
from fl_ray.report.comparison_report import markdown_table
from fl_ray.summary import values_text


@torch.no_grad()
def recognised(run: FinishedRun, other: FinishedRun) -> dict[str, float]:
    """The share of each client's images that its second classifier takes for their class, by the client's name.

    Raises:
        OutputError: the runs' clients have other images.
    """
    if run.data.partition.digest() != other.data.partition.digest():
        raise OutputError(f"{other.folder.path}: its clients have other images than those of {run.folder.path}")
    shape, second = ImageShape.of(run.data.source), other.uploads()
    found = {}
    for client, (images, labels) in run.guided_images(run.uploads(), Progress()).items():
        taken = second[client](shape.normalise(images, torch.device("cpu"))).argmax(dim=1).numpy()
        found[run.data.client_name(client)] = float((taken == labels).mean())
    return found


def main() -> int:
    if len(sys.argv) != 3:
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    opened = [FinishedRun.open(folder.path) for folder in run_folders(Path(sys.argv[2]))]
    others = {run.config.seed: run for run in opened}
    found: dict[str, list[dict[str, float]]] = {}
    by_guide: dict[str, list[float]] = {}
    for folder in run_folders(Path(sys.argv[1])):
        config = folder.config()
        if config.method.name == "fedlmg" and config.seed in others:
            run, summary = FinishedRun.open(folder.path), folder.summary()
            found.setdefault(summary["label"], []).append(recognised(run, others[config.seed]))
            by_guide.setdefault(summary["label"], []).append(summary["guided_accuracy"]["own_classifier"])
    if not found:
        print(f"{sys.argv[1]} has no finished FedLMG run with a seed of {sys.argv[2]}", file=sys.stderr)
        return 2
    clients = list(next(iter(found.values()))[0])
    rows = []
    for label, seeds in found.items():
        columns = [by_guide[label], [float(np.mean(list(seed.values()))) for seed in seeds]]
        columns += [[seed[client] for seed in seeds] for client in clients]
        rows.append([label, str(len(seeds)), *(values_text([100 * share for share in own], 1) for own in columns)])
    shares = ["the guide", "a second classifier of the client", *clients]
    text = markdown_table(["run", "seeds", *(f"{name} [%]" for name in shares)], rows)
    (Path(sys.argv[1]) / "second_opinion.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
