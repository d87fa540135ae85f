"""Cells: bad input is refused by name, plain values come back, and the digest tells cells apart."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fl_ray.allocation.cell import Cell, random_cell
from fl_ray.allocation.inner import least_bandwidth
from fl_ray.allocation.learning_curve import LearningCurve
from fl_ray.errors import SettingError


def changed(name: str, device: int, value: float) -> dict[str, Any]:
    values = np.array(getattr(random_cell(4), name), dtype=float)
    values[device] = value
    return {name: values}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"class_counts": np.zeros((4, 10), dtype=np.int64)}, r"device 0 has no local data.*3 others.*min_samples"),
        (changed("gain", 2, np.nan), "gain of device 2 is nan"),
        (changed("gain", 1, -1e-9), "gain of device 1 is -1e-09"),
        (changed("capacitance", 3, 0), "capacitance of device 3"),
        (changed("p_max_w", 0, np.inf), "p_max_w of device 0"),
        (changed("f_min_hz", 1, 3e9), r"f_min of device 1 is 3e\+09 Hz, above its f_max of 2e\+09"),
        ({"bandwidth_hz": 0.0}, "fleet.bandwidth_hz is 0.0"),
        ({"t_max_s": np.nan}, "allocation.t_max_s is nan"),
        ({"upload_bits": -1.0}, "allocation.upload_bits"),
        ({"d_gen_max": -1.0}, "allocation.d_gen_max"),
        ({"quality": 0.0}, "allocation.quality"),
        ({"quality": 1.1}, "allocation.quality"),
        ({"error_max": 0.05}, "error_max is 0.05.*gamma = 0.05; raise error_max"),
        ({"error_max": 0.2, "curve": LearningCurve(5, 0.4, 0.2)}, "never falls below"),
    ],
)
def test_what_leaves_no_problem_is_refused(change: dict[str, Any], match: str) -> None:
    with pytest.raises(SettingError, match=match):
        replace(random_cell(4), **change)


def test_plain_values_come_back() -> None:
    cell = random_cell(5, seed=3, quality=0.7, curve=LearningCurve(4, 0.5, 0.01))
    again = Cell.from_dict(json.loads(json.dumps(cell.to_dict())))
    assert again.digest() == cell.digest()
    assert again.curve == cell.curve
    assert again.class_counts.dtype == np.int64
    for name in ("class_counts", "gain", "cycles_per_sample", "f_max_hz"):
        assert (getattr(again, name) == getattr(cell, name)).all()


@pytest.mark.parametrize(
    "change", [{"t_max_s": 61.0}, {"quality": 0.9}, {"curve": LearningCurve(4)}, changed("gain", 0, 1e-10)]
)
def test_every_change_has_another_digest(change: dict[str, Any]) -> None:
    assert replace(random_cell(4), **change).digest() != random_cell(4).digest()


def test_the_error_counts_synthetic_samples_by_their_worth() -> None:
    cell = random_cell(3, quality=0.5)
    samples = cell.d_loc + np.array([0.0, 100.0, 1000.0])
    by_hand = [5 * (local + 0.5 * more) ** -0.4 + 0.05 for local, more in zip(cell.d_loc, (0, 100, 1000), strict=True)]
    assert cell.error(samples) == pytest.approx(sum(by_hand) / 3, rel=1e-14)


@pytest.mark.parametrize("devices", [1, 20, 300])
def test_random_cells_are_the_default_setting(devices: int) -> None:
    cell = random_cell(devices, seed=1)
    assert cell.class_counts.sum() == 2500 * devices
    assert cell.d_loc.min() >= 50
    assert cell.bandwidth_hz == 1e6 * devices
    assert least_bandwidth(cell, np.full(devices, cell.t_max_s / 2)).max() <= 1.2e6
    assert random_cell(devices, seed=1).digest() == cell.digest() != random_cell(devices, seed=2).digest()
