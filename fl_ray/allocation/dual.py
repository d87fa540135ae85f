"""P1 solved by its dual: exact, with a bound that certifies any plan, and with what is wrong where there is no plan.

Beyond the paper. With one multiplier on the error (lambda) and one on the band (mu), the Lagrangian falls apart into a
problem in rho_i alone for each device:

    min over rho_i  A_i(rho_i Tmax; lambda) + C_i((1 - rho_i) Tmax; mu),
    A = min over D of E_cmp + lambda Delta_i(D),    C = min over b of E_com + mu b.

A is jointly convex in (D, T) before the minimisation, so convex in T, and decreasing. C is convex in log T (E_com and b
are convex in the logarithms of b and T) and decreasing, so convex in T, too. Each device's problem is therefore convex
in rho_i, its minimum is where A' = C', and the dual has no gap; this holds for q < 1 as for q = 1. Its value at *any*
multipliers is a lower bound on the energy of every plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import root

from fl_ray.allocation import inner
from fl_ray.allocation.cell import Cell
from fl_ray.allocation.roots import find_roots

__all__ = ["DualSolution", "Feasibility", "central_split", "feasibility", "solve_dual", "split_limits"]

_LN2 = np.log(2.0)
_PRECISE = 1e-8  # of splits and prices: the gap is of second order in both


@dataclass(frozen=True)
class DualSolution:
    """Time splits rho [devices], multipliers, and the dual's value there: no plan needs less [J]."""

    rho: np.ndarray
    error_price_j: float
    band_price_j_hz: float
    lower_bound_j: float


def split_limits(cell: Cell) -> tuple[np.ndarray, np.ndarray]:
    """The smallest and largest time split of each device [devices]: enough to train on its own data at f_max, and
    enough left to upload at p_max over any band. The smallest is above the largest where there is none.
    """
    low = cell.cycles * cell.d_loc / (cell.f_max_hz * cell.t_max_s)
    least_s = cell.upload_bits * _LN2 * cell.noise_w_hz / (cell.p_max_w * cell.gain)
    # What is left of 1 must have digits enough: a small model's upload can take a billionth of Tmax.
    return low, 1 - (least_s * (1 + 1e-9) / cell.t_max_s + 1e-12)


class _Dual:
    """The Lagrangian's minimisers at given multipliers."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        self.low, self.high = split_limits(cell)

    def at(self, error_price: float, band_price: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """rho, samples and bandwidth, each [devices]."""
        cell, whole = self.cell, self.cell.t_max_s

        def parts(rho: np.ndarray) -> tuple[np.ndarray, ...]:
            samples = inner.best_samples(cell, rho * whole, np.float64(error_price))
            least = inner.least_bandwidth(cell, (1 - rho) * whole)
            bandwidth = inner.best_bandwidth(cell, (1 - rho) * whole, np.float64(band_price), least)
            return samples, least, bandwidth

        def slope(rho: np.ndarray) -> np.ndarray:
            samples, least, bandwidth = parts(rho)
            compute = inner.computing_slope(cell, samples, rho * whole, np.float64(error_price))
            return compute - inner.uplink_slope(cell, bandwidth, (1 - rho) * whole, np.float64(band_price), least)

        rho = find_roots(slope, self.low, self.high, relative=_PRECISE)
        samples, _, bandwidth = parts(rho)
        return rho, samples, bandwidth

    def value(self, error_price: float, band_price: float) -> float:
        """The dual function: a lower bound of P1's energy."""
        cell = self.cell
        rho, samples, bandwidth = self.at(error_price, band_price)
        _, computing = inner.computing_energy(cell, samples, rho * cell.t_max_s)
        _, uplink = inner.uplink_energy(cell, bandwidth, (1 - rho) * cell.t_max_s)
        error = error_price * (cell.error(samples) - cell.error_max)
        return float(computing.sum() + uplink.sum() + error + band_price * (bandwidth.sum() - cell.bandwidth_hz))

    def band_price(self, error_price: float, guess: float, precise: float = _PRECISE) -> float:
        """mu with which the band is just used up."""

        def excess(logarithm: float) -> float:
            return self.band_excess(self.at(error_price, float(np.exp(logarithm)))[2])

        return float(np.exp(_decreasing_root(excess, np.log(guess), precise)))

    def error_excess(self, samples: np.ndarray) -> float:
        return float(np.log(self.cell.error(samples) / self.cell.error_max))

    def band_excess(self, bandwidth: np.ndarray) -> float:
        return float(np.log(bandwidth.sum() / self.cell.bandwidth_hz))


