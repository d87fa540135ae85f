"""The dual: exact and certified, weak everywhere, agreed on by others, and sure about what has no plan."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from fl_ray.allocation import inner
from fl_ray.allocation.cell import Cell, random_cell
from fl_ray.allocation.dual import _both_at_once, _Dual, _nearer, _nested, central_split, feasibility, solve_dual
from fl_ray.allocation.learning_curve import LearningCurve
from fl_ray.allocation.search import search
from fl_ray.allocation.settings import AllocationConfig


def gap(cell: Cell) -> float:
    found = solve_dual(cell)
    return float(inner.evaluate(cell, found.rho).energy_j) / found.lower_bound_j - 1


@pytest.mark.parametrize(
    ("devices", "quality", "t_max_s"),
    [(5, 1.0, 60), (20, 1.0, 60), (200, 1.0, 60), (5, 0.6, 60), (20, 0.8, 90), (20, 1.0, 35), (20, 0.5, 600)],
)
def test_the_plan_meets_its_bound(devices: int, quality: float, t_max_s: float) -> None:
    for seed in range(2):
        cell = random_cell(devices, seed, quality=quality, t_max_s=float(t_max_s), error_max=0.26)
        if feasibility(cell).feasible:
            assert -1e-9 <= gap(cell) <= 1e-6


@pytest.mark.parametrize("seed", range(4))
def test_lbfgs_over_the_splits_comes_to_the_same_energy(seed: int) -> None:
    cell = random_cell((5, 20)[seed % 2], seed, quality=(1.0, 0.7)[seed // 2])
    found = search(cell, "gradient", AllocationConfig(evaluations=500))
    assert found.best_j == pytest.approx(solve_dual(cell).lower_bound_j, rel=1e-9)


def test_the_dual_is_a_lower_bound_at_any_prices() -> None:
    rng = np.random.default_rng(0)
    for seed in range(4):
        cell = random_cell(6, seed, quality=(1.0, 0.6)[seed % 2])
        best, dual = solve_dual(cell), _Dual(cell)
        for _ in range(15):
            factors = np.exp(rng.normal(0, 1.5, 2))
            value = dual.value(best.error_price_j * factors[0], best.band_price_j_hz * factors[1])
            assert value <= best.lower_bound_j * (1 + 1e-9)


def fixed_frequency(cell: Cell) -> Cell:
    return replace(cell, f_min_hz=np.full(cell.devices, 1.3e9), f_max_hz=np.full(cell.devices, 1.3e9))


@pytest.mark.parametrize(
    "cell",
    [
        random_cell(20, 1),
        random_cell(20, 2, quality=0.5),
        replace(random_cell(20, 7), t_max_s=30.0),  # a device is best off above a split that its own data just allow
        replace(random_cell(20, 3), t_max_s=300.0),
        fixed_frequency(random_cell(20, 4)),
        replace(random_cell(20, 5), d_gen_max=0.0, error_max=0.9),
    ],
    ids=["default", "quality", "tight", "long", "fixed frequency", "no synthesis"],
)
def test_every_device_is_at_the_least_of_its_lagrangian(cell: Cell) -> None:
    """Otherwise the bound were none: against 4,000 splits of each device."""
    dual, best = _Dual(cell), solve_dual(cell)

    def lagrangian(rho: np.ndarray, error_price: float, band_price: float) -> np.ndarray:
        compute_s, upload_s = rho * cell.t_max_s, (1 - rho) * cell.t_max_s
        samples = inner.best_samples(cell, compute_s, np.float64(error_price))
        least = inner.least_bandwidth(cell, upload_s)
        band = inner.best_bandwidth(cell, upload_s, np.float64(band_price), least)
        seen = cell.d_loc + cell.quality * (samples - cell.d_loc)
        energy = inner.computing_energy(cell, samples, compute_s)[1] + inner.uplink_energy(cell, band, upload_s)[1]
        return energy + error_price * cell.curve.error(seen) / cell.devices + band_price * band

    grid = dual.low + np.linspace(0, 1 - 1e-6, 4000)[:, None] * (dual.high - dual.low)
    for factor in (0.2, 1.0, 5.0):
        prices = factor * best.error_price_j, best.band_price_j_hz / factor
        rho, _, _ = dual.at(*prices)
        assert (lagrangian(rho, *prices) <= lagrangian(grid, *prices).min(axis=0) * (1 + 1e-9)).all()


def test_both_ways_to_the_prices_agree() -> None:
    for seed in range(2):
        cell = random_cell(8, seed)
        best, dual = solve_dual(cell), _Dual(cell)
        guess = 3 * best.error_price_j, best.band_price_j_hz / 3
        assert _both_at_once(dual, *guess) == pytest.approx(_nested(dual, *guess), rel=1e-5)


@pytest.mark.parametrize("quality", [1.0, 0.5])
def test_first_guesses_at_which_all_devices_are_at_their_limits_do(quality: float) -> None:
    cell = replace(random_cell(6, 0), t_max_s=600.0, quality=quality)
    dual, best = _Dual(cell), solve_dual(cell)
    guess = 1e3 * best.error_price_j, best.band_price_j_hz
    assert _both_at_once(dual, *guess) is None
    found = _both_at_once(dual, *_nearer(dual, *guess))
    assert found == pytest.approx((best.error_price_j, best.band_price_j_hz), rel=1e-5)


def test_prices_are_what_looser_limits_save() -> None:
    cell = random_cell(10, 4)
    best = solve_dual(cell)
    for limit, price in (("error_max", best.error_price_j), ("bandwidth_hz", best.band_price_j_hz)):
        value, step = getattr(cell, limit), 1e-4 * getattr(cell, limit)
        energies = [solve_dual(replace(cell, **{limit: value + sign * step})).lower_bound_j for sign in (-1, 1)]
        assert price == pytest.approx((energies[0] - energies[1]) / (2 * step), rel=1e-3)


def _by_slsqp(cell: Cell, start: np.ndarray) -> float:
    """P1 as it stands, over log D, log f, log b, log p of all devices, by a general solver."""
    devices = cell.devices

    def parts(x: np.ndarray) -> tuple[np.ndarray, ...]:
        samples, frequency, band, power = np.exp(x).reshape(4, devices) * np.array([[1e3], [1e9], [1e6], [1e-3]])
        rate = band * np.log2(1 + power * cell.gain / (cell.noise_w_hz * band))
        return samples, frequency, band, power, cell.cycles * samples / frequency, cell.upload_bits / rate

    def energy(x: np.ndarray) -> float:
        samples, frequency, _, power, _, send_s = parts(x)
        return float((cell.capacitance * cell.cycles * samples * frequency**2 + power * send_s).sum())

    def error(samples: np.ndarray) -> float:
        seen = cell.d_loc + cell.quality * (samples - cell.d_loc)
        return float((cell.curve.alpha * seen**-cell.curve.beta + cell.curve.gamma).mean())

    def slack(x: np.ndarray) -> np.ndarray:
        samples, _, band, _, train_s, send_s = parts(x)
        times = np.log(cell.t_max_s / (train_s + send_s))
        return np.array([*times, np.log(cell.error_max / error(samples)), np.log(cell.bandwidth_hz / band.sum())])

    d_max, none = cell.d_loc + cell.d_gen_max, np.full(devices, -np.inf)
    low = np.concatenate([np.log(cell.d_loc / 1e3), np.log(cell.f_min_hz / 1e9), none, none])
    free = np.full(devices, np.inf)
    high = np.concatenate([np.log(d_max / 1e3), np.log(cell.f_max_hz / 1e9), free, np.log(cell.p_max_w / 1e-3)])
    found = minimize(
        energy,
        start,
        method="SLSQP",
        bounds=list(zip(low, high, strict=True)),
        constraints={"type": "ineq", "fun": slack},
        options={"maxiter": 1000, "ftol": 1e-14},
    )
    assert slack(found.x).min() > -1e-7
    return float(found.fun)


@pytest.mark.parametrize(("devices", "quality"), [(2, 1.0), (3, 1.0), (3, 0.6)])
def test_a_general_solver_of_the_whole_problem_finds_no_better(devices: int, quality: float) -> None:
    """It starts from a plan that is feasible and far from the best: evenly shared, at the central splits."""
    for seed in range(3):
        cell = random_cell(devices, seed, quality=quality)
        at = inner.evaluate(cell, central_split(cell))
        columns = at.computing.samples / 1e3, at.computing.frequency_hz / 1e9
        columns += at.uplink.bandwidth_hz / 1e6, at.uplink.power_w / 1e-3
        found = _by_slsqp(cell, np.log(np.concatenate(columns)))
        assert found == pytest.approx(solve_dual(cell).lower_bound_j, rel=1e-5)


@pytest.mark.filterwarnings("error")
def test_uploads_of_a_billionth_of_the_time_are_planned_for() -> None:
    for bits in (1e3, 1e5, 1e7):
        cell = replace(random_cell(10, 1), upload_bits=bits)
        assert -1e-9 <= gap(cell) <= 1e-6


def test_where_local_data_are_enough_nobody_pays_for_the_error() -> None:
    cell = replace(random_cell(10, 1), error_max=0.9)
    found = solve_dual(cell)
    assert found.error_price_j == 0
    assert (inner.evaluate(cell, found.rho).computing.samples == cell.d_loc).all()
    assert -1e-9 <= gap(cell) <= 1e-6


# ---- no plan


def narrow(cell: Cell) -> Cell:
    return replace(cell, bandwidth_hz=cell.bandwidth_hz / 8)


def far(cell: Cell) -> Cell:
    """Device 2 has next to no channel."""
    return replace(cell, gain=cell.gain * np.where(np.arange(cell.devices) == 2, 1e-6, 1))


def slow(cell: Cell) -> Cell:
    """Device 1 can't train on its own data in time."""
    speed = np.where(np.arange(cell.devices) == 1, 0.005, 1)
    return replace(cell, f_max_hz=cell.f_max_hz * speed, f_min_hz=cell.f_min_hz * speed)


