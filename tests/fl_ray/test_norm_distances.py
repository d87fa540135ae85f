"""experiments/fedlmg/norm_distances.py: how far images lie from what each client's batch norms have seen."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor, nn

from fl_ray.finished_run import FinishedRun
from fl_ray.progress import Progress
from tests.conftest import TINY_GENERATOR, Call, small_recipe

SCRIPT = Path(__file__).parents[2] / "experiments" / "fedlmg" / "norm_distances.py"
NORMED = {"name": "small_cnn", "width": 4, "hidden": 16, "batch_norm": True}


def ended(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def plain_distance(module: nn.Module, x: Tensor) -> float:
    """For each image and batch norm, of the input alone: ||var - running var|| + ||mean - running mean||."""
    total = torch.zeros(len(x))

    def add(layer: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        for row, image in enumerate(inputs[0]):
            places = image.reshape(len(image), -1)
            mean, variance = places.mean(dim=1), places.var(dim=1, correction=0)
            total[row] += (variance - layer.running_var).square().sum().sqrt()
            total[row] += (mean - layer.running_mean).square().sum().sqrt()

    hooks = [layer.register_forward_pre_hook(add) for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    with torch.no_grad():
        module(x)
    for hook in hooks:
        hook.remove()
    return float(total.mean())


def test_the_table(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    recipe = small_recipe() | {"generator": {**TINY_GENERATOR, "sampler": "ddim", "steps": 4, "cache": "cache"}}
    recipe |= {"rounds": 1, "model": NORMED}
    recipe["data"] |= {"clients": 3}
    recipe["method"] = {
        "name": "fedlmg",
        "images_per_class": 2,
        "edits": 1,
        "eta": 0.1,
        "step_rule": "rms",
        "block_size": 2,
        "client_models": [NORMED, {"name": "mlp", "hidden": [16]}],
        "server": {"lr": 0.05, "batch_size": 16, "epochs": 1},
    }
    entries = [
        {"label": "some"},
        {"label": "none", "method.norm_weight": 0},
        {"label": "alike", "method.client_models": [NORMED]},
    ]
    (tmp_path / "weights.yaml").write_text(yaml.safe_dump({**recipe, "compare": entries}))
    done = call("compare", "weights.yaml", "--seeds", "0", "1", "--output", "weights")
    assert done.returncode == 0, done.stderr
    assert ended(monkeypatch, "weights") == 0
    lines = (tmp_path / "weights" / "norm_distances.md").read_text().splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert table[0] == ["images", "seeds", "client 0", "client 1", "client 2"]
    own = "clients' own, under the classifiers of {}"
    rows = {row[0]: row[1:] for row in table[2:]}
    assert list(rows) == [own.format("some"), "some", "none", own.format("alike"), "alike"]
    for label in ("some", "none", "alike"):
        for client in (0, 1, 2):
            expected: dict[str, list[float]] = {label: [], own.format(label): []}
            for seed in (0, 1):
                run = FinishedRun.open(tmp_path / "weights" / "runs" / label / f"seed{seed}")
                uploads = run.uploads()
                guided, _ = run.guided_images(uploads, Progress(False))[client]
                for name, images in zip(
                    expected, (guided, run.data.images[run.data.partition.of(client)]), strict=True
                ):
                    x = (torch.from_numpy(images).float() / 255 - run.data.source.mean[0]) / run.data.source.std[0]
                    expected[name].append(plain_distance(uploads[client], x))
            for name, values in expected.items():
                text = f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}"
                if label != "alike" and client == 1:
                    text = "–"  # its classifier has no batch norm
                if name in rows:
                    assert rows[name][client + 1] == text
            assert rows[label][0] == "2"
    assert ended(monkeypatch) == 2
    (tmp_path / "plain.yaml").write_text(yaml.safe_dump(recipe | {"method": {"name": "fedavg"}, "model": NORMED}))
    assert call("run", "plain.yaml", "--output", "plain").returncode == 0
    assert ended(monkeypatch, "plain") == 2
    assert "no finished FedLMG run whose clients have batch norms" in capsys.readouterr().err
