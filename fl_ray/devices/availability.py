"""When devices can take part: windows in virtual time that repeat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

__all__ = ["Availability", "shifted_windows"]


@dataclass(frozen=True)
class Availability:
    """Windows of all devices in compact arrays: device i's are ``starts`` and ``ends`` from ``offsets[i]`` to
    ``offsets[i + 1]``, ascending and with gaps between them, in seconds from 0 to its period ``period_s[i]``. A window
    holds its start, not its end; one that ends with the period goes on where the next period begins with one.
    """

    starts: np.ndarray
    ends: np.ndarray
    offsets: np.ndarray
    period_s: np.ndarray

    @classmethod
    def from_windows(cls, windows: Sequence[Sequence[tuple[float, float]]], period_s: np.ndarray) -> Availability:
        """From each device's list of (start, end), in any order: empty ones are left out, overlapping ones joined."""
        joined = [_joined(own) for own in windows]
        flat = np.array([window for own in joined for window in own], dtype=np.float64).reshape(-1, 2)
        sizes = np.array([len(own) for own in joined])
        return cls(flat[:, 0], flat[:, 1], np.concatenate([[0], np.cumsum(sizes)]), np.asarray(period_s, float))

    def take(self, devices: np.ndarray) -> Availability:
        """These devices' windows, in their order; a device may be taken several times."""
        sizes = np.diff(self.offsets)[devices]
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        rows = np.arange(offsets[-1]) + np.repeat(self.offsets[devices] - offsets[:-1], sizes)
        return Availability(self.starts[rows], self.ends[rows], offsets, self.period_s[devices])

    @cached_property
    def _owners(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.period_s)), np.diff(self.offsets))

    def mask(self, at_s: float) -> np.ndarray:
        """Which devices are available at a virtual time; bool [devices]."""
        owners = self._owners
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

    def next_s(self, at_s: float, excluded: np.ndarray | Sequence[int] = ()) -> float:
        """The first virtual time from ``at_s`` on at which some device that is not excluded is available; inf: none
        ever is.
        """
        others = np.ones(len(self.period_s), dtype=bool)
        others[np.asarray(excluded, dtype=np.int64)] = False
        if (self.mask(at_s) & others).any():
            return at_s
        mine = others[self._owners]
        starts, period = self.starts[mine], self.period_s[self._owners[mine]]
        if len(starts) == 0:
            return np.inf
        phase = np.mod(at_s, period)
        waits = np.where(starts >= phase, starts - phase, starts + period - phase)
        found = at_s + float(waits.min())
        while not (self.mask(found) & others).any():  # rounded down: a few steps at most
            found = float(np.nextafter(found, np.inf))
        return found


def _joined(windows: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    joined: list[tuple[float, float]] = []
    for start, end in sorted(windows):
        if end <= start:
            continue
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


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
