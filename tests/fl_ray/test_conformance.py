"""Every method on every backend gives the same weights to the bit, and leaves the same files."""

import json
from collections.abc import Callable, Iterator

import pytest
import torch
from safetensors.torch import load_file

from fl_ray.config import RayConfig, RuntimeConfig
from fl_ray.experiment import Experiment
from fl_ray.registry import REGISTRY
from fl_ray.run_folder import HISTORY_COLUMNS
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.ray_backend import RayRuntime

Run = Callable[..., tuple[Experiment, dict]]
LAYOUTS = {
    "pooled_1": RuntimeConfig(actors="pooled", num_actors=1),
    "pooled_2": RuntimeConfig(actors="pooled", num_actors=2),
    "pooled_4": RuntimeConfig(actors="pooled", num_actors=4),
    "per_client": RuntimeConfig(actors="per_client"),
}
PLANNED = {  # a cell of which FIMI's family can make a plan
    "with_generator": True,
    "clients_per_round": None,
    "fleet": {
        "bandwidth_hz": 6e6,
        "tiers": [{"shadowing_db": 3, "distance_m": [50, 200], "cycles_per_sample": [4e7, 1.2e8]}],
    },
    "allocation": {"t_max_s": 40, "error_max": 0.8, "d_gen_max": 100},
}
ONE_SHOT = {
    "rounds": 1,
    "clients_per_round": None,
    "method__server__batch_size": 32,
    "method__server__epochs": 2,
    "method__client_models": [{"name": "mlp", "hidden": [8]}, {"name": "small_cnn", "width": 2, "batch_norm": True}],
}
GUIDED = {"with_generator": True, "method__images_per_class": 3, "method__block_size": 3, "method__edits": 1}
OWN = {  # settings without which a method refuses a cohort of three
    "fedlmg": {**ONE_SHOT, **GUIDED},
    "feddf": ONE_SHOT,
    "dense": {
        **ONE_SHOT,
        "method__turns": 2,
        "method__generator_steps": 2,
        "method__student_steps": 2,
    },
    "ensemble": {name: value for name, value in ONE_SHOT.items() if "server" not in name},
    "prompts_only": {"with_generator": True, "method__images_per_class": 5},
    "fimi": PLANNED,
    "tfl": PLANNED,
    "hdc": PLANNED,
    "semi": {**PLANNED, "method__images": 20},
    "sst": {**PLANNED, "method__images": 20},
    "clsd": {**PLANNED, "method__images": 20},
    "genfl": {"with_generator": True},
    "genfl_pretrain": {
        "with_generator": True,
        "method__images": 30,
        "method__pretrain_epochs": 2,
        "method__cas_epochs": 1,
    },
    "krum": {"method__byzantine": 0, "method__multi": 2},
    "trimmed_mean": {"method__trim": 0.34},
}
# Sums of updates, individual weights with state by client, models by client, a server that trains and generates.
OF_EACH_KIND = ("fedavg", "scaffold", "local_only", "genfl")
CLIENTS = 4  # as many as the session's Ray has CPUs for, so that per_client fits


@pytest.fixture(scope="module", params=list(LAYOUTS))
def ray_runtime(request: pytest.FixtureRequest, ray_session: None) -> Iterator[Runtime]:
    with RayRuntime(LAYOUTS[request.param], RayConfig()) as runtime:
        yield runtime


def weights(experiment: Experiment) -> dict[str, torch.Tensor]:
    return load_file(experiment.folder / "model.safetensors")


def assert_same(one: Experiment, other: Experiment) -> None:
    mine, its = weights(one), weights(other)
    assert mine.keys() == its.keys()
    for name, value in mine.items():
        assert torch.equal(value, its[name]), name
    for row, same in zip(one.folder.history(), other.folder.history(), strict=True):
        kept = [column for column in HISTORY_COLUMNS if column != "wall_s"]
        assert json.dumps([row[column] for column in kept]) == json.dumps([same[column] for column in kept])


@pytest.mark.parametrize("method", OF_EACH_KIND)
def test_ray_equals_in_process_to_the_bit(ray_runtime: Runtime, run_small: Run, method: str) -> None:
    assert_ray_equals_in_process(ray_runtime, run_small, method)


def assert_ray_equals_in_process(ray_runtime: Runtime, run_small: Run, method: str) -> None:
    settings = {
        "data__clients": CLIENTS,
        "method__name": method,
        **OWN.get(method, {}),
        "runtime__backend": "ray",
        "data__client_test_fraction": 0.2,
    }
    oracle, expected = run_small(**{**settings, "runtime__backend": "in_process"})
    found, summary = run_small(ray_runtime, **settings)
    assert_same(oracle, found)
    assert summary["final_accuracy"] == expected["final_accuracy"]
    assert summary["client_accuracy"] == expected["client_accuracy"]
    if method == "local_only":  # own models on own few classes: far above the untrained model's tenth
        assert summary["client_accuracy"]["mean"] > 0.3


def test_dropout_and_batch_norm_are_the_same_on_every_backend(ray_runtime: Runtime, run_small: Run) -> None:
    settings = {"data__clients": CLIENTS, "model__name": "tests.fl_ray.own:OwnModule", "training__batch_size": 7}
    oracle, _ = run_small(**settings)
    found, _ = run_small(ray_runtime, **settings, runtime__backend="ray")
    assert_same(oracle, found)


@pytest.mark.parametrize("method", REGISTRY["method"])
def test_every_method_leaves_its_files(run_small: Run, method: str) -> None:
    experiment, summary = run_small(method__name=method, **OWN.get(method, {}))
    for name in ("config.yaml", "history.csv", "summary.json", "model.safetensors", "report.html", "partition.json"):
        assert (experiment.folder / name).stat().st_size > 0, name
    history = experiment.folder.history()
    assert [row["round"] for row in history] == list(range(1, experiment.config.rounds + 1))
    assert list(history[0]) == list(HISTORY_COLUMNS)
    assert summary["final_accuracy"] == history[-1]["test_accuracy"]
    assert set(summary["wall_s"]) == {"start", "synthesis", "dispatch", "train", "aggregate", "evaluate", "log"}
    assert experiment.folder.config() == experiment.config


@pytest.mark.parametrize("partition", [name for name in REGISTRY["partition"] if name not in ("domain", "natural")])
def test_every_partitioner_trains(run_small: Run, partition: str) -> None:
    experiment, _ = run_small(data__partition__name=partition, rounds=4)
    losses = [row["train_loss"] for row in experiment.folder.history()]
    assert min(losses[1:]) < losses[0]


@pytest.mark.parametrize("model", REGISTRY["model"])
def test_every_model_trains(run_small: Run, model: str) -> None:
    larger = {"data__name": "random", "data__size": 32, "data__samples": 120, "model__width": 0.25}
    small = {name: larger for name in ("mobilenet_v2", "mobilenet_v3_small")}
    small |= {"shufflenet_v2": {**larger, "model__width": 0.5}, "vgg16": {**larger, "model__width": 8}}
    small |= {"resnet18": {"model__width": 8}, "resnet34": {"model__width": 4}, "vgg9": {"model__width": 4}}
    small["torchvision"] = {**larger, "data__channels": 3, "model__network": "mobilenet_v3_small"}
    small["torchvision"].pop("model__width")
    small["cvae"] = {"training__optimizer": "adam", "training__lr": 1e-3}
    experiment, _ = run_small(model__name=model, rounds=1, training__batch_size=16, **small.get(model, {}))
    row = experiment.folder.history()[0]
    assert row["train_loss"] == row["train_loss"]  # not NaN