def demanding(cell: Cell) -> Cell:
    return replace(cell, error_max=0.19)


def hurried(cell: Cell) -> Cell:
    return replace(cell, t_max_s=12.0)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (narrow, r"the band B = 1 MHz is too narrow: .* need \d"),
        (far, "Tmax = 60 s is too short for device 2: the upload at p_max alone"),
        (slow, "Tmax = 60 s is too short for device 1: computing on the local data at f_max alone"),
        (demanding, "Delta_max = 0.19 can't be reached: with d_gen_max = 5000.*the error is 0.19"),
        (hurried, "too"),
    ],
)
def test_what_has_no_plan_says_why_and_what_would_do(change: Callable[[Cell], Cell], match: str) -> None:
    cell = change(random_cell(8, 0))
    found = feasibility(cell)
    assert not found.feasible
    assert re.search(match, "; ".join(found.reasons)), found.reasons
    if np.isfinite(found.least_time_s):
        assert feasibility(replace(cell, t_max_s=found.least_time_s)).feasible
        assert not feasibility(replace(cell, t_max_s=found.least_time_s * (1 - 1e-5))).feasible
        assert -1e-9 <= gap(replace(cell, t_max_s=found.least_time_s * 1.001)) <= 1e-6
    if np.isfinite(found.least_error):
        assert feasibility(replace(cell, error_max=found.least_error * (1 + 1e-9))).feasible
        assert not feasibility(replace(cell, error_max=found.least_error * (1 - 1e-6))).feasible
        assert -1e-9 <= gap(replace(cell, error_max=found.least_error * 1.001)) <= 1e-6
    assert np.isfinite(found.least_time_s) or np.isfinite(found.least_error)


