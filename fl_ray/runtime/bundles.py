"""Where actors are placed: in a group of the run's own, or in that of the trial which the run is part of."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import ray
from ray.util.placement_group import (
    PlacementGroup,
    get_current_placement_group,
    placement_group,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from fl_ray.config import RuntimeConfig
from fl_ray.errors import PlacementError
from fl_ray.runtime.placement import Slot

__all__ = ["Bundles", "available"]

_RELEASE_S = 5.0


def available() -> dict[str, float]:
    """What a run may plan with: the whole cluster; for a study's trial its own bundles, in which memory was counted."""
    trial = get_current_placement_group()
    if trial is None:
        return ray.cluster_resources()
    total: dict[str, float] = {"memory": math.inf}
    for bundle in trial.bundle_specs:
        for name, amount in bundle.items():
            if name != "memory":
                total[name] = total.get(name, 0.0) + amount
    return total


class Bundles:
    """One bundle for each slot.

    Args:
        config: its placement strategy and timeout; within a trial Ray Tune has placed the bundles.

    Raises:
        PlacementError: Ray does not place them in time, or the trial's bundles do not hold the slots.
    """

    def __init__(self, slots: Sequence[Slot], config: RuntimeConfig) -> None:
        trial = get_current_placement_group()
        self._own = trial is None
        self._cpus = sum(dict(slot.bundle)["CPU"] for slot in slots)
        self._group = _place(slots, config) if trial is None else trial
        self._places = list(range(len(slots))) if trial is None else _within(trial, slots)

    def at(self, index: int) -> PlacementGroupSchedulingStrategy:
        """How the actor of a slot is scheduled."""
        return PlacementGroupSchedulingStrategy(self._group, placement_group_bundle_index=self._places[index])

    def release(self) -> None:
        """Give them back, but for a trial's."""
        if not self._own:
            return
        remove_placement_group(self._group)
        # Ray gives bundles back a moment after it says so; the next placement would count them as taken.
        deadline = time.monotonic() + _RELEASE_S
        while ray.available_resources().get("CPU", 0.0) < self._cpus and time.monotonic() < deadline:
            time.sleep(0.05)


def _place(slots: Sequence[Slot], config: RuntimeConfig) -> PlacementGroup:
    group = placement_group([dict(slot.bundle) for slot in slots], strategy=config.placement_strategy)
    if not group.wait(config.placement_timeout_s):
        remove_placement_group(group)
        kinds = {slot.bundle for slot in slots}
        asked = "; ".join(f"{sum(slot.bundle == kind for slot in slots)} x {dict(kind)}" for kind in kinds)
        raise PlacementError(
            f"Ray did not place the client actors within {config.placement_timeout_s:g} s. Asked for: {asked}."
            f" The cluster has {ray.cluster_resources()}, of which {ray.available_resources()} is free. Lower "
            "runtime.num_actors or the tiers' cpus and bandwidth, wait for other jobs, or raise "
            "runtime.placement_timeout_s"
        )
    return group


def _within(trial: PlacementGroup, slots: Sequence[Slot]) -> list[int]:
    """A bundle of the trial's for each slot, as small as will do."""
    free = dict(enumerate(trial.bundle_specs))
    places = []
    for slot in slots:
        need = dict(slot.bundle)
        fitting = [
            place
            for place, bundle in free.items()
            if all(bundle.get(name, 0.0) >= amount - 1e-9 for name, amount in need.items())
        ]
        if not fitting:
            raise PlacementError(
                f"the trial's placement group has no bundle left for a client actor of {need}; a study's trials must "
                "ask for the same actors: keep fleet.tiers, data.clients and runtime out of its space"
            )
        chosen = min(fitting, key=lambda place: sum(free[place].values()))
        places.append(chosen)
        del free[chosen]
    return places
