"""FIMI (arXiv 2310.13981, IEEE TMC, doi 10.1109/TMC.2024.3371772): fill in the missing data, at least energy.

(1) The server plans each device's synthesis amount and resources; (2) it makes class-specific images with a pre-trained
generator; (3) devices train on local and synthetic data; (4) the server averages. The planner (``fl_ray.allocation``)
is our reconstruction: the paper's body was not available to us. So are the baselines, of which we know the names alone;
each is defined by what it does.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fl_ray.allocation.cell import Cell
from fl_ray.allocation.plan import Plan, cell_to_plan, filled_plan, make_plan
from fl_ray.config import RunConfig
from fl_ray.context import RunContext
from fl_ray.data.parts import FederatedData
from fl_ray.data.statistics import label_entropy
from fl_ray.devices.cost import shannon_rate
from fl_ray.devices.fleet import Fleet, noise_w_hz, redraw_channels
from fl_ray.errors import InfeasibleError, SettingError
from fl_ray.methods.fedavg import FedAvg
from fl_ray.planning import cell_of

if TYPE_CHECKING:
    from fl_ray.synthesis import Synthesis

__all__ = ["FIMI", "HDC", "TFL"]


class FIMI(FedAvg):
    """FedAvg on local and synthetic data, as planned. With ``generator.name: cgan`` it is FIMI's baseline GAN.

    Every device runs at the plan's frequency, uplink bandwidth and power: they make virtual time and energy. The plan's
    Tmax holds computing and uplink; the model's down-link, over the tiers' parts of the band, comes on top. Delivering
    the synthetic images is not on the clock: the summary has its bytes and seconds by themselves.

    Args:
        plan: a plan.json of ``fl-ray plan`` for this recipe and seed; default: planned here, as ``allocation`` says.
        replan_every: rounds after which the shadowing is drawn anew and frequency, bandwidth and power are planned
            again, for the amounts that the devices then have; 0: never. Where Tmax can't be kept on the new channels,
            all run at f_max and p_max on even parts of the band.
    """

    asynchronous = False
    uses_generator = True
    synthesises = True  # for the devices

    def __init__(self, plan: str | None = None, replan_every: int = 0) -> None:
        super().__init__()
        if replan_every < 0:
            raise ValueError(f"replan_every is {replan_every}, but it must be at least 0")
        self.plan_file, self.replan_every = plan, replan_every
        self._period = 0

    def input_files(self) -> list[str]:
        return [] if self.plan_file is None else [self.plan_file]

    def equip(
        self, config: RunConfig, data: FederatedData, fleet: Fleet, synthesis: Synthesis | None
    ) -> tuple[FederatedData, Fleet]:
        if config.allocation.upload_bits is not None:
            raise SettingError(
                f"allocation.upload_bits is {config.allocation.upload_bits:g}, but in a run the devices send the model "
                "itself; leave it out (it is for fl-ray plan alone)"
            )
        cell = cell_of(config, data, fleet)
        self.plan = self.make(config, cell)
        if self.plan.class_amounts.any() and synthesis is None:
            raise SettingError(
                f"method.plan {self.plan_file} has synthetic images, but method {config.method.name} makes none; take "
                "method fimi, or leave it out"
            )
        self._before = data.counts()
        self._drawn = fleet
        if self.plan.class_amounts.any():
            data = self._synthesise(config, data, synthesis)
        return data, self._at(fleet, self.plan)

    def make(self, config: RunConfig, cell: Cell) -> Plan:
        """The plan of a cell."""
        allocation = config.allocation if self.synthesises else replace(config.allocation, synthesis=False)
        if self.plan_file is not None:
            return Plan.load(Path(self.plan_file), cell_to_plan(cell, allocation))
        return make_plan(cell, allocation, config.seed)

    def _synthesise(self, config: RunConfig, data: FederatedData, synthesis: Synthesis) -> FederatedData:
        """Each device gets its class amounts; no image goes to two devices."""
        amounts = self.plan.class_amounts
        images, _ = synthesis.images(amounts.sum(axis=0), config.seed)
        return data.with_synthetic(images, amounts)

    def _at(self, fleet: Fleet, plan: Plan) -> Fleet:
        """The devices at the plan's operating points. Whole images in place of the continuous optimum take a little
        more time: where that was all used up, the frequency is raised by as much, as far as f_max allows.
        """
        cell = plan.cell
        whole = cell.d_loc + plan.class_amounts.sum(axis=1)
        in_time = cell.cycles * whole / np.maximum(plan.t_cmp_s, plan.rho * cell.t_max_s)
        # In the tiers' units, whose sum is what the cluster was asked for.
        share = plan.b_hz / cell.bandwidth_hz * fleet.bandwidth_share.sum()
        return replace(
            fleet,
            frequency_hz=np.minimum(np.maximum(plan.f_hz, in_time), cell.f_max_hz),
            power_w=plan.p_w,
            bandwidth_share=share,
            down_share=fleet.bandwidth_share,
        )

    def setup(self, run: RunContext) -> None:
        if not (run.folder / "plan.json").exists():  # a replay writes nothing
            self.plan.save(run.folder / "plan.json")
        plan, after = self.plan, run.data.counts()
        sent = plan.class_amounts.sum(axis=1) * int(np.prod(run.data.images.shape[1:]))
        seconds = self._delivery_s(run, sent)
        run.notes |= {
            "plan": {
                "search": plan.search,
                "energy_j": plan.energy_j,
                "lower_bound_j": plan.lower_bound_j,
                "gap": plan.gap,
                "synthetic_samples": int(plan.class_amounts.sum()),
                "delivery_bytes": int(sent.sum()),
                "delivery_s": seconds,
            },
            "synthetic_images": plan.class_amounts.sum(axis=0).tolist(),
            "label_entropy_before": float(label_entropy(self._before).mean()),
            "label_entropy_after": float(label_entropy(after).mean()),
        }

    def _delivery_s(self, run: RunContext, sent: np.ndarray) -> float:
        """Seconds until the last device has its synthetic images, as uint8 pixels, over its part of the down-link."""
        config, fleet = run.config.fleet, run.fleet
        share = fleet.down_share / fleet.down_share.sum()
        rate = shannon_rate(config.bandwidth_hz * share, config.server_power_w * share, fleet.gain, noise_w_hz(config))
        return float((8 * sent / rate).max())

    def begin_round(self, run: RunContext, round_number: int) -> None:
        period = round_number // self.replan_every if self.replan_every else 0
        if period == self._period:
            return
        self._period = period
        fleet = redraw_channels(run.config.fleet, self._drawn, run.config.seed, period)
        cell = replace(
            cell_of(run.config, run.data, fleet), d_gen_max=0.0, upload_bits=self.plan.cell.upload_bits, error_max=1e9
        )
        try:
            again = self.make_again(run.config, cell)
        except InfeasibleError as error:
            told = run.notes.get("periods_at_full_power", [])
            run.notes["periods_at_full_power"] = sorted({*told, period})  # a resumed run comes here once more
            run.progress.message(f"round {round_number + 1}: no plan on the new channels: {error}")
            again = full_power_plan(cell)
        run.fleet = self._at(fleet, again)

    def make_again(self, config: RunConfig, cell: Cell) -> Plan:
        """The plan on new channels, of a cell whose local samples are all that the devices have."""
        return make_plan(cell, replace(config.allocation, search="dual"))


def full_power_plan(cell: Cell) -> Plan:
    """The local samples alone, at f_max and p_max on even parts of the band."""
    return filled_plan(cell, np.zeros_like(cell.class_counts), "full_power")


class TFL(FIMI):
    """FIMI's baseline TFL: FedAvg without synthesis, with the resources planned for least energy within Tmax."""

    uses_generator = False
    synthesises = False


