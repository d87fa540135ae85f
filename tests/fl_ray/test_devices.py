"""The cost model against numbers computed by hand, fleets and the ledger."""

import math

import numpy as np
import pytest

from fl_ray.config import FleetConfig, TierConfig
from fl_ray.devices.cost import Ledger, round_cost, server_time_s
from fl_ray.devices.fleet import Fleet, draw_fleet, path_gain
from fl_ray.errors import SettingError


def two_devices() -> Fleet:
    return Fleet(
        tier=np.zeros(2, dtype=np.int16),
        frequency_hz=np.array([1e9, 2e9]),
        cycles_per_sample=np.array([1e7, 1e7]),
        capacitance=np.array([2e-28, 2e-28]),
        power_w=np.array([0.1, 0.2]),
        gain=np.array([1e-10, 1e-11]),
        bandwidth_share=np.array([1.0, 3.0]),
        distance_m=np.array([100.0, 200.0]),
    )


def test_round_cost_by_hand() -> None:
    config = FleetConfig(bandwidth_hz=4e6, noise_dbm_hz=-174, server_power_w=1.0)
    cost = round_cost(config, two_devices(), np.array([0, 1]), np.array([100, 50]), 2, 1e6, 5e5)
    # compute: 2 epochs x 1e7 cycles x samples / f; energy: capacitance x cycles x f^2
    assert cost.t_cmp_s == pytest.approx([2.0, 0.5])
    assert cost.e_cmp_j == pytest.approx([2e-28 * 2e9 * 1e18, 2e-28 * 1e9 * 4e18])
    noise = 10 ** (-20.4)  # -174 dBm/Hz in W/Hz
    rates = [1e6 * math.log2(1 + 0.1 * 1e-10 / (noise * 1e6)), 3e6 * math.log2(1 + 0.2 * 1e-11 / (noise * 3e6))]
    assert cost.t_up_s == pytest.approx([4e6 / rates[0], 4e6 / rates[1]])
    assert cost.e_up_j == pytest.approx([0.1 * 4e6 / rates[0], 0.2 * 4e6 / rates[1]])
    down = [1e6 * math.log2(1 + 0.25 * 1e-10 / (noise * 1e6)), 3e6 * math.log2(1 + 0.75 * 1e-11 / (noise * 3e6))]
    assert cost.t_down_s == pytest.approx([8e6 / down[0], 8e6 / down[1]])
    assert cost.latency_s == pytest.approx(cost.t_down_s + cost.t_cmp_s + cost.t_up_s)
    assert cost.energy_j == pytest.approx(cost.e_cmp_j.sum() + cost.e_up_j.sum())


def test_the_band_is_split_over_the_cohort_only() -> None:
    config = FleetConfig()
    alone = round_cost(config, two_devices(), np.array([1]), np.array([1]), 1, 0.0, 1e6)
    both = round_cost(config, two_devices(), np.array([0, 1]), np.array([1, 1]), 1, 0.0, 1e6)
    assert alone.t_up_s[0] < both.t_up_s[1]


def test_path_gain_at_one_kilometre() -> None:
    assert path_gain(np.array([1000.0]), np.array([0.0]))[0] == pytest.approx(10**-12.81)
    assert path_gain(np.array([100.0]), np.array([0.0]))[0] == pytest.approx(10 ** -(12.81 - 3.76))


def test_the_ledger_advances_and_comes_back_from_a_checkpoint() -> None:
    config = FleetConfig(bandwidth_hz=4e6)
    cost = round_cost(config, two_devices(), np.array([0, 1]), np.array([100, 50]), 1, 1e5, 1e5)
    ledger = Ledger()
    ledger.advance(float(cost.latency_s.max()), cost.energy_j, 10, 20)
    assert ledger.virtual_time_s == pytest.approx(cost.latency_s.max())
    ledger.advance(1e-9)
    assert ledger.virtual_time_s == pytest.approx(cost.latency_s.max())  # a clock never goes back
    assert ledger.energy_j == pytest.approx(cost.energy_j)
    assert Ledger(**ledger.state()) == ledger
    assert server_time_s(FleetConfig(server_frequency_hz=1e9), two_devices(), 300) == pytest.approx(3.0)


def test_fleet_is_drawn_by_tier_and_seed() -> None:
    tiers = [
        TierConfig("fast", fraction=0.25, frequency_hz=3e9, bandwidth=2),
        TierConfig("slow", fraction=0.75, frequency_hz=[1e8, 2e8]),
    ]
    config = FleetConfig(tiers=tiers)
    fleet, again = draw_fleet(config, 40, 5), draw_fleet(config, 40, 5)
    assert np.bincount(fleet.tier).tolist() == [10, 30]
    assert (fleet.frequency_hz == again.frequency_hz).all()
    assert (fleet.frequency_hz[fleet.tier == 0] == 3e9).all()
    assert ((fleet.frequency_hz[fleet.tier == 1] >= 1e8) & (fleet.frequency_hz[fleet.tier == 1] <= 2e8)).all()
    assert (fleet.bandwidth_share == np.where(fleet.tier == 0, 2.0, 1.0)).all()
    assert (draw_fleet(config, 40, 6).gain != fleet.gain).any()


@pytest.mark.parametrize(
    "bad",
    [
        lambda: TierConfig(frequency_hz=[2.0, 1.0]),
        lambda: TierConfig(cpus=0),
        lambda: TierConfig(power_w=-1),
        lambda: FleetConfig(tiers=[]),
        lambda: FleetConfig(tiers=[TierConfig(), TierConfig()]),
        lambda: FleetConfig(bandwidth_hz=0),
    ],
)
def test_bad_fleets_are_refused(bad: object) -> None:
    with pytest.raises(SettingError, match="fleet"):
        bad()
