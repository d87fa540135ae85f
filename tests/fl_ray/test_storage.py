"""Outputs at addresses: mirrored while they grow, and gone on with from there, in memory and on a file system."""

import shutil
from pathlib import Path

import fsspec
import pytest
import yaml

from fl_ray import storage
from fl_ray.errors import OutputError
from fl_ray.storage import Mirror, opened_output
from tests.conftest import Call, small_recipe


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
    (folder / ".deep.lock").touch()  # of the process here
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
    recipe = small_recipe() | {"compare": [{"label": "a"}, {"label": "b", "training.lr": 0.01}]}
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
    assert there.cat_file(f"{root}/model.safetensors") == (tmp_path / "near" / "model.safetensors").read_bytes()


def test_what_could_not_be_copied_at_the_end_is_kept_here(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def away(*arguments: object) -> int:
        raise OSError("the bucket is away")

    def write_while_storage_goes_away() -> None:
        with opened_output(address) as folder:
            (folder / "x").write_text("1")
            monkeypatch.setattr(Mirror, "push", away)

    with pytest.raises(OutputError, match="the bucket is away; what was written is kept in") as caught:
        write_while_storage_goes_away()
    folder = Path(str(caught.value).rpartition(" ")[2])
    assert (folder / "x").read_text() == "1"
    shutil.rmtree(folder.parent)


def test_an_interrupted_run_resumes_from_its_address(
    address: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cut.yaml").write_text(yaml.safe_dump(small_recipe()), encoding="utf-8")

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