def test_no_time_is_enough_for_an_error_that_all_data_do_not_bring() -> None:
    cell = replace(random_cell(5, 0), error_max=0.1, d_gen_max=10.0)
    found = feasibility(cell)
    assert not found.feasible
    assert np.isinf(found.least_time_s)
    assert feasibility(replace(cell, error_max=found.least_error * (1 + 1e-9))).feasible


def test_the_central_split_is_feasible_with_room() -> None:
    for seed in range(10):
        cell = random_cell(12, seed, t_max_s=45.0)
        if feasibility(cell).feasible:
            assert np.isfinite(inner.evaluate(cell, central_split(cell)).energy_j)


@pytest.mark.parametrize(("seed", "t_max_s"), [(0, 30.0), (4, 40.0)])
def test_in_tight_cells_a_search_from_nowhere_finds_nothing_where_others_do(seed: int, t_max_s: float) -> None:
    cell = replace(random_cell(20, seed), t_max_s=t_max_s)
    lost = search(cell, "ce", AllocationConfig(evaluations=1000, feasible_start=False))
    assert len(lost.history_j) == 1000
    assert lost.best_rho is None
    best = solve_dual(cell).lower_bound_j
    assert -1e-9 <= gap(cell) <= 1e-6
    for name, most in (("ce", 0.02), ("gradient", 1e-9)):
        found = search(cell, name, AllocationConfig(evaluations=2000))
        assert -1e-9 <= found.best_j / best - 1 <= most


def test_other_curves_are_planned_for_as_well() -> None:
    for curve in (LearningCurve(2, 0.2, 0.0), LearningCurve(80, 0.9, 0.1)):
        cell = random_cell(8, 2, curve=curve)
        reachable = feasibility(replace(cell, error_max=curve.gamma + 1e-6)).least_error
        local = float(cell.error(cell.d_loc))
        assert -1e-9 <= gap(replace(cell, error_max=(reachable + local) / 2)) <= 1e-6
