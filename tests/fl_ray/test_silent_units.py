"""experiments/genfl_pretrain/silent_units.py: which ReLUs of a run's last model answer to no image."""

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

SCRIPT = Path(__file__).parents[2] / "experiments" / "genfl_pretrain" / "silent_units.py"
CNN = {"name": "small_cnn", "width": 4, "hidden": 16}


def test_units_whose_bias_is_far_below_0_are_silent_and_no_others(
    run_small: Callable[..., tuple[Experiment, dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    experiment, summary = run_small(model=CNN, rounds=1)
    file = experiment.folder.path / "model.safetensors"
    state = load_file(file)
    hidden = next(name for name, value in state.items() if value.shape == (16,))
    for count, share in ((16, "100.0"), (4, "25.0"), (0, "0.0")):
        state[hidden] = torch.full((16,), 1e6)
        state[hidden][:count] = -1e6
        save_file(state, file)
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(experiment.folder.path)])
        capsys.readouterr()
        runpy.run_path(str(SCRIPT), run_name="__main__")
        title, _, row = (line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines())
        assert len(title) == len(row)
        assert float(row[2]) == pytest.approx(100 * summary["final_accuracy"], abs=0.051)
        assert float(row[3]) == pytest.approx(4e6, rel=1e-3)
        assert row[-1] == share


def test_silent_shares_by_hand() -> None:
    """A unit that answers to one image of one batch, or at one place, is not silent."""
    shares = runpy.run_path(str(SCRIPT))["silent_shares"]
    net = nn.Sequential(
        nn.Conv2d(1, 4, 1, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2, bias=False), nn.ReLU()
    )
    net[0].weight.data = torch.tensor([1.0, -1.0, 0.0, 2.0]).reshape(4, 1, 1, 1)
    net[3].weight.data = torch.stack([torch.ones(16), -torch.ones(16)])
    image = torch.tensor([0.0, 3.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
    assert shares(net, [torch.zeros(1, 1, 2, 2), image]) == [0.5, 0.5]
    assert shares(net, [image, -image]) == [0.25, 0.5]
