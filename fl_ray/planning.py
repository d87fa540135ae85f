"""FIMI's planner in a run: the cell that a recipe describes, and its plan."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from fl_ray.allocation.cell import Cell
from fl_ray.allocation.learning_curve import LearningCurve
from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData
from fl_ray.devices.fleet import Fleet, noise_w_hz
from fl_ray.errors import SettingError

__all__ = ["cell_of", "load_curve", "recipe_cell"]


def cell_of(config: RunConfig, data: FederatedData, fleet: Fleet) -> Cell:
    """The cell of a recipe's devices, data and limits.

    A device may run at any frequency of its tier's range ``frequency_hz``, and send with up to its ``power_w``.

    Raises:
        SettingError: not all clients take part in every round, rates are measured ones, or a device has no data.
    """
    if config.cohort_size < config.data.clients:
        raise SettingError(
            f"clients_per_round is {config.clients_per_round}, but a plan splits the band over all "
            f"{config.data.clients} clients; leave clients_per_round out"
        )
    if fleet.rate_bps is not None:
        raise SettingError(
            "fleet.trace.capacity gives measured link rates, for which a plan of bandwidth and power has no model; "
            "leave it out"
        )
    if fleet.availability is not None:
        raise SettingError(
            "fleet.availability (or fleet.trace.availability) takes devices away, but a plan has all of them in every "
            "round; leave it out"
        )
    ranges = [tier.frequency_hz for tier in config.fleet.tiers]
    limits = np.array([value if isinstance(value, list) else [value, value] for value in ranges])[fleet.tier]
    limit = config.allocation
    return Cell(
        class_counts=data.counts(),
        cycles_per_sample=fleet.cycles_per_sample * config.training.sample_fraction,
        capacitance=fleet.capacitance,
        f_min_hz=limits[:, 0],
        f_max_hz=limits[:, 1],
        p_max_w=fleet.power_w,
        gain=fleet.gain,
        bandwidth_hz=config.fleet.bandwidth_hz,
        noise_w_hz=noise_w_hz(config.fleet),
        upload_bits=float(limit.upload_bits or 8 * upload_bytes(config, data)),
        local_epochs=config.training.local_epochs,
        t_max_s=limit.t_max_s,
        error_max=limit.error_max,
        d_gen_max=limit.d_gen_max,
        curve=load_curve(limit.curve),
        quality=limit.quality,
    )


def upload_bytes(config: RunConfig, data: FederatedData) -> int:
    """Of a client's update: the model in fp32, or what the recipe's ``updates`` make of it."""
    from fl_ray.model import ImageShape, WeightLayout, build_module
    from fl_ray.updates import UpdateChain

    layout = WeightLayout(build_module(config.model, ImageShape.of(data.source), config.training))
    return UpdateChain(tuple(config.updates), layout.is_parameter, config.seed).upload_bytes()


def load_curve(setting: str | dict[str, float] | None) -> LearningCurve:
    """``allocation.curve``: a file of ``fl-ray learning-curve``, its values, or the default.

    Raises:
        SettingError: the file can't be read, or a value is missing, unknown or out of range.
    """
    if setting is None:
        return LearningCurve()
    values = setting
    if isinstance(setting, str):
        try:
            values = json.loads(Path(setting).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise SettingError(
                f"allocation.curve {setting} can't be read ({error}); make it with fl-ray learning-curve"
            ) from error
    names = ("alpha", "beta", "gamma")
    missing = [name for name in names if name not in values]
    unknown = sorted(set(values) - set(names)) if not isinstance(setting, str) else []
    if missing or unknown:
        raise SettingError(f"allocation.curve is {setting}, but it must have alpha, beta and gamma and nothing else")
    return LearningCurve(*(float(values[name]) for name in names))


def recipe_cell(config: RunConfig) -> Cell:
    """The cell of a recipe by itself."""
    from fl_ray.data.parts import prepare
    from fl_ray.devices.fleet import draw_fleet

    return cell_of(
        config, prepare(config.data, config.seed), draw_fleet(config.fleet, config.data.clients, config.seed)
    )
