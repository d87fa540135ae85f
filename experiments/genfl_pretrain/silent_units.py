"""How many ReLUs of runs' last models answer to no test image at all, and how long is the vector of all weights?

    fl-ray compare experiments/genfl_pretrain/cifar10_starts.yaml --seeds 0 1 2 --output runs/starts
    python experiments/genfl_pretrain/silent_units.py runs/starts/runs/*/*

A unit is a feature of a linear layer or a channel of a convolution; it is silent when it is 0 for every image (and
place), and then learns nothing from such images. Prints a Markdown table: a row for each label, means over its runs; a
column of each ReLU, in the order in which an image meets them, with the share of its units that are silent.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fl_ray.finished_run import FinishedRun
from fl_ray.model import ImageShape

_BATCH = 500


@torch.no_grad()
def silent_shares(module: nn.Module, batches: list[Tensor]) -> list[float]:
    """By ReLU: the share of its units that are 0 for all images [N, C, H, W]."""
    answers: dict[nn.Module, Tensor] = {}

    def look(relu: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        answered = (out > 0).transpose(0, 1).flatten(1).any(dim=1)
        answers[relu] = answers.get(relu, torch.zeros_like(answered)) | answered

    hooks = [part.register_forward_hook(look) for part in module.modules() if isinstance(part, nn.ReLU)]
    module.eval()
    for images in batches:
        module(images)
    for hook in hooks:
        hook.remove()
    return [1.0 - float(answered.float().mean()) for answered in answers.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="folders of finished runs with one model")
    torch.set_num_threads(1)
    found: dict[str, list[list[float]]] = defaultdict(list)
    for folder in parser.parse_args().runs:
        run = FinishedRun.open(folder)
        module = run.load(run.folder.path / "model.safetensors", run.config.model)
        images = ImageShape.of(run.data.source).normalise(run.data.test_images, torch.device("cpu"))
        length = sum(float(weight.detach().square().sum()) for weight in module.parameters()) ** 0.5
        accuracy = 100 * run.folder.history()[-1]["test_accuracy"]
        shares = silent_shares(module, list(images.split(_BATCH)))
        found[run.folder.begun()["label"]].append([accuracy, length, *(100 * share for share in shares)])
    relus = len(next(iter(found.values()))[0]) - 2
    titles = ["accuracy [%]", "length of all weights", *(f"silent in ReLU {n + 1} [%]" for n in range(relus))]
    print(f"| run | runs | {' | '.join(titles)} |")
    print(f"| --- |{' ---: |' * (1 + len(titles))}")
    for label, rows in found.items():
        print(f"| {label} | {len(rows)} | {' | '.join(f'{value:.1f}' for value in np.mean(rows, axis=0))} |")


if __name__ == "__main__":
    main()
