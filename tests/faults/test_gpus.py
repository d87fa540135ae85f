"""Fractions of GPUs, by Ray's logical ones (no real GPU): who shares them, and what is said where they do not fit."""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray
from safetensors.numpy import load_file

from fl_ray.config import RunConfig
from fl_ray.errors import PlacementError
from fl_ray.experiment import Experiment
from fl_ray.progress import Progress
from fl_ray.runtime import ray_backend
from fl_ray.runtime.start import open_runtime
from fl_ray.studies.run_study import begin_study, run_study
from fl_ray.studies.settings import load_study
from tests.conftest import TINY_GENERATOR, small_recipe
from tests.fl_ray.studies.own import study_file
from tests.fl_ray.test_placement import most_at_once, trained_at_once

KINDS = ("_GeneratorActor", "HostActor")
SHARED = {
    "method__name": "genfl",
    "with_generator": True,
    "runtime__gpus_per_actor": 0.25,
    "generator__pool": {"actors": 2, "gpus": 0.5},
}


@pytest.fixture(scope="module", autouse=True)
def two_gpus() -> Iterator[None]:
    """Ray with two GPUs that are not there, and more CPUs than are asked for."""
    quiet = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init(address="local", num_cpus=8, num_gpus=2, resources={"bandwidth": 16}, **quiet)
    yield
    ray.shutdown()


@contextlib.contextmanager
def most_actors() -> Iterator[Counter[str]]:
    """The most processes of each kind of actor that there are at a time in the block."""
    most: Counter[str] = Counter()
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(0.2):
            titles = []
            for process in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):  # ended meanwhile
                    titles.append(" ".join(process.cmdline()))
            for kind in KINDS:
                most[kind] = max(most[kind], sum(title.startswith(f"ray::{kind}") for title in titles))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield most
    finally:
        ended.set()
        thread.join()


def run(config: RunConfig, folder: Path) -> dict[str, Any]:
    """The run's model, tensor by tensor."""
    folder.mkdir()
    with open_runtime(config) as runtime:
        Experiment(config, folder, runtime).run()
    return load_file(folder / "model.safetensors")


def assert_all_free() -> None:
    give_up = time.monotonic() + 20
    while ray.available_resources().get("GPU", 0.0) < 2:
        assert time.monotonic() < give_up
        time.sleep(0.2)


def test_a_half_of_a_gpu_each_lets_four_clients_train_at_once(small: Callable[..., RunConfig]) -> None:
    settings = {"runtime__backend": "ray", "runtime__gpus_per_actor": 0.5, "training__local_epochs": 25}
    everyone = {"clients_per_round": 6, "data__partition": {"name": "iid"}}
    records, _ = trained_at_once(small(**settings, **everyone))
    assert most_at_once(records) == 4
    assert_all_free()


def test_clients_server_and_pool_share_two_gpus_and_change_no_result(
    small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    """The pool has one, the server a quarter; three clients' actors have the rest, though six clients train."""
    alone = run(small(**SHARED, clients_per_round=6, generator__cache=str(tmp_path / "one")), tmp_path / "alone")
    shared = small(**SHARED, clients_per_round=6, generator__cache=str(tmp_path / "other"), runtime__backend="ray")
    with most_actors() as most:
        found = run(shared, tmp_path / "shared")
    assert most == {"_GeneratorActor": 2, "HostActor": 3 + 1}
    assert found.keys() == alone.keys()
    assert all((found[name] == alone[name]).all() for name in alone)
    assert_all_free()


def test_a_studys_trial_has_room_for_all_of_them(tmp_path: Path) -> None:
    recipe = small_recipe() | {
        "method": {"name": "genfl"},
        "generator": TINY_GENERATOR | {"pool": {"actors": 2, "gpus": 0.25}},
        "runtime": {"gpus_per_actor": 0.25},
    }
    study = begin_study(load_study(study_file(tmp_path, recipe=recipe, trials=2), {}), tmp_path / "study")
    with most_actors() as most:
        trials = run_study(study, tmp_path / "study", Progress(enabled=False))
    assert [trial.state for trial in trials] == ["finished"] * 2, trials
    # Two trials at a time, a GPU each: half of it is the pool's, a quarter the server's.
    assert most["HostActor"] <= 2 * (1 + 1)
    assert_all_free()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"runtime__gpus_per_actor": 1.0, "runtime__num_actors": 3}, r"GPU 2, .*; lower runtime.gpus_per_actor"),
        ({**SHARED, "generator__pool": {"actors": 5, "gpus": 0.5}}, r"5 actors x 0.5 GPU.*generator.pool.gpus"),
        (
            {**SHARED, "runtime__num_actors": 5, "generator__pool": {"actors": 2, "gpus": 0.5, "timeout_s": 5.0}},
            r"of 2 generator actors.*lower generator.pool.cpus, generator.pool.gpus or runtime.num_actors",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_the_settings_name(
    small: Callable[..., RunConfig], tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    cache = {"generator__cache": str(tmp_path / "cache")} if "with_generator" in settings else {}
    config = small(**settings, **cache, clients_per_round=6, runtime__backend="ray", runtime__actors="pooled")
    with pytest.raises(PlacementError, match=said):
        run(config, tmp_path / "refused")
    assert_all_free()


def test_a_server_without_a_gpu_left_is_refused_by_the_settings_name(
    small: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = {"runtime__gpus_per_actor": 1.0, "runtime__num_actors": 2, "runtime__actors": "pooled"}
    config = small(**taken, runtime__backend="ray", rounds=1)
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    with open_runtime(config) as runtime:
        Experiment(config, tmp_path / "first", runtime).run()  # the clients' actors are ready now
        monkeypatch.setattr(ray_backend, "_LOAD_TIMEOUT_S", 20)
        other = small(**taken, runtime__backend="ray", method__name="centralised")
        with pytest.raises(PlacementError, match=r"server's actor \(GPU 1\).*Lower runtime.gpus_per_actor"):
            Experiment(other, tmp_path / "second", runtime).run()
    assert_all_free()
