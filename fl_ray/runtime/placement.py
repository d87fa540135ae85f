"""Which actors a run gets: bundles of a placement group that carry a tier's share of CPU and bandwidth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fl_ray.config import FleetConfig, RuntimeConfig
from fl_ray.devices.fleet import Fleet
from fl_ray.errors import PlacementError

__all__ = ["ACTOR_MEMORY_BYTES", "Slot", "plan_slots"]

ACTOR_MEMORY_BYTES = 500 * 2**20  # a worker with torch and Lightning, measured at 250-500 MB


@dataclass(frozen=True)
class Slot:
    """One client actor: its tier, its bundle's resources, and its client where it has one of its own."""

    tier: int
    bundle: tuple[tuple[str, float], ...]
    client: int | None = None


def _bundle(fleet: FleetConfig, runtime: RuntimeConfig, tier: int) -> dict[str, float]:
    settings = fleet.tiers[tier]
    bundle = {"CPU": settings.cpus, "bandwidth": settings.bandwidth}
    if runtime.gpus_per_actor > 0:
        bundle["GPU"] = runtime.gpus_per_actor
    return bundle


def _fits(need: Mapping[str, float], have: Mapping[str, float]) -> bool:
    return all(have.get(name, 0.0) >= amount - 1e-9 for name, amount in need.items())


def _less(have: Mapping[str, float], taken: Mapping[str, float]) -> dict[str, float]:
    return {name: amount - taken.get(name, 0.0) for name, amount in have.items()}


def _describe(resources: dict[str, float]) -> str:
    names = ("CPU", "GPU", "bandwidth")
    return ", ".join(f"{name} {resources[name]:g}" for name in names if name in resources) or "nothing"


def plan_slots(
    runtime: RuntimeConfig,
    config: FleetConfig,
    fleet: Fleet,
    cohort_size: int,
    cluster: dict[str, float],
    spare: Mapping[str, float],
) -> list[Slot]:
    """The actors of a run.

    Args:
        fleet: its tiers and bandwidth shares; a client with an actor of its own has its share in its bundle.
        cluster: what the cluster has of each resource.
        spare: of these, what actors leave to others. What the settings ask for by name, they get all the same.

    Raises:
        PlacementError: the bundles asked for exceed the whole cluster.
    """
    tier_of, sizes = fleet.tier, np.bincount(fleet.tier, minlength=len(config.tiers))
    bundles = [_bundle(config, runtime, tier) for tier in range(len(config.tiers))]
    needs = [bundle | {"memory": ACTOR_MEMORY_BYTES} for bundle in bundles]
    everyone: dict[str, float] = {}
    for tier, size in enumerate(sizes):
        for name, amount in needs[tier].items():
            everyone[name] = everyone.get(name, 0.0) + float(size) * amount
    if runtime.actors == "per_client" or (runtime.actors == "auto" and _fits(everyone, _less(cluster, spare))):
        everyone.pop("memory")  # asked for by name, the setting is taken at its word
        if not _fits(everyone, cluster):
            raise PlacementError(
                f"runtime.actors {runtime.actors}: {len(tier_of)} clients need {_describe(everyone)}, but the cluster "
                f"has {_describe(cluster)}; use runtime.actors pooled, fewer data.clients or smaller fleet.tiers shares"
            )
        # A plan shares the same band out otherwise; Ray counts in steps of 0.0001.
        shares = np.maximum(np.floor(fleet.bandwidth_share * 1e4) / 1e4, 1e-4)
        own = [{**bundles[tier], "bandwidth": float(shares[client])} for client, tier in enumerate(tier_of)]
        return [Slot(int(tier), tuple(own[client].items()), client) for client, tier in enumerate(tier_of)]
    return _pooled(runtime, sizes, bundles, needs, cohort_size, cluster, spare)


def _too_much(actors: int, need: dict[str, float], cluster: dict[str, float], left: dict[str, float]) -> str:
    short = [name for name, amount in need.items() if left.get(name, 0.0) < amount]
    ways = {
        "CPU": "lower runtime.num_actors or the tiers' cpus",
        "GPU": "lower runtime.gpus_per_actor (0: train on CPUs)",
        "bandwidth": "lower the tiers' bandwidth, or start nodes with ray start --resources '{\"bandwidth\": 100}'",
        "memory": "lower runtime.num_actors",
    }
    taken = f", of which {_describe(left)} is left" if left != cluster else ""
    return (
        f"Ray can't place {actors} client actors: one of them needs {_describe(need)}, but the cluster has "
        f"{_describe(cluster)}{taken}; " + "; ".join(ways[name] for name in short)
    )


def _pooled(
    runtime: RuntimeConfig,
    sizes: np.ndarray,
    bundles: list[dict[str, float]],
    needs: list[dict[str, float]],
    cohort_size: int,
    cluster: dict[str, float],
    spare: Mapping[str, float],
) -> list[Slot]:
    """One actor for each tier that has clients, then more in turns while they fit and have clients to train."""
    present = [tier for tier in range(len(sizes)) if sizes[tier] > 0]
    limit = runtime.num_actors or min(int(sizes.sum()), cohort_size)
    if limit < len(present):
        if runtime.num_actors is not None:
            raise PlacementError(
                f"runtime.num_actors is {limit}, but {len(present)} tiers have clients and an actor hosts one tier; "
                f"raise it to at least {len(present)}"
            )
        limit = len(present)
    chosen: list[int] = []
    left = dict(cluster)
    required = runtime.num_actors or len(present)
    while len(chosen) < limit:
        added = False
        for tier in present:
            asked = len(chosen) < required
            need, have = (bundles[tier], left) if asked else (needs[tier], _less(left, spare))
            if len(chosen) == limit or chosen.count(tier) >= sizes[tier]:
                continue
            if not _fits(need, have):
                if asked:
                    raise PlacementError(_too_much(required, need, cluster, left))
                continue
            for name, amount in need.items():
                left[name] = left.get(name, 0.0) - amount
            chosen.append(tier)
            added = True
        if not added:
            break
    return [Slot(tier, tuple(bundles[tier].items())) for tier in sorted(chosen)]
