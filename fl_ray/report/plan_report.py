"""What ``fl-ray plan`` leaves: plan.json, devices.csv, figures and a page."""

from __future__ import annotations

import csv
from pathlib import Path

from fl_ray.allocation.plan import Plan
from fl_ray.report import page as html
from fl_ray.report.figures import save_svg
from fl_ray.report.plan_figures import allocation_figure, energy_figure, search_figure

__all__ = ["device_rows", "total_rows", "write_plan"]

DEVICE_COLUMNS = (
    "device",
    "local",
    "synthetic",
    "ρ",
    "f [GHz]",
    "b [MHz]",
    "p [mW]",
    "computing [s]",
    "uplink [s]",
    "computing [J]",
    "uplink [J]",
)
_NOTE = (
    "FIMI's formulation (arXiv 2310.13981) in our reconstruction with the standard cost model of Yang et al. (arXiv "
    "1911.02417). Energy of devices for one round. The lower bound is the dual's: no plan within the limits needs less."
)


def device_rows(plan: Plan, most: int | None = None) -> list[list[str]]:
    """A row for each of the first ``most`` devices."""
    rows = []
    for device in range(plan.cell.devices if most is None else min(most, plan.cell.devices)):
        rows.append(
            [
                str(device),
                f"{plan.cell.d_loc[device]:.0f}",
                f"{plan.d_gen[device]:.1f}",
                f"{plan.rho[device]:.4f}",
                f"{plan.f_hz[device] / 1e9:.4f}",
                f"{plan.b_hz[device] / 1e6:.4f}",
                f"{plan.p_w[device] * 1e3:.3f}",
                f"{plan.t_cmp_s[device]:.3f}",
                f"{plan.t_com_s[device]:.3f}",
                f"{plan.e_cmp_j[device]:.4f}",
                f"{plan.e_com_j[device]:.4f}",
            ]
        )
    return rows


def total_rows(plan: Plan) -> list[list[str]]:
    """Totals, the certificate, and which limits bind."""
    rows = [
        ["energy", f"{plan.energy_j:.6g} J"],
        ["... of it computing", f"{plan.e_cmp_j.sum():.6g} J"],
        ["... of it uplink", f"{plan.e_com_j.sum():.6g} J"],
        ["lower bound", f"{plan.lower_bound_j:.6g} J"],
        ["gap", _gap(plan)],
        ["samples, local", f"{plan.cell.d_loc.sum():.0f}"],
        ["samples, synthetic", f"{plan.d_gen.sum():.1f}"],
        ["error on the curve", f"{plan.error:.6g}"],
        ["time of the round", f"{(plan.t_cmp_s + plan.t_com_s).max():.4g} s"],
        ["a looser error_max saves", f"{plan.error_price_j / 1000:.4g} J per 0.001"],
        ["a wider band saves", f"{plan.band_price_j_hz * 1e6:.4g} J per MHz"],
    ]
    for name, found in plan.binding().items():
        if isinstance(found, bool):
            rows.append([f"{name} binds", "yes" if found else "no"])
        elif found:
            shown = ", ".join(map(str, found[:12])) + (", ..." if len(found) > 12 else "")
            all_of_them = len(found) == plan.cell.devices
            rows.append([f"{name} binds", "all devices" if all_of_them else f"{len(found)} devices: {shown}"])
    return rows


def _gap(plan: Plan) -> str:
    return "unknown" if plan.gap is None else f"{plan.gap:.2e}"


def write_plan(plan: Plan, name: str, output: Path) -> None:
    """Everything into the folder ``output``."""
    plan.save(output / "plan.json")
    rows = device_rows(plan)
    with (output / "devices.csv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerows([DEVICE_COLUMNS, *rows])
    drawn = [
        (energy_figure(plan), "energy", "Energy of each device, the largest spenders first."),
        (allocation_figure(plan), "allocation", "Who gets what, against the strength of devices and channels."),
    ]
    if plan.history_j:
        drawn.append((search_figure(plan), "search", f"The search {plan.search}: gap of the best plan so far."))
    figures = [html.figure(save_svg(output, file, figure), caption) for figure, file, caption in drawn]
    sections = [
        html.section("Totals", html.table(["", "value"], total_rows(plan)), f'<p class="note">{_NOTE}</p>'),
        html.section("Figures", *figures),
        html.section("Devices", html.table(DEVICE_COLUMNS, rows[:1000])),
    ]
    lead = f"{plan.cell.devices} devices, {plan.energy_j:.6g} J a round, gap {_gap(plan)}"
    (output / "plan.html").write_text(html.page(f"Plan: {name}", lead, sections), encoding="utf-8")
