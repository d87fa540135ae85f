"""The inner problems of P1 for given time splits, in closed form up to one multiplier each.

Every function takes arrays whose last axis is the devices; the axes before it are candidates, solved together without a
loop over either. With rho fixed, P1 falls apart into data and computing (multiplier lambda on the error) and bandwidth
and power (multiplier mu on the band).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.special import lambertw

from fl_ray.allocation.cell import Cell
from fl_ray.allocation.roots import find_roots

__all__ = ["Computing", "Evaluated", "Uplink", "computing", "evaluate", "least_bandwidth", "uplink"]

_LN2 = np.log(2.0)
_NEWTON_STEPS = 6


@dataclass(frozen=True)
class Computing:
    """Samples [..., devices], frequency [Hz], energy [J] and the multiplier lambda [..., 1] [J]; ``error`` [...]."""

    samples: np.ndarray
    frequency_hz: np.ndarray
    energy_j: np.ndarray
    multiplier: np.ndarray
    error: np.ndarray


@dataclass(frozen=True)
class Uplink:
    """Bandwidth [..., devices] [Hz], power [W], energy [J] and the multiplier mu [..., 1] [J/Hz]."""

    bandwidth_hz: np.ndarray
    power_w: np.ndarray
    energy_j: np.ndarray
    multiplier: np.ndarray


@dataclass(frozen=True)
class Evaluated:
    """Candidates with both inner problems solved. Where ``violation`` [...] is above 0 there is no solution: energy is
    inf there, and the other values mean nothing. The violation adds up by how much, relative to each limit, computing
    times, uplinks, the error and the band are exceeded.
    """

    energy_j: np.ndarray
    violation: np.ndarray
    computing: Computing
    uplink: Uplink


# ---- data and computing


def sample_limits(cell: Cell, time_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Least and most samples that a device can have to train on in ``time_s`` [..., devices]; least above most where it
    is too slow for its own data.
    """
    least = np.broadcast_to(cell.d_loc, time_s.shape)
    return least, np.minimum(cell.d_loc + cell.d_gen_max, cell.f_max_hz * time_s / cell.cycles)


def _cost_slope(cell: Cell, samples: np.ndarray, time_s: np.ndarray) -> np.ndarray:
    """d E_cmp / d D, right of a kink."""
    k, frequency = cell.cycles, cell.cycles * samples / time_s
    cubic = 3 * cell.capacitance * k * frequency**2
    return np.where(frequency >= cell.f_min_hz, cubic, cell.capacitance * k * cell.f_min_hz**2)


def gain_slope(cell: Cell, samples: np.ndarray) -> np.ndarray:
    """-d Delta / d D_i."""
    curve, q = cell.curve, cell.quality
    seen = cell.d_loc + q * (samples - cell.d_loc)
    return q * curve.alpha * curve.beta * seen ** (-curve.beta - 1) / cell.devices