def _decreasing_root(function: Callable[[float], float], guess: float, precise: float = _PRECISE) -> float:
    """The root of a decreasing function of a logarithm, from a guess on; bracketed first with growing steps."""
    step = 0.2
    limit, here = 80.0, function(guess)
    low = high = guess
    value = here
    while value > 0 and high - guess < limit:
        low, high, step = high, high + step, 2 * step
        value = function(high)
    if here <= 0:
        value = here
        while value < 0 and guess - low < limit:
            high, low, step = low, low - step, 2 * step
            value = function(low)
    if low == high:
        return low
    vector = np.vectorize(function, otypes=[float])
    return float(find_roots(vector, np.array([low]), np.array([high]), relative=precise)[0])


def solve_dual(cell: Cell) -> DualSolution:
    """Maximise the dual of a feasible cell, from the multipliers of the inner problems at ``central_split`` on."""
    dual = _Dual(cell)
    first = inner.evaluate(cell, central_split(cell))
    band_guess = float(first.uplink.multiplier[0])
    if cell.error(cell.d_loc) <= cell.error_max:
        prices = 0.0, dual.band_price(0.0, band_guess)
    else:
        guess = max(float(first.computing.multiplier[0]), 1e-12), band_guess
        prices = _both_at_once(dual, *guess) or _both_at_once(dual, *_nearer(dual, *guess)) or _nested(dual, *guess)
    return DualSolution(dual.at(*prices)[0], *prices, dual.value(*prices))


def _both_at_once(dual: _Dual, error_price: float, band_price: float) -> tuple[float, float] | None:
    """Both prices by Powell's hybrid method, a tenth of the nested searches' work; None where it does not arrive."""

    def excess(logarithms: np.ndarray) -> np.ndarray:
        _, samples, bandwidth = dual.at(*np.exp(np.clip(logarithms, -200, 200)))
        return np.array([dual.error_excess(samples), dual.band_excess(bandwidth)])

    found = root(excess, np.log([error_price, band_price]), method="hybr", options={"xtol": 1e-9, "eps": 1e-6})
    if np.abs(found.fun).max() > 1e-7:
        return None
    return float(np.exp(found.x[0])), float(np.exp(found.x[1]))


def _nearer(dual: _Dual, error_price: float, band_price: float) -> tuple[float, float]:
    """Each price roughly right for the other's guess. With one so high or low that all devices are at a limit, the
    excesses are flat, and no method that follows slopes leaves that place.
    """

    def excess(logarithm: float) -> float:
        return dual.error_excess(dual.at(float(np.exp(logarithm)), band_price)[1])

    price = float(np.exp(_decreasing_root(excess, np.log(error_price), 1e-2)))
    return price, dual.band_price(price, band_price, 1e-2)


def _nested(dual: _Dual, error_price: float, band_price: float) -> tuple[float, float]:
    """A search for the band's price inside one for the error's: slow and sure."""
    band = [band_price]

    def excess(logarithm: float) -> float:
        price = float(np.exp(logarithm))
        band[0] = dual.band_price(price, band[0])
        return dual.error_excess(dual.at(price, band[0])[1])

    price = float(np.exp(_decreasing_root(excess, np.log(error_price))))
    return price, dual.band_price(price, band[0])


# ---- is there a plan at all?


@dataclass(frozen=True)
class Feasibility:
    """Whether there is a plan, and what would make one possible.

    Attributes:
        feasible: whether P1 has a solution.
        reasons: where it has none: each limit that can't be kept, with the devices that it fails for.
        least_error: the smallest error that can be reached within Tmax; inf where no plan is in time.
        least_time_s: the smallest Tmax with which the wanted error can be reached; inf: none.
    """

    feasible: bool
    reasons: tuple[str, ...] = ()
    least_error: float = np.inf
    least_time_s: float = 0.0


