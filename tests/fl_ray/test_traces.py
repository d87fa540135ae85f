"""Device traces: FedScale's formats read with care, devices dealt to clients, and windows against a scan in time."""

import json
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_ray.config import FleetConfig, TierConfig, TraceConfig
from fl_ray.devices.availability import Availability, shifted_windows
from fl_ray.devices.cost import round_cost
from fl_ray.devices.fleet import draw_fleet
from fl_ray.devices.traces import assign, read_availability, read_capacity
from fl_ray.errors import SettingError

CAPACITY = {7: {"computation": 20.0, "communication": 1000.0}, 9: {"computation": 50, "communication": 4000}}
BEHAVIOUR = {
    1: {"duration": 30, "inactive": [20, 60], "finish_time": 100, "active": [10, 40], "model": "CPH1801"},
    2: {"duration": 10, "inactive": [10, 130], "finish_time": 100, "active": [0, 90], "model": "A"},
    3: {"duration": 0, "inactive": [5], "finish_time": 50, "active": [5], "model": "B"},
}


def stored(path: Path, content: Any) -> str:
    if path.suffix == ".json":
        path.write_text(json.dumps(content))
    else:
        path.write_bytes(pickle.dumps(content))
    return str(path)


@pytest.mark.parametrize("name", ["trace", "trace.json"])
def test_capacities_by_hand(tmp_path: Path, name: str) -> None:
    path = stored(tmp_path / name, CAPACITY)
    seconds, rates = read_capacity(path)
    assert seconds == pytest.approx([0.02, 0.05])
    assert rates == pytest.approx([1e6, 4e6])
    config = FleetConfig(tiers=[TierConfig(frequency_hz=[1e9, 2e9])], trace=TraceConfig(capacity=path))
    fleet, without = draw_fleet(config, 2, 3), draw_fleet(FleetConfig(tiers=config.tiers), 2, 3)
    assert (fleet.frequency_hz == without.frequency_hz).all()
    assert sorted(fleet.rate_bps) == [1e6, 4e6]
    cost = round_cost(config, fleet, np.arange(2), np.array([10, 10]), 2, 1e5, 1e5)
    slow = int(np.argmin(fleet.rate_bps))  # device 7: 2 epochs x 10 samples x 3 x 20 ms; 0.8 Mbit at 1 Mbit/s each way
    assert cost.t_cmp_s[[slow, 1 - slow]] == pytest.approx([1.2, 3.0])
    assert cost.t_up_s[[slow, 1 - slow]] == pytest.approx([0.8, 0.2])
    assert cost.t_down_s == pytest.approx(cost.t_up_s)
    assert cost.e_cmp_j == pytest.approx(fleet.capacitance * cost.t_cmp_s * fleet.frequency_hz**3)  # the model's


@pytest.mark.parametrize("name", ["trace", "trace.json"])
def test_availability_by_hand(tmp_path: Path, name: str) -> None:
    path = stored(tmp_path / name, BEHAVIOUR)
    found = read_availability(path)
    at = {0: [0, 1, 0], 15: [1, 0, 0], 19.9: [1, 0, 0], 45: [1, 0, 0], 95: [0, 1, 0], 103: [0, 1, 0], 110: [1, 0, 0]}
    for time, expected in at.items():
        assert found.mask(time).tolist() == [bool(there) for there in expected], time
    assert found.closes_s(np.array([0, 1]), 15.0).tolist() == [20.0, 15.0]
    assert found.closes_s(np.array([1]), 95.0) == pytest.approx([110.0])  # the window goes over the period's end
    fleet = draw_fleet(FleetConfig(trace=TraceConfig(availability=path)), 50, 0)
    assert fleet.rate_bps is None
    assert fleet.availability.mask(15.0).sum() == (fleet.availability.starts == 10).sum() > 5


def test_devices_are_dealt_once_while_there_are_enough() -> None:
    rng = np.random.default_rng(0)
    assert len(set(assign(50, 40, rng).tolist())) == 40
    many = assign(5, 1000, rng)
    assert np.bincount(many, minlength=5).min() > 150


def test_the_draw_has_a_key(tmp_path: Path) -> None:
    content = {str(device): {"computation": 1 + device, "communication": 10} for device in range(100)}
    config = FleetConfig(trace=TraceConfig(capacity=stored(tmp_path / "c.json", content)))
    one, same, other = (draw_fleet(config, 60, seed) for seed in (1, 1, 2))
    assert (one.cycles_per_sample == same.cycles_per_sample).all()
    assert (one.cycles_per_sample != other.cycles_per_sample).any()


class Harmful:
    def __reduce__(self) -> tuple:
        return os.mkdir, ("harm",)


