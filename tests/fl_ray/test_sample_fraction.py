"""``training.sample_fraction``: a share of each client's images, drawn anew each round, in training, cost and books."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from fl_ray.config import TrainingConfig
from fl_ray.data.parts import prepare
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.model import ImageShape
from fl_ray.runtime.host import ClientHost
from fl_ray.runtime.tasks import Job, JobData, RoundSettings, Task

Run = Callable[..., tuple[Experiment, dict[str, Any]]]


def test_counts() -> None:
    sizes = np.array([0, 1, 10, 19, 1000])
    assert TrainingConfig(sample_fraction=0.9).samples_of(sizes).tolist() == [0, 1, 9, 17, 900]
    assert TrainingConfig().samples_of(sizes).tolist() == sizes.tolist()
    with pytest.raises(SettingError, match=r"training.sample_fraction is 0"):
        TrainingConfig(sample_fraction=0.0)


def test_rows_are_the_clients_own_and_new_each_round(small: Callable[..., Any]) -> None:
    config = small(training__sample_fraction=0.5)
    data = prepare(config.data, 0)
    job = Job(config.model, ImageShape.of(data.source), config.training, 0, 2, 1)
    arrays = JobData.of(data)
    host = ClientHost(job, arrays)
    first, again, second = (host.rows(Task(2, 1.0), RoundSettings(number)) for number in (0, 0, 1))
    own = data.partition.of(2)
    assert len(set(first.tolist())) == len(first) == len(own) // 2
    assert set(first.tolist()) <= set(own.tolist())
    assert (first == again).all()
    assert set(first.tolist()) != set(second.tolist())


def test_half_the_samples_cost_half_of_the_computing(run_small: Run) -> None:
    """All clients own the same even number of images, so that halves are whole; links cost the same."""
    settings = {"data__partition__name": "iid", "clients_per_round": 6, "rounds": 1, "data__max_samples": 750}
    found = {}
    for fraction in (1.0, 0.5):
        experiment, summary = run_small(**settings, training__sample_fraction=fraction)
        found[fraction] = summary
        sizes = prepare(experiment.config.data, 0).partition.sizes
        assert summary["samples_trained"] == int(TrainingConfig(sample_fraction=fraction).samples_of(sizes).sum())
    assert found[0.5]["bytes_up"] == found[1.0]["bytes_up"]
    assert found[0.5]["energy_j"] < found[1.0]["energy_j"]
