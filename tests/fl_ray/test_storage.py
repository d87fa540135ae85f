"""Outputs at addresses: mirrored while they grow, and gone on with from there, in memory and on a file system."""

from pathlib import Path

import fsspec
import pytest
import yaml

from fl_ray import storage
from fl_ray.errors import OutputError
from fl_ray.storage import Mirror, opened_output
from tests.conftest import Call


@pytest.fixture(params=["memory", "file"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}/out" if request.param == "memory" else f"file://{tmp_path}/there"


def names(address: str) -> set[str]:
    there, root = fsspec.core.url_to_fs(address)
    return {found[len(root) :].lstrip("/") for found in there.find(root)}


def test_what_changes_is_copied_and_what_goes_is_taken_away(address: str, tmp_path: Path) -> None:
    folder = tmp_path / "here"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "a.txt").write_text("one")
    (folder / "deep" / "er" / "b.txt").write_text("two")
    (folder / ".c.draft").write_text("half")
    mirror = Mirror(address, folder)
    assert mirror.push() == 2
    assert names(address) == {"a.txt", "deep/er/b.txt"}
    assert mirror.push() == 0
    (folder / "a.txt").write_text("another")
    (folder / "deep" / "er" / "b.txt").unlink()
    assert mirror.push() == 1
    assert names(address) == {"a.txt"}
    other = tmp_path / "other"
    other.mkdir()
    Mirror(address, other).pull()
    assert (other / "a.txt").read_text() == "another"


def test_a_copy_is_made_while_the_work_goes_on(address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import time

    monkeypatch.setattr(storage, "_EVERY_S", 0.05)
    with opened_output(address) as folder:
        (folder / "x").write_text("1")
        give_up = time.monotonic() + 10
        while "x" not in names(address):
            assert time.monotonic() < give_up
            time.sleep(0.02)
    assert not folder.exists()


def test_a_run_at_an_address_goes_on_from_there(address: str, tmp_path: Path, call: Call) -> None:
    recipe = {
        "name": "far",
        "data": {"name": "digits", "clients": 3, "max_samples": 300},
        "model": {"name": "mlp", "hidden": [8]},
        "runtime": {"backend": "in_process", "training_path": "plain"},
        "rounds": 4,
        "checkpoint": {"every": 1},
        "tracking": {"enabled": False},
        "compare": [{"label": "a"}, {"label": "b", "training.lr": 0.01}],
    }
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    whole = call("run", str(tmp_path / "far.yaml"), "--output", str(tmp_path / "near"))
    assert whole.returncode == 0, whole.stderr
    done = call("run", str(tmp_path / "far.yaml"), "--output", address)
    assert done.returncode == 0, done.stderr
    assert f"report: {address}/report.html" in done.stdout
    assert {"config.yaml", "history.csv", "summary.json", "model.safetensors", "report.html"} <= names(address)
    again = call("run", str(tmp_path / "far.yaml"), "--output", address)
    assert again.returncode == 2
    assert "in use" in again.stderr
    compared = call("compare", str(tmp_path / "far.yaml"), "--seeds", "0", "--output", f"{address}-both")
    assert compared.returncode == 0, compared.stderr
    assert {"comparison.csv", "runs/a/seed0/summary.json", "runs/b/seed0/summary.json"} <= names(f"{address}-both")
    there, root = fsspec.core.url_to_fs(address)
    local, here = fsspec.core.url_to_fs(str(tmp_path / "near"))
    for name in ("model.safetensors",):
        assert there.cat_file(f"{root}/{name}") == local.cat_file(f"{here}/{name}")


def test_an_interrupted_run_resumes_from_its_address(
    address: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {
        "name": "cut",
        "data": {"name": "digits", "clients": 3, "max_samples": 300},
        "model": {"name": "mlp", "hidden": [8]},
        "runtime": {"backend": "in_process", "training_path": "plain"},
        "rounds": 3,
        "checkpoint": {"every": 1},
        "tracking": {"enabled": False},
    }
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fl_ray.experiment.write_models", interrupt)
        assert call("run", str(tmp_path / "cut.yaml"), "--output", address).returncode == 130
    assert any(name.startswith("checkpoints/") for name in names(address))
    done = call("run", "--resume", address)
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in names(address)
    assert not any(name.startswith("checkpoints/") for name in names(address))


def test_an_unknown_protocol_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="nowhere://x"):
        Mirror("nowhere://x", tmp_path)