def test_a_pickle_can_call_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for content in (Harmful(), {1: {"computation": Harmful()}}, {1: {"computation": np.float64(3)}}):
        with pytest.raises(SettingError, match=r"fleet\.trace\.capacity .*only plain numbers"):
            read_capacity(stored(tmp_path / "bad", content))
    assert not (tmp_path / "harm").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({}, "holds no devices"),
        ([1, 2], "mapping by device"),
        ({1: 5}, "device 1 is 5"),
        ({1: {"computation": 3.0}}, "device 1 has no 'communication'; it has computation"),
        ({1: {"computation": -3.0, "communication": 1.0}}, "computation of device 1 is -3.0"),
        ({1: {"computation": 3.0, "communication": float("nan")}}, "communication of device 1 is nan"),
        ({1: {"computation": True, "communication": 1.0}}, "computation of device 1 is True"),
    ],
)
def test_bad_capacities_are_refused(tmp_path: Path, content: Any, told: str) -> None:
    with pytest.raises(SettingError, match=told):
        read_capacity(stored(tmp_path / "bad", content))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"active": None}, "active of device 1 is None"),
        ({"active": [10]}, "1 times in active, but 2 in inactive"),
        ({"inactive": [20, -60]}, "inactive of device 1"),
        ({"finish_time": 0}, "finish_time of device 1 is 0"),
    ],
)
def test_bad_windows_are_refused(tmp_path: Path, change: dict, told: str) -> None:
    with pytest.raises(SettingError, match=told):
        read_availability(stored(tmp_path / "bad", {1: BEHAVIOUR[1] | change}))


def test_files_that_are_no_traces_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match=r"fleet\.trace\.capacity .*No such file"):
        read_capacity(str(tmp_path / "missing"))
    (tmp_path / "text").write_text("no pickle")
    with pytest.raises(SettingError, match="is not a pickle"):
        read_capacity(str(tmp_path / "text"))
    (tmp_path / "empty").touch()
    with pytest.raises(SettingError, match="is not a pickle"):
        read_capacity(str(tmp_path / "empty"))
    (tmp_path / "text.json").write_text("{")
    with pytest.raises(SettingError, match="is not JSON"):
        read_availability(str(tmp_path / "text.json"))
    never = stored(tmp_path / "never", {3: BEHAVIOUR[3]})
    with pytest.raises(SettingError, match="no device of this run is ever available"):
        draw_fleet(FleetConfig(trace=TraceConfig(availability=never)), 4, 0)


def random_windows(rng: np.random.Generator) -> tuple[list[list[tuple[int, int]]], np.ndarray]:
    periods = rng.integers(5, 12, 8)
    windows = []
    for period in periods.tolist():
        cuts = np.sort(rng.choice(period + 1, 2 * rng.integers(0, 3), replace=False)).reshape(-1, 2)
        windows.append([(int(start), int(end)) for start, end in cuts])
    windows[0], windows[1] = [(0, int(periods[0]))], [(0, 2), (3, int(periods[1]))]  # always; over the period's end
    windows[2] = [(3, 4), (1, 3), (0, 0)]  # out of order, touching and empty
    return windows, periods


def scan(own: list[tuple[int, int]], period: int, time: int) -> bool:
    return any(start <= time % period < end for start, end in own)


@pytest.mark.parametrize("seed", range(5))
def test_windows_against_a_scan(seed: int) -> None:
    windows, periods = random_windows(np.random.default_rng(seed))
    availability = Availability.from_windows(windows, periods)
    for time in range(40):
        expected = [scan(own, period, time) for own, period in zip(windows, periods.tolist(), strict=True)]
        assert availability.mask(float(time)).tolist() == expected
        there = np.flatnonzero(expected)
        for device, closes in zip(there.tolist(), availability.closes_s(there, float(time)), strict=True):
            ends = [t for t in range(time, time + 30) if not scan(windows[device], int(periods[device]), t)]
            assert closes == pytest.approx(ends[0] if ends else np.inf), (device, time)
        others = [3, 4, 5, 6, 7]
        opens = [t for t in range(time, time + 30) if any(scan(windows[d], int(periods[d]), t) for d in others)]
        assert availability.next_s(float(time), [0, 1, 2]) == pytest.approx(opens[0] if opens else np.inf)
    taken = availability.take(np.array([4, 1, 1]))
    assert taken.mask(5.0).tolist() == availability.mask(5.0)[[4, 1, 1]].tolist()
    assert (taken.period_s == periods[[4, 1, 1]]).all()


def test_somebody_is_there_when_the_wait_is_over() -> None:
    """Rounding must not end a wait a moment too early."""
    rng = np.random.default_rng(0)
    for number in range(300):
        availability = shifted_windows(2, float(rng.uniform(0.1, 1e5)), 0.01, rng)
        time = float(rng.uniform(0, 1e7))
        opens = availability.next_s(time)
        assert opens >= time
        assert availability.mask(opens).any(), number
        assert (availability.closes_s(np.flatnonzero(availability.mask(opens)), opens) >= opens).all()


def test_shifted_windows_last_their_fraction() -> None:
    availability = shifted_windows(2000, 100.0, 0.3, np.random.default_rng(1))
    shares = [availability.mask(time).mean() for time in np.arange(0, 100, 7)]
    assert shares == pytest.approx([0.3] * len(shares), abs=0.05)
    assert np.bincount(availability._owners, availability.ends - availability.starts) == pytest.approx(30.0)
    assert np.isinf(shifted_windows(3, 10.0, 1.0, np.random.default_rng(1)).closes_s(np.arange(3), 4.0)).all()
