"""L_BN of the images that each client has guided, beside that of its own images, over seeds.

    fl-ray compare experiments/fedlmg/norm_weight.yaml --seeds 0 1 2 --output runs/fedlmg-norm-weight
    python experiments/fedlmg/norm_distances.py runs/fedlmg-norm-weight

Reads the finished FedLMG runs of a comparison, and their images from the generator's cache; writes norm_distances.md
into its folder. A distance is a single image's (in rows with ``statistics: batch``, too), summed over the batch norms
of the client's own classifier; classifiers without batch norms are left out.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from fl_ray.commands.reports import run_folders
from fl_ray.finished_run import FinishedRun
from fl_ray.guides import guide_of
from fl_ray.model import ImageShape
from fl_ray.progress import Progress
from fl_ray.report.comparison_report import markdown_table
from fl_ray.summary import values_text
from generators.guidance.losses import ClassifierGuide

_AT_ONCE = 100
_ANY_WEIGHT = 1.0  # the distance itself does not depend on it


@torch.no_grad()
def mean_distance(guide: ClassifierGuide, images: np.ndarray) -> float:
    """L_BN, unweighted, of images uint8 [N, C, H, W]: the mean over them."""
    pieces = [torch.from_numpy(images[start : start + _AT_ONCE]) for start in range(0, len(images), _AT_ONCE)]
    return float(torch.cat([guide.look(piece.float() / 255)[1] for piece in pieces]).mean())


def distances(run: FinishedRun) -> dict[str, tuple[float, float]]:
    """Of each client's own training images and of those that it has guided, by the client's name."""
    found, uploads = {}, run.uploads()
    guided = run.guided_images(uploads, Progress())
    for client, classifier in uploads.items():
        guide = guide_of(classifier, ImageShape.of(run.data.source), _ANY_WEIGHT, "image")
        if guide.has_norms:
            own = run.data.images[run.data.partition.of(client)]
            found[run.data.client_name(client)] = mean_distance(guide, own), mean_distance(guide, guided[client][0])
    return found


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    found: dict[str, list[dict[str, tuple[float, float]]]] = {}
    for run_folder in run_folders(folder):
        if run_folder.finished() and run_folder.config().method.name == "fedlmg":
            run = FinishedRun.open(run_folder.path)
            found.setdefault(run_folder.summary()["label"], []).append(distances(run))
    if not any(seed for seeds in found.values() for seed in seeds):
        print(f"{folder} has no finished FedLMG run whose clients have batch norms", file=sys.stderr)
        return 2
    clients = sorted({client for seeds in found.values() for seed in seeds for client in seed})

    def cells(seeds: list[dict[str, tuple[float, float]]], which: int) -> list[str]:
        return [values_text([seed[client][which] for seed in seeds if client in seed], 1) for client in clients]

    rows, judged_by = [], []  # rows of one comparison may have the same classifiers
    for label, seeds in found.items():
        own = cells(seeds, 0)
        if own not in judged_by:
            judged_by.append(own)
            rows.append([f"clients' own, under the classifiers of {label}", str(len(seeds)), *own])
        rows.append([label, str(len(seeds)), *cells(seeds, 1)])
    text = markdown_table(["images", "seeds", *clients], rows)
    (folder / "norm_distances.md").write_text(text, encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
