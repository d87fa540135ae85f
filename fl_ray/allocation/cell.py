"""A cell: the devices, their data, the channel and the limits that a plan is made for."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from fl_ray.allocation.learning_curve import LearningCurve
from fl_ray.errors import SettingError

__all__ = ["Cell", "random_cell"]

_VGG9_BITS = 32 * 3_491_530


@dataclass(frozen=True)
class Cell:
    """Everything that a plan depends on; SI units.

    Attributes:
        class_counts: int64 [devices, classes], local samples.
        cycles_per_sample: c [devices].
        capacitance: eps [devices], J s^2 / cycle^3.
        f_min_hz, f_max_hz, p_max_w: limits [devices].
        gain: h, channel power gain [devices].
        bandwidth_hz, noise_w_hz, upload_bits: B, N0 and S.
        local_epochs: tau.
        t_max_s, error_max: Tmax and Delta_max.
        d_gen_max: most synthetic samples of a device.
        curve: global error against data per device.
        quality: q, what a synthetic sample is worth on the curve, in (0, 1].

    Raises:
        SettingError: a value with which there is no problem to solve; it names device and setting.
    """

    class_counts: np.ndarray
    cycles_per_sample: np.ndarray
    capacitance: np.ndarray
    f_min_hz: np.ndarray
    f_max_hz: np.ndarray
    p_max_w: np.ndarray
    gain: np.ndarray
    bandwidth_hz: float = 20e6
    noise_w_hz: float = 10**-20.4
    upload_bits: float = float(_VGG9_BITS)
    local_epochs: int = 1
    t_max_s: float = 60.0
    error_max: float = 0.25
    d_gen_max: float = 5000.0
    curve: LearningCurve = field(default_factory=LearningCurve)
    quality: float = 1.0

    def __post_init__(self) -> None:
        for name in ("cycles_per_sample", "capacitance", "f_min_hz", "f_max_hz", "p_max_w", "gain"):
            values = getattr(self, name)
            bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
            if len(bad):
                raise SettingError(
                    f"{name} of device {bad[0]} is {values[bad[0]]}, but it must be a positive number{_others(bad)}"
                )
        bad = np.flatnonzero(self.f_min_hz > self.f_max_hz)
        if len(bad):
            raise SettingError(
                f"f_min of device {bad[0]} is {self.f_min_hz[bad[0]]:g} Hz, above its f_max of "
                f"{self.f_max_hz[bad[0]]:g} Hz{_others(bad)}"
            )
        bad = np.flatnonzero(self.d_loc == 0)
        if len(bad):
            raise SettingError(
                f"device {bad[0]} has no local data, with which the learning curve has no value{_others(bad)}; raise "
                "data.partition.min_samples, or take fewer clients"
            )
        numbers = {
            "fleet.bandwidth_hz": self.bandwidth_hz,
            "fleet.noise_dbm_hz (in W/Hz)": self.noise_w_hz,
            "allocation.upload_bits": self.upload_bits,
            "allocation.t_max_s": self.t_max_s,
        }
        for name, value in numbers.items():
            if not (np.isfinite(value) and value > 0):
                raise SettingError(f"{name} is {value}, but it must be a positive number")
        if not self.d_gen_max >= 0:
            raise SettingError(f"allocation.d_gen_max is {self.d_gen_max}, but it must be at least 0")
        if not 0 < self.quality <= 1:
            raise SettingError(f"allocation.quality is {self.quality}, but it must be in (0, 1]")
        if not self.error_max > self.curve.gamma:
            raise SettingError(
                f"allocation.error_max is {self.error_max}, but the learning curve never falls below its floor gamma = "
                f"{self.curve.gamma:g}; raise error_max above it"
            )

    @property
    def devices(self) -> int:
        return len(self.gain)

    @property
    def d_loc(self) -> np.ndarray:
        """Local samples, float64 [devices]."""
        return self.class_counts.sum(axis=1).astype(np.float64)

    @property
    def cycles(self) -> np.ndarray:
        """k = tau c: cycles per sample and round [devices]."""
        return self.local_epochs * self.cycles_per_sample

    def error(self, samples: np.ndarray) -> np.ndarray:
        """Delta(D) for samples [..., devices], synthetic ones counted ``quality`` each; [...]."""
        seen = self.d_loc + self.quality * (samples - self.d_loc)
        return self.curve.error(seen).mean(axis=-1)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for plan.json; ``from_dict`` takes them back."""
        made: dict[str, Any] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            made[each.name] = value.tolist() if isinstance(value, np.ndarray) else value
        return made | {"curve": self.curve.to_dict(), "d_loc": self.d_loc.tolist()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Cell:
        known = {each.name: values[each.name] for each in fields(cls)}
        arrays = {name: np.asarray(value) for name, value in known.items() if isinstance(value, list)}
        return cls(**known | arrays | {"curve": LearningCurve(**known["curve"])})

    def digest(self) -> str:
        """A hash of everything: a plan holds for one cell."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]


def _others(bad: np.ndarray) -> str:
    return f" (and {len(bad) - 1} others)" if len(bad) > 1 else ""


def random_cell(devices: int = 20, seed: int = 0, **changed: Any) -> Cell:
    """The default cell of our setting (a reconstruction), without a data set: 50-500 m uniform in area, path loss
    128.1 + 37.6 log10(d km) dB, shadowing 8 dB, 2,500 samples a device from Dir(0.4) over ten classes with at least 50
    each, VGG-9 in fp32. The band is 1 MHz a device; a device's shadowing is redrawn until it can upload in half of
    Tmax with 1.2 MHz (otherwise some devices could never take part).

    Args:
        changed: other attributes of ``Cell``.
    """
    from fl_ray.allocation.inner import least_bandwidth
    from fl_ray.devices.fleet import path_gain

    rng = np.random.default_rng([seed, devices])
    distance = np.sqrt(rng.uniform(50.0**2, 500.0**2, devices))
    columns = {
        "class_counts": _dirichlet_counts(devices, rng),
        "cycles_per_sample": rng.uniform(4e6, 1.2e7, devices),
        "capacitance": np.full(devices, 2e-28),
        "f_min_hz": np.full(devices, 0.3e9),
        "f_max_hz": np.full(devices, 2.0e9),
        "p_max_w": np.full(devices, 0.2),
        "gain": path_gain(distance, rng.normal(0, 8.0, devices)),
        "bandwidth_hz": 1e6 * devices,
    }
    while True:
        cell = Cell(**{**columns, **changed})
        slow = least_bandwidth(cell, np.full(devices, cell.t_max_s / 2)) > 1.2e6
        if not slow.any() or "gain" in changed:
            return cell
        columns["gain"][slow] = path_gain(distance[slow], rng.normal(0, 8.0, int(slow.sum())))


def _dirichlet_counts(devices: int, rng: np.random.Generator, least: int = 50) -> np.ndarray:
    """Ten classes of 250 samples a device, each spread over the devices by Dir(0.4); devices below ``least`` get what
    they lack from the class and device that have most.
    """
    counts = np.stack([rng.multinomial(250 * devices, rng.dirichlet(np.full(devices, 0.4))) for _ in range(10)], axis=1)
    for device in np.flatnonzero(counts.sum(axis=1) < least):
        lacking = least - int(counts[device].sum())
        giver, label = np.unravel_index(counts.argmax(), counts.shape)
        counts[giver, label] -= lacking
        counts[device, label] += lacking
    return counts
