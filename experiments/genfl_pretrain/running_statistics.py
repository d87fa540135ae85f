"""Do the averaged running statistics of a run's last model fit what its batch norms see?

    fl-ray run experiments/genfl_pretrain/mnist.yaml --rounds 7 --method.cas_epochs 0 --output runs/round-7 \\
        --data.partition.name dirichlet --data.partition.alpha 100 --data.partition.min_samples 40
    python experiments/genfl_pretrain/running_statistics.py runs/round-7

FedAvg averages the running means and variances of clients' models, whose weights differ. Prints a Markdown table of the
accuracy on the test images: as the model is; with the statistics of a batch of 500 in all batch norms; and with those
in one batch norm alone, beside the largest ratio of a channel's variance and its running variance, either way.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from fl_ray.finished_run import FinishedRun
from fl_ray.model import ImageShape

_BATCH = 500


@torch.no_grad()
def accuracy(module: nn.Module, images: Tensor, labels: Tensor, by_batch: set[str]) -> float:
    """With a batch's statistics in the named batch norms, the running ones elsewhere; both are left as they were."""
    module.eval()
    for name in by_batch:
        norm = module.get_submodule(name).train()
        norm.momentum = 0.0
    pieces = zip(images.split(_BATCH), labels.split(_BATCH), strict=True)
    right = sum(int((module(x).argmax(dim=1) == y).sum()) for x, y in pieces)
    return right / len(labels)


@torch.no_grad()
def variance_ratios(module: nn.Module, images: Tensor) -> dict[str, float]:
    """By batch norm: of its channels, the largest ratio of the variance on ``images`` and the running one."""
    found: dict[str, float] = {}

    def look(name: str, norm: nn.BatchNorm2d, x: Tensor) -> None:
        ratio = (x.var(dim=(0, 2, 3)) / norm.running_var).log().abs().max().exp()
        found[name] = float(ratio)

    hooks = [
        part.register_forward_pre_hook(lambda norm, given, name=name: look(name, norm, given[0]))
        for name, part in module.named_modules()
        if isinstance(part, nn.BatchNorm2d)
    ]
    module.eval()
    module(images)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run")
    torch.set_num_threads(1)
    run = FinishedRun.open(parser.parse_args().run)
    module = run.load(run.folder.path / "model.safetensors", run.config.model)
    data, shape = run.data, ImageShape.of(run.data.source)
    images = shape.normalise(data.test_images, torch.device("cpu"))
    labels = torch.from_numpy(data.test_labels)
    ratios = variance_ratios(module, images[: 10 * _BATCH])
    print("| a batch's statistics in | accuracy [%] | largest ratio of variances |")
    print("| --- | ---: | ---: |")
    for title, names in (("none", set[str]()), ("all", set(ratios)), *((name, {name}) for name in ratios)):
        ratio = f"{ratios[title]:.2f}" if title in ratios else ""
        print(f"| {title} | {100 * accuracy(module, images, labels, names):.1f} | {ratio} |", flush=True)


if __name__ == "__main__":
    main()
