"""Memory over many rounds, with a large cohort and with a large population."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from fl_ray.config import RayConfig, RunConfig, RuntimeConfig
from fl_ray.experiment import Experiment
from fl_ray.progress import Progress
from fl_ray.runtime.ray_backend import RayRuntime

SETTINGS = {
    "data": {"name": "random", "samples": 2000, "clients": 200, "partition": {"name": "resampled", "samples": 20}},
    "model": {"name": "mlp", "hidden": [512]},  # 152 kB of weights: they go through the object store
    "runtime__backend": "ray",
    "evaluate_every": 10**6,
    "checkpoint__every": 100,
}


class Meter(Progress):
    """Resident memory of driver and actors, and bytes in the object store, after some rounds."""

    def __init__(self, runtime: RayRuntime, at: set[int]) -> None:
        super().__init__(enabled=False)
        self.runtime, self.at = runtime, at
        self.seen: list[dict[str, float]] = []

    def round(self, row: dict[str, Any], rounds: int) -> None:
        if row["round"] not in self.at:
            return
        pids = ray.get([actor.__ray_call__.remote(lambda self: os.getpid()) for actor in self.runtime._actors])
        sizes = {f"actor {index}": psutil.Process(pid).memory_info().rss / 1e6 for index, pid in enumerate(pids)}
        sizes["driver"] = psutil.Process().memory_info().rss / 1e6
        time.sleep(2)  # the raylet reports what its store holds about once a second
        kind = "object_store_memory"
        sizes["objects"] = (ray.cluster_resources()[kind] - ray.available_resources()[kind]) / 1e6
        self.seen.append(sizes)


def measured(config: RunConfig, folder: Path, at: set[int]) -> list[dict[str, float]]:
    with RayRuntime(RuntimeConfig(actors="pooled", num_actors=2), RayConfig(), ahead=config) as runtime:
        folder.mkdir()
        meter = Meter(runtime, at)
        Experiment(config, folder, runtime, meter).run()
        return meter.seen


@pytest.mark.parametrize("path", ["plain", "batched"])
def test_memory_is_flat_over_500_rounds(
    ray_session: None, small: Callable[..., RunConfig], tmp_path: Path, path: str
) -> None:
    config = small(**SETTINGS, rounds=500, clients_per_round=10, runtime__training_path=path)
    early, late = measured(config, tmp_path / "run", {100, 500})
    assert {name: late[name] - size for name, size in early.items() if late[name] - size > 15} == {}


def test_a_cohort_of_5000_needs_no_more_memory_than_one_of_50(
    ray_session: None, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    both = []
    for cohort in (50, 5000):
        own = {"data__clients": 5000, "clients_per_round": cohort, "runtime__training_path": "batched"}
        (seen,) = measured(small(**SETTINGS, **own, rounds=3), tmp_path / f"cohort{cohort}", {3})
        both.append(seen)
    few, many = both
    # Sums are 0.3 MB for either; 5,000 clients' own weights would be 760 MB.
    assert {name: many[name] - size for name, size in few.items() if many[name] - size > 60} == {}


def test_a_million_clients_need_no_more_than_300_mb(
    ray_session: None, small: Callable[..., RunConfig], tmp_path: Path
) -> None:
    both = []
    for clients in (1000, 1_000_000):
        own = {"data__clients": clients, "clients_per_round": 50}
        (seen,) = measured(small(**SETTINGS, **own, rounds=5), tmp_path / f"clients{clients}", {5})
        both.append(sum(seen.values()))
    assert both[1] - both[0] < 300
