"""experiments/genfl_pretrain/running_statistics.py: what averaged running statistics do to a run's last model."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from fl_ray.experiment import Experiment

SCRIPT = Path(__file__).parents[2] / "experiments" / "genfl_pretrain" / "running_statistics.py"
NORMED = {"name": "small_cnn", "width": 4, "hidden": 16, "batch_norm": True}


def test_a_batch_norm_that_nothing_fits_is_found(
    run_small: Callable[..., tuple[Experiment, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment, summary = run_small(model=NORMED, training__lr=0.1, rounds=4)
    file = experiment.folder.path / "model.safetensors"

    def told() -> dict[str, tuple[float, str]]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(experiment.folder.path)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
        rows = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
        return {row[0]: (float(row[1]), row[2] if len(row) > 2 else "") for row in rows}

    before = told()
    assert before["none"][0] == pytest.approx(100 * summary["final_accuracy"], abs=0.051)
    first, *others = (name for name in before if name not in ("none", "all"))
    assert others
    state = load_file(file)
    variance = next(name for name in state if name.startswith(first) and name.endswith("running_var"))
    state[variance] = state[variance] * torch.tensor([1.0, 1.0, 400.0, 1.0])
    save_file(state, file)
    after = told()
    assert float(after[first][1]) == pytest.approx(400, rel=0.5)
    assert after["all"] == before["all"]
    assert after["none"] != before["none"]
    assert after[first][0] == before[first][0]  # the batch's own take the place of what was spoilt


def test_variance_ratios_by_hand() -> None:
    ratios = runpy.run_path(str(SCRIPT))["variance_ratios"]
    net = nn.Sequential(nn.BatchNorm2d(3))
    net[0].running_var = torch.tensor([0.5, 2.0, 4.0])
    x = torch.randn(200, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    x = (x - x.mean(dim=(0, 2, 3), keepdim=True)) / x.std(dim=(0, 2, 3), keepdim=True)  # variances of 1
    assert ratios(net, x) == pytest.approx({"0": 4.0}, rel=1e-3)
