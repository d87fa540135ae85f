"""experiments/fedlmg/guidance_table.py: seconds of who they are, and of how many runs a number is."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from tests.conftest import Call, small_recipe
from tests.fl_ray.test_one_shot import GUIDED

SCRIPT = Path(__file__).parents[2] / "experiments" / "fedlmg" / "guidance_table.py"


def crossed_of(folder: Path) -> list[float]:
    files = [folder / "out" / "runs" / "FedLMG" / f"seed{seed}" / "summary.json" for seed in (0, 1)]
    return [json.loads(file.read_text())["guided_synthesis"]["cross_entropy_last"] for file in files]


def test_the_table(call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    guided = {name.replace("__", "."): value for name, value in GUIDED.items() if name != "with_generator"}
    recipe = small_recipe() | {"generator": {"name": "diffusion", "widths": [8], "train_steps": 3, "steps": 2}}
    recipe |= {"rounds": 1, "data": {**recipe["data"], "clients": 3}}
    recipe["compare"] = [
        {"label": "FedLMG", **guided},
        {"label": "public only", "method": {"name": "public_only", "server_epochs": 1}},
        {"label": "FedAvg"},
    ]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    done = call("compare", "r.yaml", "--seeds", "0", "1", "--output", "out", "--generator.cache", "cache")
    assert done.returncode == 0, done.stderr
    summaries = {}
    for label in ("FedLMG", "public_only", "FedAvg"):
        file = tmp_path / "out" / "runs" / label / "seed0" / "summary.json"
        summaries[label] = json.loads(file.read_text())
    cached = tmp_path / "out" / "runs" / "FedLMG" / "seed1" / "summary.json"
    found = json.loads(cached.read_text())
    for name in ("loss_first", "loss_last"):
        found["guided_synthesis"].pop(name)  # as where all images were in the cache
    cached.write_text(json.dumps(found))
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert ended.value.code == 0
    lines = (tmp_path / "out" / "guidance.md").read_text().splitlines()
    columns = [cell.strip() for cell in lines[0].strip("|").split("|")]
    rows = {}
    for line in lines[2:]:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[cells[0]] = dict(zip(columns, cells, strict=True))
    files = [tmp_path / "out" / "runs" / "public_only" / f"seed{seed}" / "summary.json" for seed in (0, 1)]
    public = [100 * json.loads(file.read_text())["final_accuracy"] for file in files]
    assert rows["public only"]["final accuracy [%]"] == f"{np.mean(public):.2f} ± {np.std(public, ddof=1):.2f}"
    assert rows["FedLMG"]["loss, first"] == f"{summaries['FedLMG']['guided_synthesis']['loss_first']:.2f} (1 of 2)"
    crossed = summaries["FedLMG"]["guided_synthesis"]["cross_entropy_last"]
    assert rows["FedLMG"]["of it L_CE, last"].split()[0] == f"{np.mean(crossed_of(tmp_path)):.2f}"
    assert 0 < crossed < summaries["FedLMG"]["guided_synthesis"]["loss_last"]
    assert "another of the domain [%]" not in columns  # the digits have no domains
    assert "of 2" not in rows["FedLMG"]["own classifier [%]"]
    assert rows["public only"]["clients' training [s]"] == rows["public only"]["loss, first"] == "–"
    assert rows["FedAvg"]["clients' training [s]"] != "–"

    table = runpy.run_path(str(SCRIPT), run_name="table")
    own = summaries["FedLMG"]
    wall, trained = own["wall_s"], own["client_models"]["train_seconds"]
    assert table["server_seconds"](own) == pytest.approx(wall["train"] + wall["aggregate"] - trained)
    assert 0 < table["server_seconds"](own) < wall["train"] + wall["aggregate"]
    assert table["clients_seconds"](summaries["FedAvg"]) == summaries["FedAvg"]["wall_s"]["train"]
    assert table["server_seconds"](summaries["FedAvg"]) == pytest.approx(summaries["FedAvg"]["wall_s"]["aggregate"])
    public = summaries["public_only"]["wall_s"]
    assert table["server_seconds"](summaries["public_only"]) == public["train"] + public["aggregate"]
