"""Files that settings name: a run that goes on, and a comparison that keeps finished runs, must find them unchanged."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from fl_ray.config import RunConfig
from fl_ray.input_files import input_files
from fl_ray.recipes import make_config
from fl_ray.runtime.in_process import InProcessRuntime
from tests.conftest import Call, small_recipe


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump({**small_recipe(), "rounds": 1, **changes}))
    return path


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_comparison_refuses_weights_that_were_replaced(call: Call, tmp_path: Path, jobs: str) -> None:
    for seed in ("0", "1"):
        write(tmp_path / "first.yaml")
        assert call("run", "first.yaml", "--seed", seed, "--output", f"first{seed}").returncode == 0
    shutil.copy(tmp_path / "first0" / "model.safetensors", tmp_path / "start.safetensors")
    model = {"name": "mlp", "hidden": [16], "start": "start.safetensors"}
    write(tmp_path / "second.yaml", model=model, compare=[{"label": "a"}, {"label": "b", "rounds": 2}])
    command = ("compare", "second.yaml", "--seeds", "0", "--output", "compared", "--jobs", jobs)
    done = call(*command)
    assert done.returncode == 0, done.stderr
    assert call(*command).returncode == 0
    shutil.copy(tmp_path / "first1" / "model.safetensors", tmp_path / "start.safetensors")
    refused = call(*command)
    assert refused.returncode == 2
    assert "with another content of start.safetensors; bring that back, or begin anew" in refused.stderr


def test_a_run_that_goes_on_refuses_them_too(tmp_path: Path, run_cut_at_its_end: Any, call: Call) -> None:
    write(tmp_path / "first.yaml")
    assert call("run", "first.yaml", "--output", "first").returncode == 0
    start = tmp_path / "start.safetensors"
    shutil.copy(tmp_path / "first" / "model.safetensors", start)
    config = make_config(small_recipe() | {"rounds": 1, "model": {"name": "mlp", "hidden": [16], "start": str(start)}})
    for folder in ("kept", "replaced"):
        with InProcessRuntime() as runtime:
            run_cut_at_its_end(config, tmp_path / folder, runtime)
    assert call("run", "--resume", str(tmp_path / "kept")).returncode == 0
    shutil.copy(tmp_path / "kept" / "model.safetensors", start)
    refused = call("run", "--resume", str(tmp_path / "replaced"))
    assert refused.returncode == 2
    assert "another content of" in refused.stderr


def test_which_files_count(tmp_path: Path) -> None:
    for name in ("server", "client", "curve", "speeds"):
        (tmp_path / name).write_text(name)
    path = {name: str(tmp_path / name) for name in ("server", "client", "curve", "speeds", "missing")}
    config: RunConfig = make_config(
        {
            "model": {"name": "mlp", "start": path["server"]},
            "method": {
                "name": "ensemble",
                "client_models": [{"name": "mlp", "start": path["client"]}, {"name": "mlp"}],
            },
            "allocation": {"curve": path["curve"]},
            "fleet": {"trace": {"capacity": path["speeds"], "availability": path["missing"]}},
        }
    )
    found = input_files(config)
    assert list(found) == [path[name] for name in ("server", "client", "curve", "speeds")]
    assert len(set(found.values())) == 4
    assert input_files(make_config({})) == {}
