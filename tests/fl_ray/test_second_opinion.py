"""experiments/fedlmg/second_opinion.py: the share that the other comparison's classifier of the same client takes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fl_ray.errors import OutputError
from fl_ray.finished_run import FinishedRun
from fl_ray.progress import Progress
from tests.conftest import TINY_GENERATOR, Call, small_recipe
from tests.fl_ray.test_one_shot import GUIDED, MODELS

SCRIPT = Path(__file__).parents[2] / "experiments" / "fedlmg" / "second_opinion.py"


def ended(monkeypatch: pytest.MonkeyPatch, *folders: str) -> Any:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *folders])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return end.value.code


def test_the_table(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    guided = {name.replace("__", "."): value for name, value in GUIDED.items() if name != "with_generator"}
    recipe = small_recipe() | {"generator": {**TINY_GENERATOR, "cache": "cache"}, "rounds": 1}
    recipe["data"] |= {"clients": 3}
    others = {"name": "ensemble", "client_models": MODELS[::-1]}
    for name, entries in {
        "digits": [{"label": "FedLMG", **guided}],
        "others": [{"label": "others", "method": others}],
        "elsewhere": [{"label": "others", "method": others, "data.partition.alpha": 0.1}],
    }.items():
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump({**recipe, "compare": entries}, sort_keys=False))
        done = call("compare", file.name, "--seeds", "0", "1", "--output", name)
        assert done.returncode == 0, done.stderr
    assert ended(monkeypatch, "digits", "others") == 0
    expected = []
    for seed in (0, 1):
        run = FinishedRun.open(tmp_path / "digits" / "runs" / "FedLMG" / f"seed{seed}")
        second = FinishedRun.open(tmp_path / "others" / "runs" / "others" / f"seed{seed}").uploads()
        images, labels = run.guided_images(run.uploads(), Progress(False))[1]
        x = (torch.from_numpy(images).float() / 255 - run.data.source.mean[0]) / run.data.source.std[0]
        with torch.no_grad():
            right = second[1](x).argmax(dim=1).numpy() == labels
        expected.append(100 * right.mean())
    cells = [
        cell.strip() for cell in (tmp_path / "digits" / "second_opinion.md").read_text().splitlines()[2].split("|")
    ]
    assert cells[1:3] == ["FedLMG", "2"]
    assert cells[6] == f"{np.mean(expected):.1f} ± {np.std(expected, ddof=1):.1f}"  # of client 1
    assert ended(monkeypatch, "others", "others") == 2
    assert "others has no finished FedLMG run" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "digits", "elsewhere"])
    with pytest.raises(OutputError, match="its clients have other images than those of"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
