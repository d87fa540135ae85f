"""Fixtures: one Ray session for all tests, folders of their own for caches and MLflow, a small generator."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import ray

from fl_ray.cli import main
from fl_ray.config import RayConfig, RunConfig
from fl_ray.experiment import Experiment
from fl_ray.recipes import apply_overrides, make_config
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.connection import connect
from fl_ray.runtime.start import open_runtime

TINY_GENERATOR = {"name": "diffusion", "widths": [8, 16], "train_steps": 30, "steps": 3, "block_size": 5}


@dataclass
class Called:
    """What a call in this process gave; the same fields as of a real process."""

    returncode: int
    stdout: str
    stderr: str


Call = Callable[..., Called]


@pytest.fixture(scope="session", autouse=True)
def session_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache folder for this session: nothing is read from or left in the user's own."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["FL_RAY_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """Ray with four logical CPUs: placement is logical, and more than two actors at once must be seen."""
    connect(RayConfig(num_cpus=4, bandwidth=8.0))
    yield
    ray.shutdown()


def small_recipe() -> dict[str, Any]:
    """A small recipe on the digits, in process and without tracking."""
    return {
        "name": "small",
        "data": {
            "name": "digits",
            "clients": 6,
            "public_fraction": 0.2,
            "max_samples": 600,
            "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 3},
        },
        "model": {"name": "mlp", "hidden": [16]},
        "method": {"name": "fedavg"},
        "training": {"batch_size": 8, "lr": 0.1},
        "runtime": {"backend": "in_process", "training_path": "plain"},
        "rounds": 3,
        "targets": [0.3],
        "tracking": {"enabled": False},
    }


@pytest.fixture
def small() -> Callable[..., RunConfig]:
    """``small_recipe`` with three of its clients a round; keyword arguments override dotted names."""

    def make(**overrides: Any) -> RunConfig:
        base = small_recipe() | {"clients_per_round": 3}
        dotted = {name.replace("__", "."): value for name, value in overrides.items()}
        if dotted.pop("with_generator", False):
            base["generator"] = dict(TINY_GENERATOR)
        return make_config(apply_overrides(base, dotted))

    return make


@pytest.fixture
def fresh_clients(
    session_cache: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Callable[[], None]:
    """Forget what clients have trained; the session's generators stay."""

    def forget() -> None:
        folder = tmp_path_factory.mktemp("fresh")
        (session_cache / "generators").mkdir(exist_ok=True)
        (folder / "generators").symlink_to(session_cache / "generators")
        monkeypatch.setenv("FL_RAY_CACHE", str(folder))

    return forget


@pytest.fixture
def run_small(
    tmp_path: Path, small: Callable[..., RunConfig], fresh_clients: Callable[[], None]
) -> Callable[..., tuple[Experiment, dict[str, Any]]]:
    """Run a small recipe, in which clients train; the finished experiment and its summary. ``runtime`` may be an open
    backend.
    """

    def run(runtime: Runtime | None = None, **overrides: Any) -> tuple[Experiment, dict[str, Any]]:
        fresh_clients()  # so that backends are compared by what they train
        config = small(**overrides)
        folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        if runtime is not None:
            experiment = Experiment(config, folder, runtime)
            return experiment, experiment.run()
        with open_runtime(config) as opened:
            experiment = Experiment(config, folder, opened)
            return experiment, experiment.run()

    return run


@pytest.fixture
def run_cut_at_its_end(monkeypatch: pytest.MonkeyPatch) -> Callable[[RunConfig, Path, Runtime], None]:
    """Run all rounds into a new folder, with an interrupt before the models are written."""

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    def run(config: RunConfig, folder: Path, runtime: Runtime) -> None:
        folder.mkdir()
        with monkeypatch.context() as patch:
            patch.setattr("fl_ray.experiment.write_models", interrupt)
            with pytest.raises(KeyboardInterrupt):
                Experiment(config, folder, runtime).run()

    return run


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """The command line in this process: without the seven seconds that a fresh one needs to import torch."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words: str) -> Called:
        capsys.readouterr()
        code = main(list(words))
        signal.signal(signal.SIGTERM, handler)
        said = capsys.readouterr()
        return Called(code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data sets, or a skip that says how to give it."""
    folder = os.environ.get("FL_RAY_DATA")
    if not folder or not (Path(folder) / "MNIST" / "raw").is_dir():
        pytest.skip("real data: set FL_RAY_DATA to a folder with MNIST, CIFAR-10, PACS and digit_domains")
    return Path(folder)
