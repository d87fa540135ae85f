"""The report of ``fl-ray quality``: tables, figures of gain against each measure, and the images themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_ray.comparison import write_comparison_csv
from fl_ray.downstream import MEASURES, rank_correlations
from fl_ray.report import page as html
from fl_ray.report.comparison_report import Table, markdown_table
from fl_ray.report.figures import gain_figure, save_svg
from fl_ray.summary import spread_text, target_key

__all__ = ["downstream_report", "quality_report"]

# Column: title, factor, digits. A column NAME_error is the standard error of NAME.
_SHOWN: dict[str, tuple[str, float, int]] = {
    "images": ("images", 1, 0),
    "domain_shift": ("domain shift [%]", 100, 1),
    "fid": ("FID", 1, 2),
    "kid": ("KID [10⁻³]", 1000, 2),
    "precision": ("precision", 1, 3),
    "recall": ("recall", 1, 3),
    "cas": ("CAS [%]", 100, 2),
    "clip_score": ("CLIP score", 1, 2),
    "closer_to_public": ("closer to public [%]", 100, 1),
    "closer_to_reserve": ("closer to reserve [%]", 100, 1),
    "closer_to_clients": ("closer to clients [%]", 100, 1),
    "training_s": ("training [s]", 1, 1),
    "sampling_s_per_image": ("sampling [ms per image]", 1000, 2),
}
_NOTES = (
    "Domain shift: how often a small classifier tells held-out synthetic images from real ones (50, or below: no "
    "better than chance; ±: of the share alone, not of the classifier's training). FID, KID (± standard error), "
    "precision and recall (k = 3, mean over classes) compare features with those "
    "of as many real test images of each class; compare them within this table only. CAS: test accuracy of the "
    "recipe's model after training on these images alone. Closer to ...: share of images that are nearer (in pixels) "
    "to an image of that part than to any of equally many test images: about 50 where nothing is memorised, give or "
    "take several points, since a few images are the nearest of many; the rows of real images, which have learnt "
    "nothing, are what to hold it against. Rows of real images: what real ones score; the feature extractor was "
    "trained on the public ones. Training: when the generator was made, on whatever machine that was; sampling: "
    "measured now, by the whole pool."
)
_RANKS = (
    "Spearman's rank correlation with each gain, and over how many generators it was taken (at least three). Over so "
    "few, even a large one may be chance, and values that differ by less than their error have ranks all the same."
)
_BY_CLIENT = (
    " A client's images are measured against test images of its domains and classes: compare them with the row of its "
    "own real images, not with other clients'. They are all that it has guided, accepted or not."
)


def _text(row: Mapping[str, Any], name: str) -> str:
    value, (_, factor, digits) = row.get(name), _SHOWN[name]
    if value is None:
        return "–"
    error = row.get(f"{name}_error")
    return f"{factor * value:,.{digits}f}" + (f" ± {factor * error:,.{digits}f}" if error is not None else "")


def _quality_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    shown = [name for name in _SHOWN if any(row.get(name) is not None for row in rows)]
    cells = [[str(row["label"]), *(_text(row, name) for name in shown)] for row in rows]
    return ["images of", *(_SHOWN[name][0] for name in shown)], cells


def quality_report(
    output: Path,
    lead: str,
    rows: Sequence[Mapping[str, Any]],
    samples: Sequence[bytes],
    more: Sequence[str] = (),
    by_client: bool = False,
) -> Table:
    """Write quality.csv, quality.md and quality.html into ``output``; the table.

    Args:
        rows: of ``fl_ray.quality.measure``; ``samples``: PNGs of the first of them.
        more: sections behind the table.
        by_client: the rows are of clients, each measured against images like its own.
    """
    table = _quality_table(rows)
    flat = [{key: value for key, value in row.items() if not isinstance(value, (dict, list))} for row in rows]
    write_comparison_csv(flat, output / "quality.csv")
    (output / "quality.md").write_text(markdown_table(*table), encoding="utf-8")
    pictures = [
        html.figure(html.data_image(png, f"real and synthetic images of {row['label']}"), str(row["label"]))
        for row, png in zip(rows, samples, strict=False)
    ]
    sections = [
        html.section("Quality", html.table(*table), f'<p class="note">{_NOTES}{_BY_CLIENT if by_client else ""}</p>'),
        *more,
        html.section("Images", *pictures),
    ]
    text = html.page("fl_ray: quality of synthetic images", lead, sections)
    (output / "quality.html").write_text(text, encoding="utf-8")
    return table


def downstream_report(output: Path, rows: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> tuple[str, Table]:
    """Write downstream.csv, downstream.md, correlations.csv and figures/gain.svg into ``output``; the section of the
    report, and its table.

    Args:
        rows: of ``fl_ray.downstream.with_measures``.
    """
    write_comparison_csv(rows, output / "downstream.csv")
    correlations = rank_correlations(rows, targets)
    write_comparison_csv(correlations, output / "correlations.csv")
    table, ranks = _downstream_table(rows, targets), _correlation_table(rows, correlations)
    shown = [table, ranks] if correlations else [table]
    (output / "downstream.md").write_text("\n".join(markdown_table(*each) for each in shown), encoding="utf-8")
    members = [row for row in rows if row["group"] is not None]
    drawn = gain_figure(
        [row["label"] for row in members],
        [100 * row["late_gain_mean"] for row in members],
        [None if row["late_gain_std"] is None else 100 * row["late_gain_std"] for row in members],
        [row["group"] for row in members],
        _panels(members),
    )
    section = html.section(
        "Does it matter?",
        html.table(*table),
        '<p class="note">Gain: final accuracy less that of FedAvg with the same seed, mean ± sample standard deviation '
        "over seeds; late: the same of the mean over the last quarter of the rounds; so are rounds saved, over the "
        "seeds in which both reached the target, in brackets where these are fewer.</p>",
        html.figure(
            save_svg(output, "gain", drawn), "Late gain over FedAvg against each measure; bars: one standard deviation."
        ),
        *([html.table(*ranks), f'<p class="note">{_RANKS}</p>'] if correlations else []),
    )
    return section, table


def _panels(members: Sequence[Mapping[str, Any]]) -> dict[str, list[float | None]]:
    panels = {}
    for name in MEASURES:
        title, factor, _ = _SHOWN[name]
        values = [row.get(name) for row in members]
        if any(value is not None for value in values):
            panels[title] = [None if value is None else factor * value for value in values]
    return panels


def _downstream_table(rows: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> Table:
    columns = ["run", "seeds", "final accuracy [%]", "gain [points]", "gain, late [points]"]
    for target in targets:
        columns += [f"rounds to {target:.0%}", f"rounds saved to {target:.0%}"]
    beside = ("domain_shift", "kid", "cas", "training_s", "sampling_s_per_image")
    columns += [_SHOWN[name][0] for name in beside]
    cells = []
    for row in rows:
        line = [
            row["label"],
            str(row["runs"]),
            spread_text(row, "final_accuracy", 2, 100),
            spread_text(row, "gain", 2, 100),
            spread_text(row, "late_gain", 2, 100),
        ]
        for key in map(target_key, targets):
            saved = f"rounds_saved_to_{key}"
            counts = {f"rounds_to_{key}": row[f"reached_{key}"], saved: row.get(f"{saved}_seeds", row["runs"])}
            for name, seeds in counts.items():
                few = f" ({seeds} of {row['runs']})" if seeds < row["runs"] else ""
                line.append(spread_text(row, name, 1) + few)
        cells.append(line + [_text(row, name) for name in beside])
    return columns, cells


def _correlation_table(rows: Sequence[Mapping[str, Any]], correlations: Sequence[Mapping[str, Any]]) -> Table:
    """A line of each measure and group, a column of each gain."""
    titles = {"gain_mean": "with the gain", "late_gain_mean": "with the late gain"}
    found: dict[tuple[int, str], list[str]] = {}
    groups = sorted({entry["group"] for entry in correlations})
    for entry in correlations:
        target = entry["gain"].removeprefix("rounds_saved_to_").removesuffix("_mean")
        if entry["gain"] not in titles:
            titles[entry["gain"]] = f"with rounds saved to {float(target):.0%}"
        rho = "–" if entry["spearman"] is None else f"{entry['spearman']:+.2f}"
        found.setdefault((entry["group"], entry["measure"]), []).append(f"{rho} ({entry['levels']})")
    cells = []
    for (group, measure), values in found.items():
        first = next(row["label"] for row in rows if row["group"] == group)
        name = _SHOWN[measure][0].partition(" [")[0]
        cells.append([name if len(groups) == 1 else f"{name}, as {first}", *values])
    return ["Spearman's ρ of", *titles.values()], cells
