"""When devices can take part: windows in virtual time that repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["Availability", "shifted_windows"]


@dataclass(frozen=True)
class Availability:
    """Windows of all devices in compact arrays: device i's are ``starts`` and ``ends`` from ``offsets[i]`` to
    ``offsets[i + 1]``, ascending and disjoint, in seconds from 0 to its period ``period_s[i]``.
    """

    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray
    period_s: np.ndarray

    @classmethod
    def from_windows(cls, windows: Sequence[Sequence[tuple[float, float]]], period_s: np.ndarray) -> Availability:
        """From each device's list of (start, end)."""
        flat = np.array([window for own in windows for window in own], dtype=np.float64).reshape(-1, 2)
        sizes = np.array([len(own) for own in windows])
        return cls(flat[:, 0], flat[:, 1], np.concatenate([[0], np.cumsum(sizes)]), np.asarray(period_s, float))

    def _owners(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.period_s)), np.diff(self.offsets))

    def mask(self, at_s: float) -> np.ndarray:
        """Which devices are available at a virtual time; bool [devices]."""
        owners = self._owners()
        phase = np.mod(at_s, self.period_s)[owners]
        open_ = (self.starts <= phase) & (phase < self.ends)
        return np.bincount(owners[open_], minlength=len(self.period_s)) > 0

    def closes_s(self, devices: np.ndarray, at_s: float) -> np.ndarray:
        """Virtual time at which each device, available at ``at_s``, goes away; [devices]. inf: it never does."""
        found = np.empty(len(devices))
        for place, device in enumerate(devices):
            own = slice(self.offsets[device], self.offsets[device + 1])
            starts, ends, period = self.starts[own], self.ends[own], self.period_s[device]
            phase = at_s % period
            current = np.flatnonzero((starts <= phase) & (phase < ends))
            if len(current) == 0:
                found[place] = at_s
                continue
            end, wraps = float(ends[current[0]]), 0
            if end >= period and starts[0] <= 0:  # the window goes on in the next period
                wraps, end = 1, float(ends[0])
            found[place] = np.inf if wraps and end >= period else at_s - phase + wraps * period + end
        return found

    def next_s(self, at_s: float) -> float:
        """The first virtual time from ``at_s`` on at which some device is available."""
        if self.mask(at_s).any():
            return at_s
        period = self.period_s[self._owners()]
        phase = np.mod(at_s, period)
        waits = np.where(self.starts >= phase, self.starts - phase, self.starts + period - phase)
        return at_s + float(waits.min())


def shifted_windows(devices: int, period_s: float, fraction: float, rng: np.random.Generator) -> Availability:
    """One window a period for each device, ``fraction`` of it long, beginning at a moment drawn uniformly."""
    begins = rng.uniform(0, period_s, devices)
    length = fraction * period_s
    if fraction == 1:
        return Availability(
            np.zeros(devices), np.full(devices, period_s), np.arange(devices + 1), np.full(devices, period_s)
        )
    wraps = begins + length > period_s
    sizes = np.where(wraps, 2, 1)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    starts, ends = np.empty(sizes.sum()), np.empty(sizes.sum())
    first, last = offsets[:-1], offsets[1:] - 1
    starts[last], ends[last] = begins, np.minimum(begins + length, period_s)
    starts[first[wraps]], ends[first[wraps]] = 0.0, (begins + length - period_s)[wraps]
    return Availability(starts, ends, offsets, np.full(devices, period_s))
