"""Results that are equal to the bit: for any grouping and order of clients, and resumed after any round."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_ray.config import Component, RunConfig
from fl_ray.data.parts import prepare
from fl_ray.experiment import Experiment
from fl_ray.model import ImageShape, initial_weights
from fl_ray.recipes import make_config
from fl_ray.runtime.base import merge
from fl_ray.runtime.host import ClientHost
from fl_ray.runtime.in_process import InProcessRuntime
from fl_ray.runtime.tasks import Job, JobData, RoundSettings, Task
from tests.faults.driving import assert_same_run
from tests.fl_ray.test_runs import StopAfter

CLIENTS = 9
RECIPE = {
    "data": {
        "name": "digits",
        "clients": CLIENTS,
        "max_samples": 500,
        "partition": {"name": "dirichlet", "alpha": 0.5, "min_samples": 3},
    },
    "training": {"batch_size": 8, "momentum": 0.5},
}
MODELS = {
    "mlp": Component("mlp", {"hidden": [16]}),
    "dropout_and_batch_norm": Component("tests.fl_ray.own:OwnModule", {"hidden": 8}),
}


def made_host(model: str) -> tuple[ClientHost, np.ndarray]:
    config = make_config(RECIPE)
    data = prepare(config.data, 0)
    shape = ImageShape.of(data.source)
    arrays = JobData.of(data)
    host = ClientHost(Job(MODELS[model], shape, config.training, 0, 3, 1), arrays)
    return host, initial_weights(MODELS[model], shape, config.training, 0)


HOSTS = {model: made_host(model) for model in MODELS}


@pytest.mark.parametrize(("model", "path"), [("mlp", "plain"), ("mlp", "batched"), ("dropout_and_batch_norm", "plain")])
@settings(max_examples=12, deadline=None)
@given(order=st.permutations(range(CLIENTS)), cuts=st.sets(st.integers(1, CLIENTS - 1), max_size=4))
def test_any_grouping_and_order_of_arrival_gives_the_same_bits(
    model: str, path: Any, order: list[int], cuts: set[int]
) -> None:
    host, weights = HOSTS[model]
    tasks = [Task(client, (client + 1) / 45) for client in range(CLIENTS)]
    round_settings = RoundSettings(1, path)
    whole = merge([host.train(tasks, weights, round_settings)], len(weights), False)
    groups = np.split(np.array(order), sorted(cuts))
    parts = [host.train([tasks[client] for client in group], weights, round_settings) for group in groups]
    found = merge(parts[::-1], len(weights), False)
    assert np.array_equal(found.update, whole.update)
    assert [record.train_loss for record in found.records] == [record.train_loss for record in whole.records]


@pytest.mark.parametrize("path", ["plain", "batched"])
def test_a_run_resumed_after_any_round_gives_the_same_bits(
    small: Callable[..., RunConfig], tmp_path: Path, path: str
) -> None:
    config = small(rounds=4, runtime__training_path=path, checkpoint__every=1)
    for cut in range(4):
        folder = tmp_path / f"cut{cut}"
        folder.mkdir()
        if cut:
            with pytest.raises(KeyboardInterrupt):
                Experiment(config, folder, InProcessRuntime(), StopAfter(cut)).run()
        Experiment(config, folder, InProcessRuntime(), resume=cut > 0).run()
        assert_same_run(tmp_path / "cut0", folder)
