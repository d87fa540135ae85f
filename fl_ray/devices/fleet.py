"""A fleet: every client's device, drawn from the tiers of ``fleet``, and from measured devices with ``fleet.trace``."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from fl_ray.config import FleetConfig, Range, TierConfig, TraceConfig
from fl_ray.devices.availability import Availability, shifted_windows
from fl_ray.devices.traces import assign, read_availability, read_capacity
from fl_ray.errors import SettingError
from fl_ray.randomness import numpy_generator

__all__ = ["Fleet", "draw_fleet", "noise_w_hz", "path_gain", "redraw_channels"]


@dataclass(frozen=True)
class Fleet:
    """Device parameters as arrays [clients], SI units.

    Attributes:
        down_share: of the band on the down-link; None: ``bandwidth_share``.
        rate_bps: measured link rates, both ways, in place of the channel model's; NaN: not measured.
        availability: None: everybody, always.
    """

    tier: np.ndarray
    frequency_hz: np.ndarray
    cycles_per_sample: np.ndarray
    capacitance: np.ndarray
    power_w: np.ndarray
    gain: np.ndarray
    bandwidth_share: np.ndarray
    distance_m: np.ndarray
    down_share: np.ndarray | None = None
    rate_bps: np.ndarray | None = None
    availability: Availability | None = None


_DRAWN = ("frequency_hz", "cycles_per_sample", "capacitance", "power_w", "gain", "bandwidth_share", "distance_m")


def path_gain(distance_m: np.ndarray, shadowing_db: np.ndarray) -> np.ndarray:
    """Channel power gain at path loss 128.1 + 37.6 log10(d / km) dB plus shadowing."""
    return 10 ** (-(128.1 + 37.6 * np.log10(np.asarray(distance_m) / 1000) + shadowing_db) / 10)


def noise_w_hz(config: FleetConfig) -> float:
    """Noise density N0 [W/Hz]."""
    return float(10 ** ((config.noise_dbm_hz - 30) / 10))


def draw_fleet(config: FleetConfig, clients: int, seed: int) -> Fleet:
    """Draw ``clients`` devices by the key (seed, "fleet"); tier sizes follow ``fraction`` by largest remainders.

    Raises:
        SettingError: a file of ``fleet.trace`` can't be used.
    """
    rng = numpy_generator(seed, "fleet")
    shares = np.array([tier.fraction for tier in config.tiers])
    ideal = shares / shares.sum() * clients
    sizes = np.floor(ideal).astype(np.int64)
    sizes[np.argsort(sizes - ideal, kind="stable")[: clients - sizes.sum()]] += 1
    tier_of = rng.permutation(np.repeat(np.arange(len(sizes), dtype=np.int16), sizes))
    columns = {name: np.empty(clients) for name in _DRAWN}
    for number, tier in enumerate(config.tiers):
        rows = tier_of == number
        drawn = _draw_tier(tier, int(rows.sum()), rng)
        for name, values in drawn.items():
            columns[name][rows] = values
    fleet = Fleet(tier_of, **columns)
    if config.availability is not None:
        windows = config.availability
        rng = numpy_generator(seed, "availability")
        fleet = replace(fleet, availability=shifted_windows(clients, windows.period_s, windows.fraction, rng))
    return fleet if config.trace is None else _traced(fleet, config.trace, clients, seed)


def redraw_channels(config: FleetConfig, fleet: Fleet, seed: int, number: int) -> Fleet:
    """The fleet with its shadowing drawn anew, by the key (seed, "channels", number)."""
    deviation = np.array([tier.shadowing_db for tier in config.tiers])[fleet.tier]
    shadowing = numpy_generator(seed, "channels", number).normal(0, deviation)
    return replace(fleet, gain=path_gain(fleet.distance_m, shadowing))


def _traced(fleet: Fleet, trace: TraceConfig, clients: int, seed: int) -> Fleet:
    """With measured times in place of the tiers'. Energy stays the model's, at the drawn frequency and power: the
    cycles are those that take the measured time at this frequency, and the radio sends for as long as measured.
    """
    if trace.capacity is not None:
        seconds, rates = read_capacity(trace.capacity)
        chosen = assign(len(seconds), clients, numpy_generator(seed, "trace/capacity"))
        cycles = seconds[chosen] * trace.training_factor * fleet.frequency_hz
        fleet = replace(fleet, cycles_per_sample=cycles, rate_bps=rates[chosen])
    if trace.availability is not None:
        found = read_availability(trace.availability)
        chosen = assign(len(found.period_s), clients, numpy_generator(seed, "trace/availability"))
        fleet = replace(fleet, availability=found.take(chosen))
        if len(fleet.availability.starts) == 0:
            raise SettingError(
                f"fleet.trace.availability {trace.availability}: no device of this run is ever available; active must "
                "be before inactive"
            )
    return fleet


def _draw_tier(tier: TierConfig, count: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    def draw(value: Range) -> np.ndarray:
        return rng.uniform(value[0], value[1], count) if isinstance(value, list) else np.full(count, value)

    low, high = tier.distance_m if isinstance(tier.distance_m, list) else (tier.distance_m, tier.distance_m)
    distance = np.sqrt(rng.uniform(low**2, high**2, count))  # uniform in area
    return {
        "frequency_hz": draw(tier.frequency_hz),
        "cycles_per_sample": draw(tier.cycles_per_sample),
        "capacitance": draw(tier.capacitance),
        "power_w": draw(tier.power_w),
        "gain": path_gain(distance, rng.normal(0, tier.shadowing_db, count)),
        "bandwidth_share": np.full(count, tier.bandwidth),
        "distance_m": distance,
    }