def feasibility(cell: Cell) -> Feasibility:
    """Decide, and where there is no plan say which limit stands in the way and how far it must move."""
    least_error = _least_error(cell)[0]
    if least_error <= cell.error_max:
        return Feasibility(True)
    low, high = split_limits(cell)
    reasons = []
    upload_s = (1 - high) * cell.t_max_s
    for names, bad in (
        ("computing on the local data at f_max alone takes longer", np.flatnonzero(low >= 1)),
        ("the upload at p_max alone takes longer, whatever the band", np.flatnonzero(high <= 0)),
        (
            "computing at f_max and the upload at p_max together take longer",
            np.flatnonzero((low >= high) & (low < 1) & (high > 0)),
        ),
    ):
        if len(bad):
            worst = bad[np.argmax((low * cell.t_max_s + upload_s)[bad])]
            needs = low[worst] * cell.t_max_s + upload_s[worst]
            shown = ", ".join(str(device) for device in bad[:10]) + (", ..." if len(bad) > 10 else "")
            reasons.append(
                f"Tmax = {cell.t_max_s:g} s is too short for device {shown}: {names} (device {worst} needs more than "
                f"{needs:.4g} s)"
            )
    if not reasons:
        wanted = _band_at(cell, low).sum()
        if wanted > cell.bandwidth_hz:
            reasons.append(
                f"the band B = {cell.bandwidth_hz / 1e6:g} MHz is too narrow: all uploads in the time that computing "
                f"leaves need {wanted / 1e6:.4g} MHz"
            )
    if not reasons:
        reasons.append(
            f"Delta_max = {cell.error_max:g} can't be reached: with d_gen_max = {cell.d_gen_max:g}, f_max and the band "
            f"used up, the error is {least_error:.6g}"
        )
    return Feasibility(False, tuple(reasons), least_error, _least_time(cell))


def _band_at(cell: Cell, rho: np.ndarray) -> np.ndarray:
    return inner.least_bandwidth(cell, (1 - rho) * cell.t_max_s)


def _most_samples(cell: Cell, rho: np.ndarray) -> np.ndarray:
    low, high = inner.sample_limits(cell, rho * cell.t_max_s)
    return np.maximum(low, high)


def _least_error(cell: Cell) -> tuple[float, np.ndarray]:
    """The smallest error within Tmax and the band, and the splits that reach it; (inf, _) where there is no plan.

    min over rho of Delta(D_max(rho)) subject to sum b_min(rho) <= B: convex and separable, one multiplier.
    """
    low, high = split_limits(cell)
    if (low >= high).any() or _band_at(cell, low).sum() > cell.bandwidth_hz:
        return np.inf, low
    # More time than the most samples take brings nothing.
    high = np.maximum(
        low, np.minimum(high, cell.cycles * (cell.d_loc + cell.d_gen_max) / (cell.f_max_hz * cell.t_max_s))
    )
    if _band_at(cell, high).sum() <= cell.bandwidth_hz:
        return float(cell.error(_most_samples(cell, high))), high

    def splits(price: float) -> np.ndarray:
        def slope(rho: np.ndarray) -> np.ndarray:
            upload_s = (1 - rho) * cell.t_max_s
            least = inner.least_bandwidth(cell, upload_s)
            band = inner.least_bandwidth_slope(cell, upload_s, least)
            gain = inner.gain_slope(cell, _most_samples(cell, rho)) * cell.f_max_hz / cell.cycles
            return np.log(price * band) - np.log(gain)

        return find_roots(slope, low, high, relative=_PRECISE)

    def excess(logarithm: float) -> float:
        return float(np.log(_band_at(cell, splits(float(np.exp(logarithm)))).sum() / cell.bandwidth_hz))

    price = float(np.exp(_decreasing_root(excess, -np.log(cell.bandwidth_hz))))
    rho = splits(price)
    step = 1e-12
    while _band_at(cell, rho).sum() > cell.bandwidth_hz:  # on the safe side of rounding
        rho, step = low + (rho - low) * (1 - step), 2 * step
    return float(cell.error(_most_samples(cell, rho))), rho


def _least_time(cell: Cell) -> float:
    """The smallest Tmax that lets the error be reached; inf where no time does."""
    most = cell.d_loc + cell.d_gen_max
    if cell.error(most) >= cell.error_max * (1 - 1e-12):  # reached at the very end of all times, if at all
        return np.inf
    low, high = 0.0, cell.t_max_s
    while _least_error(replace(cell, t_max_s=high))[0] > cell.error_max:
        low, high = high, 2 * high
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        if _least_error(replace(cell, t_max_s=middle))[0] > cell.error_max:
            low = middle
        else:
            high = middle
    return high


def central_split(cell: Cell) -> np.ndarray:
    """A feasible rho [devices] of a feasible cell, with room to all limits where there is any: halfway from the splits
    with the smallest error towards those that just reach the wanted one (feasible splits are a convex set).
    """
    low, _ = split_limits(cell)
    _, best = _least_error(cell)
    # The straight line from the smallest error to the least bandwidth: the farthest point that still reaches the error.
    share, step = 0.0, 0.5
    for _ in range(30):
        rho = best + (share + step) * (low - best)
        if cell.error(_most_samples(cell, rho)) <= cell.error_max:
            share += step
        step /= 2
    return best + 0.5 * share * (low - best)
