"""One kill of each kind: an actor, the server's actor, a generator's actor, the driver. Results stay the same."""

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from fl_ray.config import RayConfig, RunConfig, RuntimeConfig
from fl_ray.experiment import Experiment
from fl_ray.runtime.in_process import InProcessRuntime
from fl_ray.runtime.ray_backend import RayRuntime
from fl_ray.runtime.tasks import ServerTraining
from tests.faults.driving import assert_one_tracked_run, assert_same_run, killed, recipe, run

SLOW = {  # rounds of about a second, so that a kill meets clients in training
    "model__name": "small_cnn",
    "data__clients": 8,
    "clients_per_round": 8,
    "training__local_epochs": 8,
    "rounds": 4,
}


def pid_of(actor: Any) -> int:
    return ray.get(actor.__ray_call__.remote(lambda self: os.getpid()))


def kill_later(pid: int, experiment: Experiment, after_round: int, wait_s: float) -> threading.Thread:
    """Kill -9 a process a moment after a round was finished."""

    def work() -> None:
        give_up = time.monotonic() + 60
        while len(experiment.folder.history()) < after_round and time.monotonic() < give_up:
            time.sleep(0.01)
        time.sleep(wait_s)
        os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=work)
    thread.start()
    return thread


def run_in(folder: Path, config: RunConfig, runtime: Any) -> Experiment:
    folder.mkdir()
    experiment = Experiment(config, folder, runtime)
    experiment.run()
    return experiment


@pytest.mark.parametrize("actors", ["pooled", "per_client"])
def test_an_actor_killed_in_a_round_changes_no_result(
    ray_session: None, small: Callable[..., RunConfig], tmp_path: Path, actors: str
) -> None:
    own = {"data__clients": 3, "clients_per_round": 3} if actors == "per_client" else {}
    config = small(**{**SLOW, **own})
    run_in(tmp_path / "whole", config, InProcessRuntime())
    told: list[str] = []
    with RayRuntime(RuntimeConfig(actors=actors, num_actors=2), RayConfig(), told.append, config) as runtime:
        runtime._started()
        (tmp_path / "killed").mkdir()
        experiment = Experiment(config, tmp_path / "killed", runtime)
        thread = kill_later(pid_of(runtime._actors[0]), experiment, 2, 0.2)
        experiment.run()
        thread.join()
        assert any("client actor 0 is lost" in line for line in told)
        runtime._settle()  # the new actor answers in its bundle
        assert runtime._live() == list(range(len(runtime._actors)))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_the_servers_actor_killed_in_a_round_changes_no_result(
    ray_session: None, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    config = small(**SLOW, method__name="centralised", training__lr=0.01)
    run_in(tmp_path / "whole", config, InProcessRuntime())
    told: list[str] = []
    with RayRuntime(RuntimeConfig(actors="pooled", num_actors=1), RayConfig(), told.append, config) as runtime:
        runtime._started()
        (tmp_path / "killed").mkdir()
        experiment = Experiment(config, tmp_path / "killed", runtime)

        def work() -> None:
            while len(experiment.folder.history()) < 2:
                time.sleep(0.01)
            os.kill(pid_of(runtime._server), signal.SIGKILL)  # answered when the round before is done

        thread = threading.Thread(target=work)
        thread.start()
        experiment.run()
        thread.join()
    assert any("server's actor is lost" in line for line in told)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_the_servers_actor_killed_between_epochs_changes_no_result(
    ray_session: None, small: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(with_generator=True, method__name="genfl_pretrain", method__images=40, method__pretrain_epochs=3)
    run_in(tmp_path / "whole", config, InProcessRuntime())
    told: list[str] = []
    with RayRuntime(RuntimeConfig(actors="pooled", num_actors=1), RayConfig(), told.append, config) as runtime:
        plain = runtime.train_epoch

        def train(images: Any, before: ServerTraining, *how: Any) -> ServerTraining:
            if before.epochs == 2:
                os.kill(pid_of(runtime._server), signal.SIGKILL)
            return plain(images, before, *how)

        monkeypatch.setattr(runtime, "train_epoch", train)
        run_in(tmp_path / "killed", config, runtime)
    assert any("server's actor is lost" in line for line in told)
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_a_generator_actor_killed_makes_its_part_again(ray_session: None, tmp_path: Path) -> None:
    from generators.base import Block
    from generators.pool import GeneratorPool, LocalPool
    from tests.generators.own import SlowGenerator

    generator = SlowGenerator()
    blocks = [Block(0, label, number) for label in range(2) for number in range(6)]
    expected = dict(LocalPool(generator, tmp_path).make(blocks))
    pool = GeneratorPool(generator, tmp_path, actors=2, cpus=0, gpus=0, threads=1, timeout_s=60)
    victim = pid_of(pool._actors[0])
    made: dict[Block, np.ndarray] = {}
    for block, images in pool.make(blocks):
        if len(made) == 2:
            os.kill(victim, signal.SIGKILL)
        made[block] = images
    assert pid_of(pool._actors[0]) != victim
    pool.close()
    assert made.keys() == expected.keys()
    assert all((made[block] == expected[block]).all() for block in blocks)


def test_a_driver_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    path = recipe(tmp_path, rounds=16)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run("run", str(path), "--output", str(whole), "--runtime.backend", "in_process")
    done = killed(["run", str(path), "--output", str(cut)], cut, wait_s=1.0)
    assert 0 < done < 16
    run("run", "--resume", str(cut))
    assert_same_run(whole, cut)
    assert_one_tracked_run(tmp_path, 16, runs=2)


def test_sigterm_leaves_a_checkpoint_and_a_report(tmp_path: Path) -> None:
    path = recipe(tmp_path, rounds=400, runtime={"backend": "in_process"}, tracking={"enabled": False})
    output = tmp_path / "stopped"
    done = killed(["run", str(path), "--output", str(output)], output, 0.5, signal.SIGTERM)
    assert 0 < done < 400
    import json

    from fl_ray import checkpoint

    assert json.loads((output / "summary.json").read_text())["status"] == "interrupted"
    assert (output / "report.html").exists()
    assert checkpoint.latest(output / "checkpoints").rounds_done == done
    assert torch.isfinite(torch.from_numpy(checkpoint.latest(output / "checkpoints").weights)).all()
