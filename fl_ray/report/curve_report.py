"""What ``fl-ray learning-curve`` leaves beside its runs: the fit, its points, a figure and a page."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fl_ray.allocation.learning_curve import CurveFit
from fl_ray.report import page as html
from fl_ray.report.comparison_report import markdown_table
from fl_ray.report.figures import save_svg
from fl_ray.report.plan_figures import curve_figure
from fl_ray.run_folder import write_json
from fl_ray.summary import mean_std

__all__ = ["write_curve"]

Titled = tuple[list[str], list[list[str]], str]

_NOTE = (
    "error(D) = α D^-β + γ, D samples per client, fitted by least squares to a point for each run: FedAvg on IID data "
    "of that amount. The band is where the curve lies with 95 % confidence, to first order. Beyond the largest amount "
    "it is an extrapolation."
)


def write_curve(fit: CurveFit, name: str, output: Path) -> list[Titled]:
    """Write learning_curve.json (``allocation.curve`` takes it), curve.md, figures/curve.svg and curve.html into
    ``output``; columns, rows and title of its two tables.
    """
    write_json(output / "learning_curve.json", fit.to_dict())
    points = (["samples per client", "runs", "error", "fitted", "95 % band"], _point_rows(fit), f"{name}: points")
    values = (["", "value", "times / plus or minus"], _value_rows(fit), f"{name}: curve")
    text = "".join(f"{markdown_table(*table[:2])}\n" for table in (points, values))
    (output / "curve.md").write_text(f"{text}{_NOTE}\n", encoding="utf-8")
    drawn = html.figure(save_svg(output, "curve", curve_figure(fit)), "Measured errors, the fit and its 95 % band.")
    sections = [
        html.section("Curve", drawn, html.table(*values[:2]), f'<p class="note">{_NOTE}</p>'),
        html.section("Points", html.table(*points[:2])),
    ]
    curve = fit.curve
    lead = f"error(D) = {curve.alpha:.4g} D^-{curve.beta:.4g} + {curve.gamma:.4g}, RMSE {fit.rmse:.2g}"
    (output / "curve.html").write_text(html.page(f"Learning curve: {name}", lead, sections), encoding="utf-8")
    return [points, values]


def _point_rows(fit: CurveFit) -> list[list[str]]:
    rows = []
    for amount in np.unique(fit.samples):
        errors = fit.errors[fit.samples == amount]
        mean, std = mean_std(errors.tolist())
        low, high = fit.band(amount)
        band = f"{low:.4f} to {high:.4f}" if np.isfinite(low) else "–"
        measured = f"{mean:.4f}" + ("" if std is None else f" ± {std:.4f}")
        rows.append([f"{amount:g}", str(len(errors)), measured, f"{fit.curve.error(amount):.4f}", band])
    return rows


def _value_rows(fit: CurveFit) -> list[list[str]]:
    """The parameters with one standard error: a factor for alpha and beta, which are fitted in the logarithm."""
    errors = np.sqrt(np.diag(fit.covariance))
    known = np.isfinite(errors)
    shown = [f"× {np.exp(errors[0]):.3g}", f"× {np.exp(errors[1]):.3g}", f"± {errors[2]:.3g}"]
    spread = [text if there else "–" for text, there in zip(shown, known, strict=True)]
    rows = [[symbol, f"{value:.6g}"] for symbol, value in zip("αβγ", fit.curve.to_dict().values(), strict=True)]
    return [[*row, error] for row, error in zip(rows, spread, strict=True)] + [["RMSE", f"{fit.rmse:.3g}", "–"]]
