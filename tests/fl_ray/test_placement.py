"""Bundles mean something: tiers change which actors there are and what runs at once."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray

from fl_ray.config import FleetConfig, RayConfig, RunConfig, RuntimeConfig, TierConfig
from fl_ray.data.parts import prepare
from fl_ray.devices.fleet import Fleet, draw_fleet
from fl_ray.errors import PlacementError
from fl_ray.model import ImageShape, initial_weights
from fl_ray.runtime.base import Phases
from fl_ray.runtime.placement import plan_slots
from fl_ray.runtime.ray_backend import RayRuntime
from fl_ray.runtime.spare import spare
from fl_ray.runtime.start import OpenRuntimes
from fl_ray.runtime.tasks import ClientRecord, Job, JobData, RoundSettings, Task

CLUSTER = {"CPU": 4.0, "bandwidth": 8.0, "memory": 8e9}
POOLED = RuntimeConfig(actors="pooled")


def tiers(*settings: tuple[float, float]) -> FleetConfig:
    return FleetConfig(
        tiers=[TierConfig(f"t{i}", cpus=cpus, bandwidth=band) for i, (cpus, band) in enumerate(settings)]
    )


def devices(config: FleetConfig, tier_of: Sequence[int]) -> Fleet:
    """A drawn fleet with these tiers in place of those that were drawn."""
    band = np.array([tier.bandwidth for tier in config.tiers])[list(tier_of)]
    return replace(draw_fleet(config, len(tier_of), 0), tier=np.array(tier_of), bandwidth_share=band)


def planned(runtime: RuntimeConfig, fleet: FleetConfig, tier_of: Sequence[int], cohort: int = 99) -> list[int]:
    return [slot.tier for slot in plan_slots(runtime, fleet, devices(fleet, tier_of), cohort, CLUSTER, {})]


def test_pooled_actors_by_hand() -> None:
    assert planned(POOLED, tiers((1, 1)), [0] * 10) == [0] * 4  # four CPUs
    assert planned(POOLED, tiers((2, 1)), [0] * 10) == [0] * 2  # two CPUs each
    assert planned(POOLED, tiers((0.5, 4)), [0] * 10) == [0] * 2  # bandwidth binds
    assert planned(POOLED, tiers((1, 1)), [0] * 10, cohort=3) == [0] * 3  # nobody idles
    assert planned(POOLED, tiers((2, 1), (1, 1)), [0] * 5 + [1] * 5) == [0, 1, 1]
    assert planned(RuntimeConfig(actors="pooled", num_actors=2), tiers((1, 1)), [0] * 10) == [0, 0]


def test_auto_takes_per_client_only_where_it_fits() -> None:
    auto = RuntimeConfig(actors="auto")
    slots = plan_slots(auto, tiers((1, 1)), devices(tiers((1, 1)), [0] * 4), 4, CLUSTER, {})
    assert [slot.client for slot in slots] == [0, 1, 2, 3]
    pooled = plan_slots(auto, tiers((1, 1)), devices(tiers((1, 1)), [0] * 5), 5, CLUSTER, {})
    assert [slot.client for slot in pooled] == [None] * 4


def test_what_fits_leaves_room_for_the_pool_and_the_server(small: Callable[..., RunConfig]) -> None:
    cluster = {**CLUSTER, "GPU": 2.0}
    fleet = devices(tiers((1, 1)), [0] * 4)

    def actors(spare: dict[str, float], **settings: object) -> int:
        return len(plan_slots(RuntimeConfig(gpus_per_actor=0.5, **settings), tiers((1, 1)), fleet, 4, cluster, spare))

    assert actors({}) == 4
    assert actors({"GPU": 1.0}) == 2
    assert actors({"GPU": 1.0, "CPU": 3.0}) == 1
    assert actors({"GPU": 2.0}) == 1  # a tier's only actor is not spared
    assert actors({"GPU": 2.0}, actors="pooled", num_actors=3) == 3  # nor what is asked for

    half = {"runtime__gpus_per_actor": 0.5}
    pool = {"with_generator": True, "generator__pool": {"actors": 2, "gpus": 0.25, "cpus": 0.5}}
    assert spare(small()) == spare(small(**half)) == {}
    assert spare(small(method__name="centralised", **half)) == {"GPU": 0.5}
    assert spare(small(**pool)) == {"GPU": 0.5, "CPU": 1.0}
    assert spare(small(method__name="genfl", **pool, **half)) == {"GPU": 1.0, "CPU": 1.0}


def test_an_actor_of_its_own_carries_its_client_s_share_of_the_band() -> None:
    fleet = replace(devices(tiers((1, 1)), [0] * 3), bandwidth_share=np.array([0.50004, 1.7, 0.8]))
    slots = plan_slots(RuntimeConfig(actors="per_client"), tiers((1, 1)), fleet, 3, CLUSTER, {})
    assert [dict(slot.bundle)["bandwidth"] for slot in slots] == [0.5, 1.7, 0.8]


@pytest.mark.parametrize(
    ("runtime", "fleet", "tier_of", "match"),
    [
        (RuntimeConfig(actors="per_client"), tiers((1, 1)), [0] * 5, "5 clients need CPU 5.*CPU 4"),
        (RuntimeConfig(actors="pooled", num_actors=5), tiers((1, 1)), [0] * 9, "CPU 4.*lower runtime.num_actors"),
        (POOLED, tiers((8, 1)), [0] * 9, "CPU 8"),
        (POOLED, tiers((1, 9)), [0] * 9, "bandwidth 9"),
        (RuntimeConfig(actors="pooled", num_actors=1), tiers((1, 1), (1, 1)), [0, 1], "hosts one tier"),
        (RuntimeConfig(actors="pooled", gpus_per_actor=0.5), tiers((1, 1)), [0] * 9, "GPU 0.5"),
    ],
)
def test_what_can_not_be_placed_is_said_at_once(
    runtime: RuntimeConfig, fleet: FleetConfig, tier_of: list[int], match: str
) -> None:
    with pytest.raises(PlacementError, match=match):
        plan_slots(runtime, fleet, devices(fleet, tier_of), 9, CLUSTER, {})


def trained_at_once(config: RunConfig) -> tuple[list[ClientRecord], np.ndarray]:
    """Records of one round in which all clients train, and the clients' tiers."""
    data = prepare(config.data, config.seed)
    shape = ImageShape.of(data.source)
    fleet = draw_fleet(config.fleet, config.data.clients, config.seed)
    weights = initial_weights(config.model, shape, config.training, config.seed)
    arrays = JobData.of(data)
    with RayRuntime(config.runtime, RayConfig()) as runtime:
        job = Job(config.model, shape, config.training, config.seed, config.rounds, 1)
        runtime.open(job, arrays, config.fleet, fleet, config.cohort_size)
        tasks = [Task(client, 1 / config.data.clients) for client in range(config.data.clients)]
        result = runtime.train(tasks, weights, RoundSettings(0), Phases())
    return result.records, fleet.tier


