"""``fl-ray compare --jobs``: runs in processes of their own give what runs one after another give."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fl_ray.comparison import plan_comparison, run_comparison
from fl_ray.config import RunConfig
from fl_ray.errors import FlRayError, OutputError, SettingError
from fl_ray.progress import Progress
from fl_ray.recipes import to_dict
from fl_ray.run_folder import RunFolder, at_work


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
