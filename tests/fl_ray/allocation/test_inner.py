"""The inner problems' closed forms against cvxpy, scipy and finite differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from fl_ray.allocation import inner
from fl_ray.allocation.cell import Cell, random_cell
from fl_ray.allocation.dual import central_split
from fl_ray.allocation.learning_curve import LearningCurve
from fl_ray.allocation.reference import ReferenceInner
from fl_ray.allocation.search import gradient

SPLITS = 20  # of each of ten cells


def some_cell(number: int) -> Cell:
    """Cells of several sizes, limits and curves; every other one counts a synthetic sample as 0.6."""
    rng = np.random.default_rng(number)
    devices = int(rng.integers(3, 9))
    curve = LearningCurve(rng.uniform(3, 6), rng.uniform(0.3, 0.5), rng.uniform(0, 0.08))
    cell = random_cell(devices, number, quality=(1.0, 0.6)[number % 2], curve=curve, t_max_s=rng.uniform(35, 90))
    error = float(cell.error(cell.d_loc))
    return replace(
        cell,
        error_max=max(error * rng.uniform(0.72, 0.99), curve.gamma + 0.02),
        d_gen_max=rng.uniform(1500, 6000),
        f_min_hz=rng.uniform(0.2e9, 0.9e9, devices),
        f_max_hz=rng.uniform(1e9, 2.5e9, devices),
        bandwidth_hz=devices * rng.uniform(0.3e6, 1.5e6),
    )


def some_splits(cell: Cell, number: int) -> np.ndarray:
    rng = np.random.default_rng(number + 100)
    return (rng.uniform(0.15, 0.85, (SPLITS, 1)) + rng.uniform(-0.12, 0.12, (SPLITS, cell.devices))).clip(0.03, 0.97)


def solvable(cell: Cell, rho: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which splits leave the computing problem a solution, and which the uplink's; each [splits]."""
    low, high = inner.sample_limits(cell, rho * cell.t_max_s)
    computable = (low <= high).all(axis=1) & (cell.error(np.maximum(low, high)) <= cell.error_max)
    least = inner.least_bandwidth(cell, (1 - rho) * cell.t_max_s)
    return computable, least.sum(axis=1) <= cell.bandwidth_hz


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
@pytest.mark.parametrize("number", range(10))
def test_the_closed_forms_are_the_optima_of_cvxpy(number: int) -> None:
    cell = some_cell(number)
    reference, rho = ReferenceInner(cell), some_splits(cell, number)
    found = inner.evaluate(cell, rho)
    compute_s, upload_s = rho * cell.t_max_s, (1 - rho) * cell.t_max_s
    computable, sendable = solvable(cell, rho)
    assert ((found.violation <= 0) == (computable & sendable)).all()
    assert (np.isfinite(found.energy_j) == (computable & sendable)).all()
    for place in range(SPLITS):
        computing = reference.computing_energy(compute_s[place])
        assert np.isfinite(computing) == computable[place]
        if computable[place]:
            closed = inner.computing(cell, compute_s[place])
            assert closed.energy_j.sum() == pytest.approx(computing, rel=1e-6)
            assert closed.error <= cell.error_max * (1 + 1e-12)
        uplink = reference.uplink_energy(upload_s[place])
        assert np.isfinite(uplink) == sendable[place]
        if sendable[place]:
            closed = inner.uplink(cell, upload_s[place])
            assert closed.energy_j.sum() == pytest.approx(uplink, rel=1e-6)
            assert closed.bandwidth_hz.sum() <= cell.bandwidth_hz * (1 + 1e-12)
            assert (closed.power_w <= cell.p_max_w * (1 + 1e-9)).all()


def test_those_instances_are_of_all_kinds() -> None:
    cells = [some_cell(number) for number in range(10)]
    found = [solvable(cell, some_splits(cell, number)) for number, cell in enumerate(cells)]
    for kind in zip(*found, strict=True):
        assert 40 <= np.concatenate(kind).sum() <= 160


@pytest.mark.parametrize("quality", [1.0, 0.6])
def test_samples_on_every_branch_are_the_minimum(quality: float) -> None:
    """Linear, at the kink, cubic, and at either limit: against a scalar search of the same Lagrangian."""
    counts = np.full((1, 10), 40)
    cell = replace(random_cell(1, 5), cycles_per_sample=np.array([8e6]), class_counts=counts, quality=quality)
    branches = set()
    for time_s in (5.0, 20.0, 70.0):
        low, high = (float(limit[0]) for limit in inner.sample_limits(cell, np.array([time_s])))
        for price in np.geomspace(1e-3, 1e7, 40):

            def lagrangian(samples: float, time_s: float = time_s, price: float = price) -> float:
                at = np.array([samples])
                return float(inner.computing_energy(cell, at, np.array([time_s]))[1][0] + price * cell.error(at))

            found = float(inner.best_samples(cell, np.array([time_s]), np.float64(price))[0])
            searched = minimize_scalar(lagrangian, bounds=(low, high), method="bounded", options={"xatol": 1e-6})
            best = min(searched.fun, lagrangian(low), lagrangian(high))
            assert lagrangian(found) <= best * (1 + 1e-12)
            frequency = cell.cycles[0] * found / time_s / cell.f_min_hz[0]
            inside = "kink" if abs(frequency - 1) < 1e-9 else "linear" if frequency < 1 else "cubic"
            branches.add("least" if found == low else "most" if found == high else inside)
    assert branches == {"least", "most", "kink", "linear", "cubic"}


