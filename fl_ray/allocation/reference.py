"""The inner problems in cvxpy (Clarabel): what the closed forms must equal, for tests and benchmarks alone."""

from __future__ import annotations

import cvxpy as cp
import numpy as np

from fl_ray.allocation.cell import Cell

__all__ = ["ReferenceInner"]

_SOLVER = {"solver": cp.CLARABEL, "tol_gap_abs": 1e-11, "tol_gap_rel": 1e-11, "tol_feas": 1e-11}
_LN2 = float(np.log(2.0))


class ReferenceInner:
    """Both inner problems of a cell, built once with the time split as their parameter.

    Samples are in thousands and bandwidth in MHz: in Hz the solver loses digits.
    """

    def __init__(self, cell: Cell) -> None:
        self.cell = cell
        devices = cell.devices
        self._samples = cp.Variable(devices, pos=True)
        self._most = cp.Parameter(devices, nonneg=True)
        self._cubic = cp.Parameter(devices, nonneg=True)
        linear = cell.capacitance * cell.cycles * cell.f_min_hz**2 * 1e3
        energy = cp.sum(
            cp.maximum(cp.multiply(linear, self._samples), cp.multiply(self._cubic, cp.power(self._samples, 3)))
        )
        curve, local = cell.curve, cell.d_loc / 1e3
        seen = local + cell.quality * (self._samples - local)
        # seen^-beta <= fallen as a power cone: cp.power takes the exponent for a fraction near it, to five digits.
        fallen, exponent = cp.Variable(devices), np.full(devices, 1 / (1 + curve.beta))
        error = cp.sum(curve.alpha * 1e3**-curve.beta * fallen) / devices + curve.gamma
        limits = [
            self._samples >= local,
            self._samples <= self._most,
            cp.PowCone3D(fallen, seen, np.ones(devices), exponent),
            error <= cell.error_max,
        ]
        self.computing = cp.Problem(cp.Minimize(energy), limits)

        self._band = cp.Variable(devices, pos=True)
        self._sent = cp.Variable(devices)  # b exp(S ln2 / (b T))
        self._bits = cp.Parameter(devices, nonneg=True)
        self._price = cp.Parameter(devices, nonneg=True)
        noise = cell.noise_w_hz * 1e6 / cell.gain  # W per MHz of b (exp(.) - 1)
        self.uplink = cp.Problem(
            cp.Minimize(cp.sum(cp.multiply(self._price, self._sent - self._band))),
            [
                cp.ExpCone(self._bits, self._band, self._sent),
                cp.multiply(noise, self._sent - self._band) <= cell.p_max_w,
                cp.sum(self._band) <= cell.bandwidth_hz / 1e6,
            ],
        )

    def computing_energy(self, time_s: np.ndarray) -> float:
        """Least computing energy at T = rho Tmax [devices]; inf: there is no solution [J]."""
        cell = self.cell
        most = np.minimum(cell.d_loc + cell.d_gen_max, cell.f_max_hz * time_s / cell.cycles)
        if (most < cell.d_loc).any():
            return np.inf
        self._most.value = most / 1e3
        self._cubic.value = cell.capacitance * cell.cycles**3 / time_s**2 * 1e9
        return _solved(self.computing)

    def uplink_energy(self, time_s: np.ndarray) -> float:
        """Least uplink energy at T = (1 - rho) Tmax [devices]; inf: there is no solution [J]."""
        cell = self.cell
        self._bits.value = cell.upload_bits * _LN2 / time_s / 1e6
        self._price.value = time_s * cell.noise_w_hz * 1e6 / cell.gain
        return _solved(self.uplink)

    def energy(self, rho: np.ndarray) -> float:
        """Both together at a time split [devices]; inf: there is no solution [J]."""
        computing = self.computing_energy(rho * self.cell.t_max_s)
        return computing + self.uplink_energy((1 - rho) * self.cell.t_max_s) if np.isfinite(computing) else np.inf


def _solved(problem: cp.Problem) -> float:
    try:
        problem.solve(**_SOLVER)
    except cp.SolverError:  # Clarabel stalls where the limits leave next to no room
        return np.inf
    return float(problem.value) if problem.status in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE) else np.inf
