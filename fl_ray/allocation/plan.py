"""A plan: every device's synthetic samples, frequency, bandwidth and power, with the certificate of its energy."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fl_ray.allocation import inner
from fl_ray.allocation.categories import water_fill
from fl_ray.allocation.cell import Cell
from fl_ray.allocation.dual import central_split, feasibility, solve_dual
from fl_ray.allocation.search import search
from fl_ray.allocation.settings import AllocationConfig
from fl_ray.errors import InfeasibleError, SettingError

__all__ = ["Plan", "cell_to_plan", "check_feasible", "class_amounts", "filled_plan", "make_plan"]

_AT = 1e-6  # relative distance at which a limit counts as reached


@dataclass(frozen=True)
class Plan:
    """What every device of a cell is given; arrays [devices], SI units.

    Attributes:
        d_gen: synthetic samples, the continuous optimum that ``energy_j`` is of.
        class_amounts: int64 [devices, classes], the images that are made: ``d_gen`` rounded, by class.
        error: of the learning curve at the plan; ``error_price_j``, ``band_price_j_hz``: the dual's multipliers, that
            is, the energy that a looser limit saves (0 where the limit does not bind).
        history_j: the search's best energy after each evaluation; empty for ``dual``.
    """

    cell: Cell
    search: str
    d_gen: np.ndarray
    class_amounts: np.ndarray
    rho: np.ndarray
    f_hz: np.ndarray
    b_hz: np.ndarray
    p_w: np.ndarray
    t_cmp_s: np.ndarray
    t_com_s: np.ndarray
    e_cmp_j: np.ndarray
    e_com_j: np.ndarray
    error: float
    lower_bound_j: float
    error_price_j: float = 0.0
    band_price_j_hz: float = 0.0
    history_j: list[float] = field(default_factory=list)

    @property
    def energy_j(self) -> float:
        """Of all devices in one round."""
        return float(self.e_cmp_j.sum() + self.e_com_j.sum())

    @property
    def gap(self) -> float | None:
        """How far the energy can be above the least possible: energy / lower bound - 1. None: there is no bound."""
        return max(0.0, self.energy_j / self.lower_bound_j - 1) if self.lower_bound_j > 0 else None

    def binding(self) -> dict[str, list[int] | bool]:
        """Which limits are reached: the global ones, and of each device's those with the devices that are there."""
        cell, d = self.cell, self.cell.d_loc + self.d_gen
        at = {
            "f_min": np.isclose(self.f_hz, cell.f_min_hz, rtol=_AT),
            "f_max": np.isclose(self.f_hz, cell.f_max_hz, rtol=_AT),
            "p_max": np.isclose(self.p_w, cell.p_max_w, rtol=_AT),
            "t_max": np.isclose(self.t_cmp_s + self.t_com_s, cell.t_max_s, rtol=_AT),
            "d_gen = 0": self.d_gen <= _AT * d,
            "d_gen_max": self.d_gen >= cell.d_gen_max - _AT * d,
        }
        return {
            "error_max": bool(abs(self.error - cell.error_max) <= _AT * cell.error_max),
            "bandwidth": bool(abs(self.b_hz.sum() - cell.bandwidth_hz) <= _AT * cell.bandwidth_hz),
            **{name: np.flatnonzero(mask).tolist() for name, mask in at.items()},
        }

    def to_dict(self) -> dict[str, Any]:
        """The content of plan.json."""
        names = ("d_gen", "rho", "f_hz", "b_hz", "p_w", "t_cmp_s", "t_com_s", "e_cmp_j", "e_com_j", "class_amounts")
        columns = {"d_loc": self.cell.d_loc.tolist(), **{name: getattr(self, name).tolist() for name in names}}
        devices = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return {
            "digest": self.cell.digest(),
            "search": self.search,
            "energy_j": self.energy_j,
            "lower_bound_j": self.lower_bound_j,
            "gap": self.gap,
            "error": self.error,
            "error_price_j": self.error_price_j,
            "band_price_j_hz": self.band_price_j_hz,
            "binding": self.binding(),
            "devices": devices,
            "cell": self.cell.to_dict(),
            "history_j": self.history_j,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path, cell: Cell) -> Plan:
        """Read plan.json again, for the cell that it was made for.

        Raises:
            SettingError: it can't be read, or was made for another cell (another fleet, partition or limits).
        """
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            devices = found["devices"]
            names = ("d_gen", "rho", "f_hz", "b_hz", "p_w", "t_cmp_s", "t_com_s", "e_cmp_j", "e_com_j", "class_amounts")
            columns = {name: np.array([device[name] for device in devices]) for name in names}
            numbers = {key: found[key] for key in ("error", "lower_bound_j", "error_price_j", "band_price_j_hz")}
            stored = found["digest"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SettingError(f"plan {path} can't be read: {error!r}") from error
        if stored != cell.digest():
            raise SettingError(
                f"plan {path} was made for another fleet, partition or limits (digest {stored}, here {cell.digest()}); "
                "make it anew with fl-ray plan and this recipe and seed"
            )
        return cls(cell, found["search"], **columns, **numbers, history_j=found["history_j"])


def make_plan(cell: Cell, config: AllocationConfig, seed: int = 0) -> Plan:
    """Plan for least energy, as ``allocation`` says.

    Args:
        cell: with the limits of ``config`` in it.
        seed: of a search that draws.

    Raises:
        InfeasibleError: there is no plan; it says which limit is in the way, for which devices, and what would do.
    """
    cell = cell_to_plan(cell, config)
    check_feasible(cell)
    exact = solve_dual(cell)
    rho, history, error_price, band_price = exact.rho, [], exact.error_price_j, exact.band_price_j_hz
    if config.search != "dual":
        found = search(cell, config.search, config, seed)
        if found.best_rho is None:
            raise InfeasibleError(
                f"allocation.search {config.search} found no feasible plan in {len(found.history_j)} candidates, "
                "but there is one: raise allocation.evaluations, set allocation.feasible_start true, or search dual"
            )
        rho, history = found.best_rho, found.history_j
    plan = _plan_at(cell, rho, config.search, exact.lower_bound_j, history, error_price, band_price)
    if not exact.lower_bound_j <= plan.energy_j * (1 + 1e-6):
        raise InfeasibleError(
            f"the limits leave so little room that the plan's energy ({plan.energy_j:g} J) can't be certified (lower "
            f"bound {exact.lower_bound_j:g} J); raise allocation.t_max_s or allocation.error_max a little"
        )
    return plan if config.optimise else at_full_power(plan)


def cell_to_plan(cell: Cell, config: AllocationConfig) -> Cell:
    """The cell as it is planned for: without synthesis (FIMI's TFL) the limit on the error is dropped."""
    if config.synthesis:
        return cell
    return replace(cell, d_gen_max=0.0, error_max=max(float(cell.error(cell.d_loc)), cell.error_max))


def check_feasible(cell: Cell) -> None:
    """Refuse a cell without a plan, with the reasons and the ways out."""
    found = feasibility(cell)
    if found.feasible:
        return
    ways = []
    if np.isfinite(found.least_time_s):
        ways.append(f"allocation.t_max_s of at least {_up(found.least_time_s)} s")
    if np.isfinite(found.least_error):
        ways.append(f"allocation.error_max of at least {_up(found.least_error)}")
    if not ways:
        ways.append("allocation.d_gen_max or allocation.error_max raised: no time is enough")
    raise InfeasibleError(f"there is no plan: {'; '.join(found.reasons)}. What would do: {', or '.join(ways)}")


def _up(value: float) -> str:
    """Five digits, rounded up: the way out that a message names must be one."""
    digits = 4 - int(np.floor(np.log10(value)))
    return f"{np.ceil(value * 10**digits) / 10**digits:.5g}"


def _plan_at(
    cell: Cell,
    rho: np.ndarray,
    name: str,
    lower_bound_j: float,
    history_j: list[float],
    error_price_j: float,
    band_price_j_hz: float,
) -> Plan:
    rho, found = _within_limits(cell, rho)
    computing, uplink = found.computing, found.uplink
    d_gen = computing.samples - cell.d_loc
    most = inner.sample_limits(cell, rho * cell.t_max_s)[1] - cell.d_loc  # at f_max
    return Plan(
        cell=cell,
        search=name,
        d_gen=d_gen,
        class_amounts=class_amounts(cell, d_gen, most),
        rho=rho,
        f_hz=computing.frequency_hz,
        b_hz=uplink.bandwidth_hz,
        p_w=uplink.power_w,
        t_cmp_s=cell.cycles * computing.samples / computing.frequency_hz,
        t_com_s=(1 - rho) * cell.t_max_s,
        e_cmp_j=computing.energy_j,
        e_com_j=uplink.energy_j,
        error=float(computing.error),
        lower_bound_j=lower_bound_j,
        error_price_j=error_price_j,
        band_price_j_hz=band_price_j_hz,
        history_j=history_j,
    )


def _within_limits(cell: Cell, rho: np.ndarray) -> tuple[np.ndarray, inner.Evaluated]:
    """The splits, or where rounding has pushed them over a limit, the nearest on the way to splits with room."""
    found = inner.evaluate(cell, rho)
    if found.violation <= 0:
        return rho, found
    inside = central_split(cell)
    for share in np.geomspace(1e-10, 1.0, 31):
        nearer = rho + share * (inside - rho)
        found = inner.evaluate(cell, nearer)
        if found.violation <= 0:
            return nearer, found
    raise InfeasibleError(
        "the limits leave a plan no room beyond rounding; raise allocation.t_max_s, allocation.error_max or "
        "fleet.bandwidth_hz a little"
    )


def at_full_power(plan: Plan) -> Plan:
    """The same amounts, every device at f_max and p_max on an even part of the band: the ablation of the resources."""
    cell = plan.cell
    samples = cell.d_loc + plan.d_gen
    band = np.full(cell.devices, cell.bandwidth_hz / cell.devices)
    rate = band * np.log2(1 + cell.p_max_w * cell.gain / (cell.noise_w_hz * band))
    t_cmp, t_com = cell.cycles * samples / cell.f_max_hz, cell.upload_bits / rate
    return replace(
        plan,
        rho=t_cmp / (t_cmp + t_com),
        f_hz=cell.f_max_hz.copy(),
        b_hz=band,
        p_w=cell.p_max_w.copy(),
        t_cmp_s=t_cmp,
        t_com_s=t_com,
        e_cmp_j=cell.capacitance * cell.cycles * samples * cell.f_max_hz**2,
        e_com_j=cell.p_max_w * t_com,
    )


def filled_plan(cell: Cell, amounts: np.ndarray, name: str) -> Plan:
    """A plan of amounts that were chosen elsewhere, at f_max and p_max on even parts of the band. It may break the
    limits on time and error; its lower bound is 0: there is no certificate.

    Args:
        amounts: int64 [devices, classes].
    """
    empty = np.zeros(cell.devices)
    d_gen = amounts.sum(axis=1).astype(np.float64)
    error = float(cell.error(cell.d_loc + d_gen))
    return at_full_power(Plan(cell, name, d_gen, amounts, *[empty] * 8, error=error, lower_bound_j=0.0))


def class_amounts(cell: Cell, d_gen: np.ndarray, most: np.ndarray) -> np.ndarray:
    """Images of each class for each device, int64 [devices, classes]: ``d_gen`` rounded up, so that the error stays
    below its limit, but to no more than ``most`` [devices]; spread for the greatest label entropy (``water_fill``).
    """
    whole = np.ceil(d_gen - 1e-6).astype(np.int64)
    whole = np.minimum(whole, np.floor(most + 1e-6).astype(np.int64))
    return np.stack([water_fill(counts, int(amount)) for counts, amount in zip(cell.class_counts, whole, strict=True)])
