"""The batched training path equals the plain one, whoever is computed together, and says where it can't be had."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fl_ray.config import Component, TrainingConfig
from fl_ray.data.rows import Partition
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.model import ImageShape, initial_weights
from fl_ray.runtime.base import merge
from fl_ray.runtime.batched import refusal
from fl_ray.runtime.host import ClientHost
from fl_ray.runtime.tasks import Job, JobData, RoundSettings, Task
from tests.fl_ray.own import Hooked
from tests.fl_ray.test_client_errors import Heard, run

Run = Callable[..., tuple[Experiment, dict]]
SHAPE = ImageShape(1, 8, 10, (0.5,), (0.3,))
SIZES = [3, 40, 17, 64, 8]  # with batches of 8: fewer than one, whole ones only, and last ones of several sizes
OPTIMISERS = {
    "sgd": {},
    "momentum": {"momentum": 0.9},
    "adam": {"optimizer": "adam", "lr": 0.01},
    "adamw": {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1},
    "decay_and_clip": {"weight_decay": 0.01, "clip_norm": 0.5, "momentum": 0.5},
    "cosine": {"lr_schedule": "cosine"},
}


def host(model: str = "mlp", **training: object) -> ClientHost:
    rng = np.random.default_rng(0)
    count = sum(SIZES)
    images = rng.integers(0, 256, (count, 1, 8, 8)).astype(np.uint8)
    labels = rng.integers(0, 10, count)
    partition = Partition(rng.permutation(count), np.concatenate([[0], np.cumsum(SIZES)]))
    nobody = Partition(np.empty(0, dtype=np.int64), np.zeros(len(SIZES) + 1, dtype=np.int64))
    data = JobData(images, labels, partition, nobody, images[:4], labels[:4])
    settings = TrainingConfig(**{"batch_size": 8, "lr": 0.1, "local_epochs": 3, **training})
    sizes = {"mlp": {"hidden": [16]}, "small_cnn": {"width": 4, "hidden": 8}}.get(model, {})
    return ClientHost(Job(Component(model, sizes), SHAPE, settings, 0, 10, 1), data)


def start_of(made: ClientHost) -> np.ndarray:
    return initial_weights(made.job.model, SHAPE, made.job.training, 0)


def trained(made: ClientHost, path: str, tasks: list[Task] | None = None, **settings: object) -> dict[int, np.ndarray]:
    tasks = tasks or [Task(client, 1 / len(SIZES)) for client in range(len(SIZES))]
    return made.train(tasks, start_of(made), RoundSettings(2, path, individual=True, **settings)).weights


def assert_near(made: ClientHost, **settings: object) -> None:
    plain, batched = trained(made, "plain", **settings), trained(made, "batched", **settings)
    start = start_of(made)
    for client, weights in plain.items():
        assert np.abs(weights - start).max() > 1e-3
        assert batched[client] == pytest.approx(weights, abs=2e-4), client
        assert np.abs(batched[client] - weights).max() < 0.02 * np.abs(weights - start).max()


@pytest.mark.parametrize("model", ["mlp", "small_cnn"])
@pytest.mark.parametrize("training", OPTIMISERS.values(), ids=OPTIMISERS)
def test_batched_equals_plain(model: str, training: dict) -> None:
    assert_near(host(model, **training))


def test_losses_and_records_are_those_of_the_plain_path() -> None:
    made = host()
    tasks = [Task(client, 1 / len(SIZES)) for client in range(len(SIZES))]
    plain, batched = (
        made.train(tasks, start_of(made), RoundSettings(0, path)).records for path in ("plain", "batched")
    )
    for one, other in zip(plain, batched, strict=True):
        assert (one.client, one.samples, one.share) == (other.client, other.samples, other.share)
        assert other.train_loss == pytest.approx(one.train_loss, rel=1e-4)


def test_what_methods_add_to_gradients_is_added_in_both() -> None:
    made = host()
    offsets = [np.random.default_rng(client).normal(0, 0.1, made.layout.size) for client in range(len(SIZES))]
    tasks = [Task(client, 0.2, offset=offsets[client].astype(np.float32)) for client in range(len(SIZES))]
    assert_near(made, proximal=0.5)
    plain, batched = trained(made, "plain", tasks, proximal=0.5), trained(made, "batched", tasks, proximal=0.5)
    without = trained(made, "batched")
    for client in range(len(SIZES)):
        assert batched[client] == pytest.approx(plain[client], abs=2e-4)
        assert np.abs(batched[client] - without[client]).max() > 1e-2


@pytest.mark.parametrize("training", [OPTIMISERS["momentum"], OPTIMISERS["adam"]], ids=["momentum", "adam"])
@pytest.mark.parametrize("model", ["mlp", "small_cnn"])
def test_grouping_and_order_change_no_bit(model: str, training: dict) -> None:
    made = host(model, **training)
    start = start_of(made)
    try:
        made.resolve_path("batched", range(len(SIZES)), 1, start)
    except SettingError as error:  # a promise that is not given need not be kept
        if "on this processor its result depends on who is computed together" not in str(error):
            raise
        pytest.skip(str(error))
    tasks = [Task(client, size / sum(SIZES)) for client, size in enumerate(SIZES)]
    groupings = (
        [tasks],
        [tasks[::-1]],
        [[task] for task in tasks],
        [tasks[:2], tasks[2:4], tasks[4:]],
        [[tasks[3], tasks[0]], [tasks[2]], [tasks[4], tasks[1]]],
    )
    settings = RoundSettings(1, "batched")
    found = [
        merge([made.train(group, start, settings) for group in groups], len(start), False).update
        for groups in groupings
        for _ in range(2)  # the second time steps are traced
    ]
    assert np.abs(found[0]).max() > 0
    assert all((one == found[0]).all() for one in found)


class Frozen(Hooked):
    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__(in_channels, image_size, num_classes)
        self.layer.bias.requires_grad_(False)


class Dropping(Hooked):
    """Random numbers that no module shows."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