class HDC(FIMI):
    """FIMI's baseline HDC, heuristic data compensation: every class of a device is filled towards its largest, up to
    d_gen_max and to what fits into Tmax at f_max; at f_max and p_max on even parts of the band, whatever the energy.
    """

    def __init__(self, replan_every: int = 0) -> None:
        super().__init__(None, replan_every)

    def make(self, config: RunConfig, cell: Cell) -> Plan:
        return filled_plan(cell, heuristic_amounts(cell), "heuristic")

    def make_again(self, config: RunConfig, cell: Cell) -> Plan:
        return full_power_plan(cell)


def heuristic_amounts(cell: Cell) -> np.ndarray:
    """HDC's images of each class, int64 [devices, classes]."""
    from fl_ray.allocation.categories import water_fill

    idle = full_power_plan(cell)
    in_time = cell.f_max_hz * (cell.t_max_s - idle.t_com_s) / cell.cycles - cell.d_loc
    most = np.floor(np.clip(in_time, 0, cell.d_gen_max)).astype(np.int64)
    lacking = cell.class_counts.max(axis=1, keepdims=True) - cell.class_counts
    wanted = np.minimum(lacking.sum(axis=1), most)
    return np.stack([water_fill(own, int(amount)) for own, amount in zip(cell.class_counts, wanted, strict=True)])
