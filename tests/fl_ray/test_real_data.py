"""Real MNIST, CIFAR-10, PACS and digit domains, where FL_RAY_DATA names their folder."""

from pathlib import Path

import numpy as np
import pytest

from fl_ray.config import Component, DataConfig
from fl_ray.data.datasets import load
from fl_ray.data.parts import prepare
from fl_ray.experiment import Experiment
from fl_ray.recipes import apply_overrides, load_recipe, make_config
from fl_ray.runtime.start import open_runtime

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize(
    ("name", "shape", "train", "test", "mean"),
    [("mnist", (1, 28, 28), 60_000, 10_000, 33.32), ("cifar10", (3, 32, 32), 50_000, 10_000, 120.71)],
)
def test_sets_as_published(
    real_data: Path, name: str, shape: tuple[int, ...], train: int, test: int, mean: float
) -> None:
    data = load(name, str(real_data), False, {})
    assert data.images.shape == (train, *shape)
    assert data.test_images.shape == (test, *shape)
    assert data.images.mean() == pytest.approx(mean, abs=0.01)
    channel_means = data.images.mean(axis=(0, 2, 3)) / 255
    assert channel_means == pytest.approx(data.mean, abs=2e-3)
    assert data.images.std(axis=(0, 2, 3)) / 255 == pytest.approx(data.std, abs=2e-3)


def test_pacs_domains_by_client(real_data: Path) -> None:
    config = DataConfig(
        "image_folder",
        str(real_data),
        clients=4,
        settings={"path": "PACS", "image_size": 32},
        partition=Component("domain"),
    )
    data = prepare(config, seed=0)
    assert data.source.domain_names == ["art_painting", "cartoon", "photo", "sketch"]
    assert len(data.labels) == 9991
    for client in range(4):
        assert set(data.source.domains[data.partition.of(client)]) == {client}


def test_digit_domains_with_splits(real_data: Path) -> None:
    data = load("image_folder", str(real_data), False, {"path": "digit_domains", "image_size": 16})
    assert np.bincount(data.domains).tolist() == [10_000, 7_291]
    assert np.bincount(data.test_domains).tolist() == [2_000, 2_007]
    assert data.classes == [str(digit) for digit in range(10)]


def test_the_mnist_recipe_runs_on_real_mnist(real_data: Path, tmp_path: Path) -> None:
    """The recipe itself, cut to two rounds and a generator that is barely trained."""
    changes = {
        "data.root": str(real_data),
        "rounds": 2,
        "runtime.backend": "in_process",
        "tracking.enabled": False,
        "generator.train_steps": 10,
        "generator.widths": [8, 16],
        "generator.steps": 2,
        "method.images_per_round": 50,
        "clients_per_round": 4,
    }
    config = make_config(apply_overrides(load_recipe(ROOT / "experiments" / "genfl" / "mnist.yaml"), changes))
    with open_runtime(config) as runtime:
        experiment = Experiment(config, tmp_path, runtime)
        summary = experiment.run()
    assert summary["status"] == "finished"
    losses = [row["train_loss"] for row in experiment.folder.history()]
    assert max(losses) < np.log(10)  # skewed clients learn their few classes at once
    assert sum(summary["synthetic_images"]) == 100