def best_samples(cell: Cell, time_s: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """argmin over D of E_cmp(D, T) + lambda Delta(D), in D's limits [..., devices].

    Where f = k D / T, the best D solves D^2 (D_loc + q (D - D_loc))^(beta+1) = q lambda w alpha beta T^2 / (3 eps k^3);
    where f = f_min, D_loc + q (D - D_loc) = (q lambda w alpha beta / (eps k f_min^2))^(1/(beta+1)); and it is the kink
    f_min T / k where neither is consistent. With q = 1 the first is a power, too; with q < 1 it takes Newton steps.
    """
    low, high = sample_limits(cell, time_s)
    k, kink, beta, q = cell.cycles, cell.f_min_hz * time_s / cell.cycles, cell.curve.beta, cell.quality
    worth = multiplier * (q * cell.curve.alpha * beta / cell.devices)
    unseen = (1 - q) * cell.d_loc
    linear = ((worth / (cell.capacitance * k * cell.f_min_hz**2)) ** (1 / (beta + 1)) - unseen) / q
    wanted = worth * time_s**2 / (3 * cell.capacitance * k**3)
    cubic = wanted ** (1 / (beta + 3)) if q == 1 else _cubic_branch(wanted, unseen, beta, q)
    best = np.where(linear <= kink, linear, np.where(cubic >= kink, cubic, kink))
    return np.clip(best, low, np.maximum(low, high))


def _cubic_branch(wanted: np.ndarray, unseen: np.ndarray, beta: float, q: float) -> np.ndarray:
    """D with D^2 (unseen + q D)^(beta+1) = wanted. In log D the logarithm of the left side is convex and its slope
    between 2 and beta + 3: Newton's method comes down from above, to all digits within the steps here.
    """
    goal = np.log(np.maximum(wanted, 1e-300))
    x = (goal - (beta + 1) * np.log(q)) / (beta + 3)
    for _ in range(_NEWTON_STEPS):
        seen = unseen + q * np.exp(x)
        x = x - (2 * x + (beta + 1) * np.log(seen) - goal) / (2 + (beta + 1) * (1 - unseen / seen))
    return np.exp(x)


def computing_energy(cell: Cell, samples: np.ndarray, time_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Frequency f = max(f_min, k D / T) [Hz] and E_cmp = eps k D f^2 [J]."""
    frequency = np.maximum(cell.f_min_hz, cell.cycles * samples / time_s)
    return frequency, cell.capacitance * cell.cycles * samples * frequency**2


def computing_slope(cell: Cell, samples: np.ndarray, time_s: np.ndarray, multiplier: np.ndarray) -> np.ndarray:
    """d/dT of min over D of E_cmp + lambda Delta, at its minimiser ``samples`` (envelope theorem) [J/s], <= 0.

    At the T that is just enough for D_loc it is the slope to the right.
    """
    k, f_min, f_max = cell.cycles, cell.f_min_hz, cell.f_max_hz
    frequency = k * samples / time_s
    steep = -2 * cell.capacitance * k * samples * frequency**2 / time_s * (frequency > f_min * (1 + 1e-12))
    # A minimiser at f_max T / k, or at the kink f_min T / k, moves with T where more samples are worth it.
    gain = multiplier * gain_slope(cell, samples)
    fewer = samples < cell.d_loc + cell.d_gen_max
    at_top = fewer & (frequency >= f_max * (1 - 1e-12))
    at_kink = fewer & ~at_top & (np.abs(frequency - f_min) <= 1e-12 * f_min)
    top = (cell.capacitance * k * f_max**2 - gain) * f_max / k
    kink = (cell.capacitance * k * f_min**2 - gain) * f_min / k
    slope = np.where(at_top, np.minimum(steep, top), np.where(at_kink, kink, steep))
    return np.minimum(0.0, slope)


def computing(cell: Cell, time_s: np.ndarray) -> Computing:
    """Least computing energy with Delta <= Delta_max; ``error`` tells whether there was a way.

    Args:
        time_s: T = rho Tmax [..., devices], > 0.
    """
    low, high = sample_limits(cell, time_s)
    high = np.maximum(low, high)
    enough = cell.error(low) <= cell.error_max
    # Between these multipliers every device goes from its least samples to its most.
    first = (_cost_slope_left(cell, low, time_s) / gain_slope(cell, low)).min(axis=-1, keepdims=True)
    last = (_cost_slope(cell, high, time_s) / gain_slope(cell, high)).max(axis=-1, keepdims=True)

    def excess(logarithm: np.ndarray) -> np.ndarray:
        samples = best_samples(cell, time_s, np.exp(logarithm))
        return (cell.error(samples) - cell.error_max)[..., None]

    multiplier = np.exp(find_roots(excess, np.log(first) - 1e-9, np.log(last) + 1e-9, relative=1e-15))
    multiplier = np.where(enough[..., None], 0.0, multiplier)
    samples = best_samples(cell, time_s, multiplier)
    frequency, energy = computing_energy(cell, samples, time_s)
    return Computing(samples, frequency, energy, multiplier, cell.error(samples))


def _cost_slope_left(cell: Cell, samples: np.ndarray, time_s: np.ndarray) -> np.ndarray:
    """d E_cmp / d D, left of a kink."""
    return np.minimum(_cost_slope(cell, samples, time_s), _cost_slope(cell, samples * (1 - 1e-9), time_s))


# ---- bandwidth and power


def least_bandwidth(cell: Cell, time_s: np.ndarray) -> np.ndarray:
    """Bandwidth with which p_max just does the upload in ``time_s`` [..., devices]; inf: no bandwidth does.

    ln(1 + x) = c x with x = p_max h / (N0 b) and c = S ln2 N0 / (T p_max h): x = -W_-1(-c e^-c) / c - 1.
    """
    top = cell.p_max_w * cell.gain / cell.noise_w_hz  # p_max h / N0 [Hz]
    c = cell.upload_bits * _LN2 / (time_s * top)
    u = np.clip(1 - c, 1e-12, 1e-4)  # near c = 1, the branch point of W, digits are lost: a series there
    series = u * (2 + u * (8 / 3 + u * 28 / 9))
    inside = np.minimum(c, 1 - 1e-4)
    x = -np.real(lambertw(-inside * np.exp(-inside), k=-1)) / inside - 1
    x -= (np.log1p(x) - inside * x) / (1 / (1 + x) - inside)  # a Newton step brings the last digits
    with np.errstate(divide="ignore"):
        return np.where((c < 1) & (time_s > 0), top / np.where(c <= 1 - 1e-4, x, series), np.inf)


def least_bandwidth_slope(cell: Cell, time_s: np.ndarray, least: np.ndarray) -> np.ndarray:
    """-d b_min / d T at ``least`` = b_min [Hz/s]."""
    x = cell.p_max_w * cell.gain / (cell.noise_w_hz * least)
    small = np.minimum(x, 1e-3)  # there the difference cancels
    series = small**2 * (1 / 2 - small * (2 / 3 - small * (3 / 4 - small * (4 / 5 - small * 5 / 6))))
    rate_slope = np.where(x <= 1e-3, series, np.log1p(x) - x / (1 + x)) / _LN2
    with np.errstate(divide="ignore"):  # no bandwidth is enough: any more time is worth everything
        return cell.upload_bits / (time_s**2 * rate_slope)


def best_bandwidth(cell: Cell, time_s: np.ndarray, multiplier: np.ndarray, least: np.ndarray) -> np.ndarray:
    """argmin over b >= ``least`` of T p(b) + mu b [..., devices]: S ln2 / (T (1 + W0((mu h / (T N0) - 1) / e)))."""
    y = 1 + np.real(lambertw((multiplier * cell.gain / (time_s * cell.noise_w_hz) - 1) / np.e))
    with np.errstate(divide="ignore"):
        return np.maximum(least, cell.upload_bits * _LN2 / (time_s * y))


def uplink_energy(cell: Cell, bandwidth_hz: np.ndarray, time_s: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Power p = N0 b / h (2^(S / (b T)) - 1) [W] and E_com = p T [J]."""
    y = cell.upload_bits * _LN2 / (bandwidth_hz * time_s)
    power = cell.noise_w_hz * bandwidth_hz / cell.gain * np.expm1(y)
    return power, power * time_s


def uplink_slope(
    cell: Cell, bandwidth_hz: np.ndarray, time_s: np.ndarray, multiplier: np.ndarray, least: np.ndarray
) -> np.ndarray:
    """d/dT of min over b of E_com + mu b, at its minimiser (envelope theorem) [J/s], <= 0."""
    y = cell.upload_bits * _LN2 / (bandwidth_hz * time_s)
    inner = cell.noise_w_hz / cell.gain * bandwidth_hz * (np.expm1(y) - y * np.exp(y))
    bound = cell.p_max_w - multiplier * least_bandwidth_slope(cell, time_s, least)
    return np.minimum(0.0, np.where(bandwidth_hz <= least, bound, inner))


def _bandwidth_price(cell: Cell, bandwidth_hz: np.ndarray, time_s: np.ndarray) -> np.ndarray:
    """-d E_com / d b."""
    y = cell.upload_bits * _LN2 / (bandwidth_hz * time_s)
    return time_s * cell.noise_w_hz / cell.gain * (1 + (y - 1) * np.exp(y))


def uplink(cell: Cell, time_s: np.ndarray, least: np.ndarray | None = None) -> Uplink:
    """Least uplink energy with sum b = B; valid where the least bandwidths fit into the band.

    Args:
        time_s: T = (1 - rho) Tmax [..., devices], > 0.
        least: ``least_bandwidth(cell, time_s)`` where it is known; finite.
    """
    least = least_bandwidth(cell, time_s) if least is None else least
    first = _bandwidth_price(cell, np.maximum(least, cell.bandwidth_hz), time_s).min(axis=-1, keepdims=True)
    last = _bandwidth_price(cell, least, time_s).max(axis=-1, keepdims=True)

    def excess(logarithm: np.ndarray) -> np.ndarray:
        given = best_bandwidth(cell, time_s, np.exp(logarithm), least)
        return np.log(given.sum(axis=-1, keepdims=True) / cell.bandwidth_hz)

    first = np.maximum(first, 1e-12 * last)
    multiplier = np.exp(find_roots(excess, np.log(first) - 1e-6, np.log(last) + 1e-9, relative=1e-15))
    bandwidth = best_bandwidth(cell, time_s, multiplier, least)
    # What rounding leaves of the band goes to all: the sum is never above B.
    spare = cell.bandwidth_hz - bandwidth.sum(axis=-1, keepdims=True)
    above = bandwidth - least
    share = spare / np.maximum(above.sum(axis=-1, keepdims=True), 1e-300)
    bandwidth = np.maximum(least, bandwidth + above * np.clip(share, -1e-6, 1e-6))
    power, energy = uplink_energy(cell, bandwidth, time_s)
    return Uplink(bandwidth, power, energy, multiplier)


# ---- both


def evaluate(cell: Cell, rho: np.ndarray) -> Evaluated:
    """Solve both inner problems at time splits rho [..., devices] in (0, 1)."""
    compute_s, upload_s = rho * cell.t_max_s, (1 - rho) * cell.t_max_s
    least = least_bandwidth(cell, upload_s)
    violation = _violation(cell, compute_s, upload_s, least)
    good = violation <= 0
    energy = np.full(violation.shape, np.inf)
    found_cmp = computing(cell, compute_s)
    # Where the band does not do, any finite numbers will: they are not looked at.
    safe = np.where(good[..., None], upload_s, cell.t_max_s * 1e6)
    found_up = uplink(cell, safe, np.where(good[..., None], least, 1.0))
    total = (found_cmp.energy_j + found_up.energy_j).sum(axis=-1)
    energy = np.where(good, total, np.inf)
    return Evaluated(energy, violation, found_cmp, found_up)


def _violation(cell: Cell, compute_s: np.ndarray, upload_s: np.ndarray, least: np.ndarray) -> np.ndarray:
    low, high = sample_limits(cell, compute_s)
    slow = np.maximum(0, low / np.maximum(cell.f_max_hz * compute_s / cell.cycles, 1e-300) - 1)
    slow = np.where(slow <= 1e-12, 0, slow)
    top = cell.p_max_w * cell.gain / cell.noise_w_hz
    weak = np.maximum(0, cell.upload_bits * _LN2 / (upload_s * top) - 1) + ~np.isfinite(least)
    wanted = np.where(np.isfinite(least), least, cell.bandwidth_hz).sum(axis=-1)
    band = np.maximum(0, wanted / cell.bandwidth_hz - 1)
    error = np.maximum(0, cell.error(np.maximum(low, high)) / cell.error_max - 1)
    return slow.sum(axis=-1) + weak.sum(axis=-1) + np.where(band <= 1e-12, 0, band) + np.where(error <= 1e-12, 0, error)
