"""Clients of one-shot methods: trained once, then found, to the same bits; never where anything else decides."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from fl_ray.client_models import FILE
from fl_ray.config import RayConfig, RunConfig, RuntimeConfig
from fl_ray.errors import OutputError
from fl_ray.experiment import Experiment
from fl_ray.progress import Progress
from fl_ray.recipes import to_dict
from fl_ray.run_folder import HISTORY_COLUMNS, RunFolder
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.ray_backend import RayRuntime
from fl_ray.runtime.start import open_runtime
from tests.conftest import Call
from tests.fl_ray.own import Heard, Hooked

ROOT = Path(__file__).parent.parent.parent
Small = Callable[..., RunConfig]
MODELS = [{"name": "mlp", "hidden": [8]}, {"name": "small_cnn", "width": 2, "hidden": 8, "batch_norm": True}]
ONE_SHOT = {"rounds": 1, "clients_per_round": None, "data__clients": 3, "method__name": "ensemble"}
OWN_MODELS = {**ONE_SHOT, "method__client_models": MODELS}
FEDDF = {"method__name": "feddf", "method__server__epochs": 2, "method__server__batch_size": 32}
HOOKED = {**ONE_SHOT, "model__name": "tests.fl_ray.own:Hooked"}
BLOCKS = {"data__clients": 5, "data__partition__name": "label_blocks"}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("FL_RAY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def run(small: Small, tmp_path: Path) -> Callable[..., tuple[Experiment, dict[str, Any]]]:
    """Run a small recipe with the cache as it is."""

    def made(
        runtime: Runtime | None = None, progress: Progress | None = None, **overrides: Any
    ) -> tuple[Experiment, dict[str, Any]]:
        config = small(**overrides)
        folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
        folder.mkdir()
        if runtime is not None:
            experiment = Experiment(config, folder, runtime, progress)
            return experiment, experiment.run()
        with open_runtime(config) as opened:
            experiment = Experiment(config, folder, opened, progress)
            return experiment, experiment.run()

    return made


def assert_same(one: RunFolder, other: RunFolder) -> None:
    """Weights, uploads, histories and summaries are the same to the bit, but for what clocks say."""
    names = sorted(path.relative_to(one.path) for path in one.path.rglob("*.safetensors"))
    assert names == sorted(path.relative_to(other.path) for path in other.path.rglob("*.safetensors"))
    for name in names:
        mine, its = load_file(one.path / name), load_file(other.path / name)
        assert mine.keys() == its.keys()
        assert all(torch.equal(mine[key], its[key]) for key in its), name
    columns = [column for column in HISTORY_COLUMNS if column != "wall_s"]
    for row, same in zip(one.history(), other.history(), strict=True):
        assert [repr(row[column]) for column in columns] == [repr(same[column]) for column in columns]
    clocks = ("wall_s", "wall_rounds_s", "wall_total_s", "process_peak_memory_mb", "client_models", "synthesis")
    mine, its = (json.loads((folder / "summary.json").read_text()) for folder in (one, other))
    assert {k: v for k, v in mine.items() if k not in clocks} == {k: v for k, v in its.items() if k not in clocks}


@pytest.mark.parametrize("models", [OWN_MODELS, ONE_SHOT])
def test_a_method_finds_what_another_s_clients_have_trained(
    models: dict[str, Any], cache: Path, run: Callable[..., Any], fresh_clients: Callable[[], None]
) -> None:
    _, first = run(**models)
    assert not first["client_models"]["from_cache"]
    found, second = run(**{**models, **FEDDF})
    assert second["client_models"] == {**first["client_models"], "from_cache": True}
    fresh_clients()
    trained, third = run(**{**models, **FEDDF})
    assert third["client_models"]["from_cache"] is False
    assert_same(found.folder, trained.folder)


def test_nothing_is_trained_a_second_time_and_the_seconds_are_those_of_the_first(
    cache: Path, run: Callable[..., Any], steps: list[int]
) -> None:
    _, first = run(**HOOKED, training__local_epochs=20)
    trained = len(steps)
    heard = Heard()
    second, summary = run(progress=heard, **HOOKED, training__local_epochs=20)
    assert len(steps) == trained > 0
    seconds = first["client_models"]["train_seconds"]
    assert first["wall_s"]["train"] >= seconds > 0
    assert summary["wall_s"]["train"] >= seconds
    assert summary["wall_rounds_s"] > seconds
    assert second.folder.history()[0]["wall_s"] > seconds
    key = summary["client_models"]["key"]
    assert f"the clients' models were trained before, in {seconds:.1f} s: {cache / 'client_models' / key}" in heard.told
    report = (second.folder / "report.html").read_text()
    assert "which this run took from the cache" in report
    assert f"{seconds:,.2f} s" in report


def test_what_decides_is_in_the_key(cache: Path, run: Callable[..., Any]) -> None:
    keys = {run(**ONE_SHOT)[1]["client_models"]["key"]}
    for changes in (
        {"seed": 1},
        {"training__lr": 0.05},
        {"training__local_epochs": 2},
        {"training__sample_fraction": 0.5},
        {"data__partition__alpha": 0.4},
        {"data__split_seed": 1},
        {"data__clients": 4},
        {"model__hidden": [17]},
        {"updates": [{"name": "clip", "norm": 1.0}]},
        {"runtime__training_path": "batched"},
        {"method__client_models": MODELS},
    ):
        found = run(**{**ONE_SHOT, **changes})[1]["client_models"]
        assert not found["from_cache"], changes
        assert found["key"] not in keys, changes
        keys.add(found["key"])


def test_what_does_not_decide_is_not(cache: Path, run: Callable[..., Any]) -> None:
    """The server's images, the devices, how it is evaluated."""
    run(**ONE_SHOT)
    _, other = run(**ONE_SHOT, evaluate_clients_every=0, fleet__bandwidth_hz=1e6, targets=[0.9], name="other")
    assert other["client_models"]["from_cache"]


