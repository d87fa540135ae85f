"""``fl-ray compare --jobs``: runs in processes of their own give what runs one after another give."""

import contextlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fl_ray import comparison as comparison_module
from fl_ray import run_folder
from fl_ray.comparison import plan_comparison, run_comparison
from fl_ray.config import RunConfig
from fl_ray.errors import FlRayError, OutputError, SettingError
from fl_ray.progress import Progress
from fl_ray.recipes import make_config, to_dict
from fl_ray.run_folder import RunFolder, at_work
from tests.conftest import Call


@pytest.fixture
def recipe(small: Callable[..., RunConfig]) -> dict[str, Any]:
    content = to_dict(small())
    content["compare"] = [{"label": "one"}, {"label": "two", "training.lr": 0.3}]
    return content


def test_two_at_a_time_equal_one_after_another(
    recipe: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    comparison = plan_comparison([recipe], {}, [0])
    run_comparison(comparison, tmp_path / "apart", Progress(), jobs=2)
    run_comparison(comparison, tmp_path / "one", Progress(False))
    for label in ("one", "two"):
        mine, its = (RunFolder(tmp_path / where / "runs" / label / "seed0") for where in ("apart", "one"))
        assert mine.finished()
        assert mine.summary()["label"] == label
        left, right = (load_file(folder / "model.safetensors") for folder in (mine, its))
        assert all(torch.equal(value, right[name]) for name, value in left.items())
    assert "2/2 two, seed 0: finished after" in capfd.readouterr().err
    run_comparison(comparison, tmp_path / "apart", Progress(), jobs=2)  # nothing left to do
    assert "2 of 2 runs were finished before" in capfd.readouterr().err


def test_a_run_that_fails_does_not_take_the_others_along(recipe: dict[str, Any], tmp_path: Path) -> None:
    bad = {"model": {"name": "tests.fl_ray.own:RaisesOnNine"}, "clients_per_round": 6, "runtime.min_clients": 6}
    recipe["compare"].append({"label": "bad", **bad})
    recipe = yaml.safe_load(yaml.safe_dump(recipe))
    comparison = plan_comparison([recipe], {}, [0])
    with pytest.raises(FlRayError, match=r"1 of 3 runs failed: 3/3 bad, seed 0; .*log\.txt"):
        run_comparison(comparison, tmp_path / "out", Progress(False), jobs=2)
    assert RunFolder(tmp_path / "out" / "runs" / "two" / "seed0").finished()


def test_nor_does_one_that_is_refused_where_they_run_one_after_another(recipe: dict[str, Any], tmp_path: Path) -> None:
    recipe["compare"].insert(0, {"label": "late", "data.partition": {"name": "natural"}})  # seen when data are there
    comparison = plan_comparison([yaml.safe_load(yaml.safe_dump(recipe))], {}, [0])
    with pytest.raises(FlRayError, match=r"1 of 3 runs failed: 1/3 late, seed 0; the first: .*has no owners"):
        run_comparison(comparison, tmp_path / "out", Progress(False))
    assert RunFolder(tmp_path / "out" / "runs" / "two" / "seed0").finished()
    alone = plan_comparison([{**recipe, "compare": recipe["compare"][:1]}], {}, [0])
    with pytest.raises(SettingError, match="has no owners"):
        run_comparison(alone, tmp_path / "alone", Progress(False))


@pytest.mark.parametrize("busy", ["out", "out/runs/two/seed0"])
def test_a_comparison_is_refused_where_another_process_is_at_work(
    recipe: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str], busy: str
) -> None:
    """At the comparison itself, or at a run of it, as ``fl-ray run --resume``."""
    output = tmp_path / "out"
    comparison = plan_comparison([recipe], {}, [0])
    run_comparison(plan_comparison([{**recipe, "compare": recipe["compare"][:1]}], {}, [0]), output, Progress(False))
    program = (
        "import sys, time; from pathlib import Path; from fl_ray.run_folder import at_work\n"
        "with at_work(Path(sys.argv[1])): print('at work', flush=True); time.sleep(600)"
    )
    command = [sys.executable, "-c", program, str(tmp_path / busy)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout is not None
            assert other.stdout.readline() == "at work\n"
            with pytest.raises(OutputError, match=f"{busy}: another process is at work in this folder"):
                run_comparison(comparison, output, Progress(False))
            assert not (output / "runs" / "two" / "seed0").exists()
        finally:
            other.kill()
    capfd.readouterr()
    run_comparison(comparison, output, Progress())  # the lock of one that was killed is free
    assert "1 of 2 runs were finished before" in capfd.readouterr().err
    assert RunFolder(output / "runs" / "two" / "seed0").finished()
    assert not list(tmp_path.rglob("*.lock"))


def test_one_process_is_at_work_in_a_folder(tmp_path: Path) -> None:
    with at_work(tmp_path / "x"), pytest.raises(OutputError, match="another process"), at_work(tmp_path / "x"):
        pass
    assert not list(tmp_path.iterdir())
    with at_work(Path("/sys/kernel")), at_work(Path("/sys/kernel")):  # as a container's mount: no lock can be beside it
        pass


def test_run_and_its_resumption_are_refused_where_another_process_is_at_work(
    recipe: dict[str, Any], tmp_path: Path, call: Call
) -> None:
    del recipe["compare"]
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    RunFolder(tmp_path / "begun").path.mkdir()
    RunFolder(tmp_path / "begun").begin(make_config(recipe), "begun", {}, {})
    for words in (["run", str(tmp_path / "r.yaml"), "--output"], ["run", "--resume"]):
        folder = tmp_path / ("new" if "--output" in words else "begun")
        with at_work(folder):
            called = call(*words, str(folder))
        assert called.returncode == 2
        assert f"{folder}: another process is at work" in called.stderr
    assert not (tmp_path / "new").exists()
    assert not RunFolder(tmp_path / "begun").finished()


def test_what_another_process_finishes_meanwhile_is_not_run_again(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    """It has no checkpoint any more: to go on with it would be to begin anew over its results."""
    comparison = plan_comparison([recipe], {}, [0])
    run_comparison(comparison, tmp_path / "first", Progress(False))
    done, folder = (tmp_path / where / "runs" / "two" / "seed0" for where in ("first", "out"))
    before = (done / "summary.json").read_text()

    @contextlib.contextmanager
    def after_the_other(path: Path) -> Iterator[None]:
        if path == folder:
            shutil.copytree(done, path, dirs_exist_ok=True)
        with at_work(path):
            yield

    monkeypatch.setattr(comparison_module, "at_work", after_the_other)
    run_comparison(comparison, tmp_path / "out", Progress(False))
    assert (folder / "summary.json").read_text() == before
    (folder / "summary.json").unlink()
    monkeypatch.setattr(run_folder, "at_work", after_the_other)
    called = call("run", "--resume", str(folder))
    assert called.returncode == 2
    assert f"--resume {folder}: the run is finished" in called.stderr
    assert (folder / "summary.json").read_text() == before
    assert RunFolder(folder).history()