def most_at_once(records: list[ClientRecord]) -> int:
    return max(sum(other.started <= record.started < other.ended for other in records) for record in records)


def test_tiers_change_what_runs_at_once(ray_session: None, small: Callable[..., RunConfig]) -> None:
    settings = {
        "data__clients": 8,
        "data__partition": {"name": "iid"},
        "runtime__backend": "ray",
        "runtime__actors": "pooled",
        "training__local_epochs": 25,
        "clients_per_round": 8,
    }
    one, _ = trained_at_once(small(**settings, fleet__tiers=[{"name": "all", "cpus": 2.0}]))
    assert most_at_once(one) == 2
    two_tiers = [{"name": "big", "cpus": 2.0, "fraction": 0.5}, {"name": "small", "cpus": 1.0, "fraction": 0.5}]
    two, tier_of = trained_at_once(small(**settings, fleet__tiers=two_tiers))
    assert most_at_once(two) == 3
    assert most_at_once([record for record in two if tier_of[record.client] == 0]) == 1
    assert most_at_once([record for record in two if tier_of[record.client] == 1]) == 2


def test_bundles_that_others_hold_are_waited_for_only_so_long(
    ray_session: None, small: Callable[..., RunConfig]
) -> None:
    from ray.util.placement_group import placement_group, remove_placement_group

    other = placement_group([{"CPU": 3.0}])
    assert other.wait(20)
    start = time.monotonic()
    try:
        config = small(
            runtime__backend="ray", runtime__actors="pooled", runtime__num_actors=3, runtime__placement_timeout_s=1.0
        )
        with pytest.raises(PlacementError, match=r"Asked for: 3 x.*'CPU': 1.0.*The cluster has"):
            trained_at_once(config)
    finally:
        remove_placement_group(other)
    assert time.monotonic() - start < 30
    assert ray.is_initialized()


def test_actors_go_where_the_next_run_wants_more_left_to_others(
    ray_session: None, run_small: Callable[..., Any], small: Callable[..., RunConfig]
) -> None:
    settings = {"runtime__backend": "ray", "runtime__actors": "pooled", "runtime__num_actors": 1, "rounds": 1}
    pool = {"with_generator": True, "method__name": "genfl", "generator__pool": {"actors": 1, "cpus": 1.0}}
    runtimes = OpenRuntimes()
    try:
        runtime = runtimes.of(small(**settings))
        run_small(runtime, **settings)
        held = ray.available_resources()["CPU"]
        assert runtimes.of(small(**settings)) is runtime
        assert ray.available_resources()["CPU"] == held
        assert runtimes.of(small(**settings, **pool)) is runtime
        give_up = time.monotonic() + 20
        while ray.available_resources()["CPU"] < held + 1:
            assert time.monotonic() < give_up
            time.sleep(0.1)
    finally:
        runtimes.close()