def test_the_code_of_a_user_s_own_model_decides(
    cache: Path, run: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    source = "from tests.fl_ray.own import OwnNetwork\nclass Mine(OwnNetwork):\n    pass\n"
    (tmp_path / "mine_for_clients.py").write_text(source)
    own = {**ONE_SHOT, "model__name": "mine_for_clients:Mine"}
    run(**own)
    _, again = run(**own)
    assert again["client_models"]["from_cache"]
    (tmp_path / "mine_for_clients.py").write_text(f"{source}    # trained otherwise\n")
    _, changed = run(**own)
    assert not changed["client_models"]["from_cache"]


@pytest.mark.parametrize("place", [b"", b"seconds", -1, None], ids=["size of header", "record", "weights", "cut"])
def test_damage_is_told_and_mended(
    place: bytes | int | None, cache: Path, run: Callable[..., Any], steps: list[int]
) -> None:
    whole, _ = run(**HOOKED)
    (file,) = cache.glob(f"client_models/*/{FILE}")
    content = bytearray(file.read_bytes())
    if place is None:
        content = content[: len(content) // 2]
    else:
        content[content.index(place) if isinstance(place, bytes) else place] ^= 1
    file.write_bytes(content)
    heard, trained = Heard(), len(steps)
    mended, summary = run(progress=heard, **HOOKED)
    assert f"{file} is damaged, so its clients are trained again" in heard.told
    assert not summary["client_models"]["from_cache"]
    assert len(steps) == 2 * trained
    assert_same(whole.folder, mended.folder)
    assert run(**HOOKED)[1]["client_models"]["from_cache"]


def test_a_round_that_lacks_a_client_is_not_kept(cache: Path, run: Callable[..., Any]) -> None:
    for _ in range(2):
        _, summary = run(**{**ONE_SHOT, **BLOCKS, "model__name": "tests.fl_ray.own:NanOnNine"})
        assert summary["clients_left_out"]["not_finite"] == 1
        assert "client_models" not in summary
        _, summary = run(**{**ONE_SHOT, "fleet__dropout": 0.6})
        assert summary["clients_left_out"]["dropped_out"] > 0
        assert "client_models" not in summary
    assert not list(cache.rglob(FILE))


def test_a_round_in_which_a_client_raised_is_not_kept(
    cache: Path, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [1]

    def strike(labels: torch.Tensor) -> None:
        if left[0]:
            left[0] -= 1
            raise RuntimeError("once")

    monkeypatch.setattr(Hooked, "trouble", staticmethod(strike))
    _, summary = run(**HOOKED)
    assert summary["clients_retried"] == 1
    assert not list(cache.rglob(FILE))
    _, summary = run(**HOOKED)
    assert (summary["clients_retried"], summary["client_models"]["from_cache"]) == (0, False)


class Unrepeatable(Hooked):
    """Training never gives the same weights twice, as on a GPU."""

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        noise = int.from_bytes(os.urandom(2)) / 2**16
        return super().training_step(batch, batch_idx) * (1 + 0.1 * noise)


def test_images_are_found_where_training_is_not_repeatable(
    cache: Path, run: Callable[..., Any], fresh_clients: Callable[[], None]
) -> None:
    guided = {**ONE_SHOT, "model__name": f"{__name__}:Unrepeatable", "method__name": "fedlmg", "with_generator": True}
    guided |= {"method__images_per_class": 2, "method__block_size": 2, "method__edits": 0, "seed": 7}
    fresh_clients()
    first, summary = run(**guided)
    assert summary["guided_synthesis"]["images_made"] > 0
    again, found = run(**guided)
    assert found["guided_synthesis"]["images_made"] == 0
    # The server's training is not repeatable either, so the accuracies may differ; what it begins with may not.
    names = [f"uploads/client_{client:04d}.safetensors" for client in range(3)]
    uploads = [[load_file(experiment.folder / name) for name in names] for experiment in (first, again)]
    assert all(torch.equal(one[key], two[key]) for one, two in zip(*uploads, strict=True) for key in one)
    fresh_clients()
    assert run(**guided)[1]["guided_synthesis"]["images_made"] > 0


def test_other_methods_keep_nothing(cache: Path, run: Callable[..., Any]) -> None:
    _, summary = run(rounds=1)
    assert "client_models" not in summary
    assert not cache.exists()


def test_a_run_in_real_time_takes_its_time(cache: Path, run: Callable[..., Any], steps: list[int]) -> None:
    paced = {**HOOKED, "runtime__emulate": "realtime", "runtime__time_scale": 1e-6}
    run(**paced)
    trained = len(steps)
    run(**paced)
    assert len(steps) == 2 * trained
    assert not cache.exists()


def test_actors_find_what_was_trained_in_process(cache: Path, run: Callable[..., Any], ray_session: None) -> None:
    own, first = run(**OWN_MODELS)
    with RayRuntime(RuntimeConfig(actors="pooled", num_actors=2), RayConfig()) as runtime:
        found, summary = run(runtime, **OWN_MODELS, runtime__backend="ray")
    assert summary["client_models"] == {**first["client_models"], "from_cache": True}
    assert_same(own.folder, found.folder)


def test_a_cache_that_can_t_be_written_is_refused(cache: Path, run: Callable[..., Any]) -> None:
    cache.write_text("a file in its place")
    with pytest.raises(OutputError, match=r"generator\.cache .*cache: .*; name a folder that can be written"):
        run(**ONE_SHOT)


_KILLS = {
    # within the third batch of the training; when the file is written but not in its place; in the server's work
    "training": "from tests.fl_ray.own import Heard, Hooked; left = iter(range(3))\n"
    "Hooked.trouble = staticmethod(lambda labels: next(left, None) is None and die())",
    "keeping": "import fl_ray.client_models as c; whole = c.write_whole\n"
    "c.write_whole = lambda path, content: (whole(path.with_name('half'), content[:999]), die())",
    "the server": "from fl_ray.methods.one_shot import Ensemble; Ensemble.learn = lambda *given: die()",
}


@pytest.mark.parametrize("at", _KILLS)
def test_a_kill_in_between(
    at: str, cache: Path, small: Small, tmp_path: Path, run: Callable[..., Any], fresh_clients: Callable[[], None]
) -> None:
    """A kill -9 leaves a round that is whole or none, and the run goes on to what it would have been."""
    config = small(**HOOKED)
    (tmp_path / "killed.yaml").write_text(yaml.safe_dump(to_dict(config)))
    code = f"import os, signal\ndef die():\n    os.kill(os.getpid(), signal.SIGKILL)\n{_KILLS[at]}\n"
    code += "from fl_ray.cli import main; raise SystemExit(main(['run', 'killed.yaml', '--output', 'killed']))"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(list(cache.rglob(FILE))) == (at == "the server")
    with open_runtime(config) as runtime:
        resumed = Experiment(config, tmp_path / "killed", runtime, resume=True)
        summary = resumed.run()
    assert summary["client_models"]["from_cache"] == (at == "the server")
    fresh_clients()
    whole, _ = run(**HOOKED)
    assert_same(resumed.folder, whole.folder)


def test_of_two_at_once_one_trains(cache: Path, small: Small, tmp_path: Path, call: Call) -> None:
    recipe = to_dict(small(**OWN_MODELS, training__local_epochs=10))
    feddf = {"name": "feddf", "client_models": MODELS, "server": {"epochs": 1}}
    recipe["compare"] = [{"label": "one"}, {"label": "two", "method": feddf}]
    (tmp_path / "both.yaml").write_text(yaml.safe_dump(recipe))
    done = call("compare", "both.yaml", "--seeds", "0", "--jobs", "2", "--output", "both")
    assert done.returncode == 0, done.stderr
    noted = [RunFolder(tmp_path / "both" / "runs" / label / "seed0").summary() for label in ("one", "two")]
    assert sorted(summary["client_models"]["from_cache"] for summary in noted) == [False, True]
    assert len({summary["client_models"]["key"] for summary in noted}) == 1