def test_bandwidth_is_the_minimum_for_its_price() -> None:
    cell = random_cell(6, 2)
    time_s = np.full(6, 25.0)
    least = inner.least_bandwidth(cell, time_s)
    kinds = set()
    for price in np.geomspace(1e-10, 1e-4, 25):
        found = inner.best_bandwidth(cell, time_s, np.float64(price), least)
        for device in range(6):

            def lagrangian(logarithm: float, device: int = device, price: float = price) -> float:
                bandwidth = np.full(6, np.exp(logarithm))
                return float(inner.uplink_energy(cell, bandwidth, time_s)[1][device] + price * np.exp(logarithm))

            bounds = np.log(least[device]), np.log(least[device]) + 12
            best = min(minimize_scalar(lagrangian, bounds=bounds, method="bounded").fun, lagrangian(bounds[0]))
            assert lagrangian(np.log(found[device])) <= best * (1 + 1e-9)
            kinds.add(bool(found[device] == least[device]))
    assert kinds == {True, False}


def test_the_least_bandwidth_makes_the_rate_at_full_power() -> None:
    """Also next to the time below which no bandwidth is enough, where Lambert's W loses its digits."""
    cell = random_cell(1, 0)
    top = float(cell.p_max_w[0] * cell.gain[0] / cell.noise_w_hz)
    shortest_s = cell.upload_bits * np.log(2) / top
    for above in (1e-9, 1e-7, 0.99e-4, 1.01e-4, 1e-3, 0.1, 1.0, 30.0, 1e4):
        time_s = shortest_s * (1 + above)
        found = float(inner.least_bandwidth(cell, np.array([time_s]))[0])
        rate = found * np.log1p(top / found) / np.log(2)
        assert rate * time_s == pytest.approx(cell.upload_bits, rel=1e-11)
        if above > 1e-7:  # nearer, the rate hardly depends on the band: another one would do as well
            narrower = found * 0.999
            assert narrower * np.log1p(top / narrower) / np.log(2) * time_s < cell.upload_bits
    for time_s in (shortest_s, shortest_s / 2):
        assert np.isinf(inner.least_bandwidth(cell, np.array([time_s]))[0])


def test_the_slope_of_the_least_bandwidth() -> None:
    cell = random_cell(4, 1)
    for time_s in (np.full(4, 8.0), np.full(4, 30.0), np.full(4, 3000.0)):
        slope = inner.least_bandwidth_slope(cell, time_s, inner.least_bandwidth(cell, time_s))
        around = [inner.least_bandwidth(cell, time_s * (1 + step)) for step in (-1e-5, 1e-5)]
        assert slope == pytest.approx((around[0] - around[1]) / (2e-5 * time_s), rel=1e-6)


@pytest.mark.parametrize("number", range(6))
def test_the_gradient_is_that_of_finite_differences(number: int) -> None:
    cell = random_cell(6, number, quality=(1.0, 0.7)[number % 2], t_max_s=(40.0, 60.0, 120.0)[number % 3])
    rho = central_split(cell)
    slope = gradient(cell, rho[None], inner.evaluate(cell, rho[None]))[0]
    step = 1e-6
    moved = np.concatenate([rho + step * np.eye(6), rho - step * np.eye(6)])
    energies = inner.evaluate(cell, moved).energy_j
    differences = (energies[:6] - energies[6:]) / (2 * step)
    assert slope == pytest.approx(differences, rel=2e-5, abs=1e-6 * np.abs(slope).max())


def test_candidates_are_solved_together_as_one_by_one() -> None:
    cell = random_cell(8, 3)
    rho = np.random.default_rng(0).uniform(0.2, 0.9, (12, 8))
    together, alone = inner.evaluate(cell, rho), [inner.evaluate(cell, each) for each in rho]
    assert together.energy_j == pytest.approx([float(each.energy_j) for each in alone], rel=1e-12)
    assert together.violation == pytest.approx([float(each.violation) for each in alone], rel=1e-12)
    assert 0 < np.isfinite(together.energy_j).sum() < 12