class BatchStatistics(Hooked):
    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        super().__init__(in_channels, image_size, num_classes)
        self.norm = nn.BatchNorm1d(num_classes, track_running_stats=False)


class Peeking(Hooked):
    """Python that looks at the data, and an error without a text."""

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        if torch._C._functorch.is_functorch_wrapped_tensor(batch[1]):
            raise ValueError
        return super().training_step(batch, batch_idx)


REFUSED = {
    "tests.fl_ray.own:OwnModule": "BatchNorm1d keeps running statistics",
    f"{__name__}:Frozen": "parameters are frozen",
    f"{__name__}:Dropping": "torch.func can't run it",
    f"{__name__}:BatchStatistics": "BatchNorm1d can't train on a batch of one sample",
    f"{__name__}:Peeking": r"torch.func can't run it \(ValueError: \)",
}


@pytest.mark.parametrize(("model", "reason"), REFUSED.items())
def test_a_refused_module_says_why(model: str, reason: str) -> None:
    made = host(model)
    with pytest.raises(SettingError, match=f"runtime.training_path is batched.*{reason}.*use plain or auto"):
        made.resolve_path("batched", [0, 1], 2, start_of(made))


def test_dropout_is_refused_unless_it_drops_nothing() -> None:
    module = host("small_cnn").module
    assert refusal(module) is None
    module.network.append(nn.Dropout(0.0))
    assert refusal(module) is None
    module.network.append(nn.Dropout(0.1))
    assert refusal(module) == "Dropout draws random numbers"


def test_auto_writes_its_choice_and_says_why_once(small: Callable, tmp_path: Path) -> None:
    heard = Heard()
    found = run(small(model__name="tests.fl_ray.own:OwnModule", runtime__training_path="auto"), tmp_path / "bn", heard)
    assert [text for text in heard.said if "training path" in text] == [
        "training path plain: BatchNorm1d keeps running statistics"
    ]
    assert found.folder.config().runtime.training_path == "plain"
    found = run(small(runtime__training_path="auto"), tmp_path / "mlp")
    assert found.folder.config().runtime.training_path in ("plain", "batched")


def test_a_refused_module_refuses_the_run(run_small: Run, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="BatchNorm1d keeps running statistics"):
        run_small(model__name="tests.fl_ray.own:OwnModule", runtime__training_path="batched")
    assert not list(tmp_path.iterdir())


def test_the_path_is_chosen_where_the_first_clients_have_no_samples(small: Callable, tmp_path: Path) -> None:
    settings = {"data__partition": {"name": "dirichlet", "alpha": 0.001, "min_samples": 0}, "data__clients": 350}
    found = run(small(**settings, clients_per_round=350, rounds=1, runtime__training_path="batched"), tmp_path / "run")
    assert not found.data.partition.sizes[:16].any()  # what is tried here
    assert found.folder.history()[0]["clients"] == (found.data.partition.sizes > 0).sum()
