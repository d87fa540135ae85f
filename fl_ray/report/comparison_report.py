"""The report of a comparison: one table and figures over seeds, from the runs' folders alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fl_ray.comparison import rows_of_runs, write_comparison_csv
from fl_ray.errors import OutputError
from fl_ray.pairs import compare_pairs, p_text
from fl_ray.report import page as html
from fl_ray.report.figures import accuracy_figure, save_svg
from fl_ray.report.run_report import clients_section, partition_section, samples_section
from fl_ray.run_folder import RunFolder
from fl_ray.summary import CLIENT_RESULTS, DOMAIN, METHOD_RESULTS, REACHED, outcome, spread_text, target_key

__all__ = ["comparison_report", "comparison_table", "markdown_table"]

Table = tuple[list[str], list[list[str]]]
_LEGEND = "Mean ± standard deviation over seeds; means of rounds are over the seeds that reached the target."
_PAIRED = {"final_accuracy": "final accuracy", "late_accuracy": "late accuracy"}
_PAIRED_LEGEND = (
    "Differences over the seeds that both have, on the same partition: mean ± half width of Student's 95 % interval; "
    "p: two-sided paired t-test, from three pairs on, not corrected for several comparisons. Late: mean over the last "
    "quarter of the rounds. Rounds: over the seeds in which both reached the target, in brackets where these are fewer."
)


def comparison_table(rows: Sequence[dict[str, Any]], targets: Sequence[float], brief: bool = False) -> Table:
    """Columns and cells as a reader wants them; ``brief`` leaves out what is too wide for a terminal."""
    several = len({row["partitions"] for row in rows}) > 1
    columns = ["run", "seeds", "final accuracy [%]", "best [%]"]
    tested = any(f"{name}_mean" in row for row in rows for name in CLIENT_RESULTS)
    columns += ["own tests of clients [%]", "their worst tenth [%]"] if tested else []
    measured = {name: how for name, how in METHOD_RESULTS.items() if any(f"{name}_mean" in row for row in rows)}
    columns += [title for title, _ in measured.values()]
    tested_on = [name for row in rows for name in row if name.startswith(DOMAIN) and name.endswith("_mean")]
    domains = [name.removesuffix("_mean") for name in dict.fromkeys(tested_on)]
    columns += [f"{name.removeprefix(DOMAIN)} [%]" for name in domains]
    for target in targets:
        percent = f"{target:.0%}"
        columns.append(f"rounds to {percent}")
        columns += [] if brief else [f"virtual time to {percent} [s]", f"energy to {percent} [J]"]
    columns += [] if brief else ["samples trained", "sent up [MB]", "wall of rounds [s]"]
    columns += ["partitions"] if several else []
    cells = []
    for row in rows:
        line = [row["label"], str(row["runs"])]
        line += [spread_text(row, "final_accuracy", 2, 100), spread_text(row, "best_accuracy", 2, 100)]
        line += [spread_text(row, name, 2, 100) for name in CLIENT_RESULTS] if tested else []
        for name, (_, scale) in measured.items():
            told = row.get(f"{name}_runs", row["runs"])  # runs of before a method told it lack it
            few = "" if told == row["runs"] else f" ({told} of {row['runs']})"
            line.append(spread_text(row, name, 2, scale) + few)
        line += [spread_text(row, name, 2, 100) for name in domains]
        for target in targets:
            key = target_key(target)
            hits = row[f"reached_{key}"]
            suffix = "" if hits == row["runs"] else f" ({hits} of {row['runs']})"
            line.append(spread_text(row, f"rounds_to_{key}", 1) + suffix)
            if not brief:
                line += [spread_text(row, f"virtual_time_s_to_{key}", 1), spread_text(row, f"energy_j_to_{key}", 1)]
        if not brief:
            line += [spread_text(row, "samples_trained", 0), spread_text(row, "bytes_up", 2, 1e-6)]
            line.append(spread_text(row, "wall_rounds_s", 1))
        cells.append(line + ([row["partitions"]] if several else []))
    return columns, cells


def _rows_by_seed(by_label: Mapping[str, Sequence[RunFolder]], targets: Sequence[float]) -> list[dict[str, Any]]:
    """A row of each run: what seeds.csv holds, and differences are taken of."""
    rows = []
    for label, members in by_label.items():
        for folder in members:
            summary, ended = folder.summary(), outcome(folder.history(), targets)
            row = {"label": label, "seed": summary["seed"], "partition": summary["partition"]}
            row["accuracy_of"] = summary.get("accuracy_of", "the test part")
            row |= {name: ended[name] for name in ("final_accuracy", "best_accuracy", "late_accuracy")}
            for key, hit in ended["targets"].items():
                row |= {f"{name}_to_{key}": hit and hit[name] for name, _ in REACHED}
            rows.append(row)
    return rows


def _difference_table(
    rows: Sequence[Mapping[str, Any]], targets: Sequence[float], baseline: str | None = None
) -> Table | None:
    """How far each label is from the baseline (default: the first), seed by seed: seeds differ in partition and draws,
    so that labels can be told apart where their spreads overlap. Seeds whose partitions differ are no pair, nor are
    accuracies on other images. None where no label has two pairs.

    Args:
        rows: of ``_rows_by_seed``.
    """
    labels = list(dict.fromkeys(row["label"] for row in rows))
    baseline = labels[0] if baseline is None else baseline

    def values(label: str, name: str) -> dict[tuple[int, str, str], float]:
        own = [row for row in rows if row["label"] == label and row[name] is not None]
        return {(row["seed"], row["partition"], row["accuracy_of"]): row[name] for row in own}

    def pair(label: str, name: str) -> dict[str, Any]:
        return compare_pairs(values(label, name), values(baseline, name))

    columns = ["run", "pairs"]
    for title in _PAIRED.values():
        columns += [f"{title} less {baseline}'s [points]", "p"]
    columns += [f"rounds to {target:.0%} less {baseline}'s" for target in targets]
    cells = []
    for label in labels:
        count = pair(label, "final_accuracy")["pairs"]
        if label == baseline or count < 2:
            continue
        line = [label, str(count)]
        for name in _PAIRED:
            found = pair(label, name)
            line += [_difference(found, 100, 2), p_text(found["p"])]
        for target in targets:
            found = pair(label, f"rounds_to_{target_key(target)}")
            few = f" ({found['pairs']})" if found["pairs"] < count else ""
            line.append(_difference(found, 1, 1) + few)
        cells.append(line)
    return (columns, cells) if cells else None


def _difference(pair: Mapping[str, Any], scale: float, digits: int) -> str:
    if pair["difference"] is None:
        return "–"
    text = f"{scale * pair['difference']:+.{digits}f}"
    return text if pair["half_width"] is None else f"{text} ± {scale * pair['half_width']:.{digits}f}"


def _accuracy_notes(by_label: Mapping[str, Sequence[RunFolder]]) -> str:
    """What the accuracy of labels is of, where that is not the test part; a sentence for each."""
    found: dict[str, list[str]] = {}
    for label, members in by_label.items():
        for of in dict.fromkeys(folder.summary().get("accuracy_of") for folder in members):
            if of:
                found.setdefault(of, []).append(label)
    notes = [f" Accuracy of {', '.join(labels)}: on {of}." for of, labels in found.items()]
    summaries = [folder.summary() for members in by_label.values() for folder in members]
    if notes and any("pretrained_accuracy" in summary for summary in summaries):
        notes.append(" After pre-training: on the test part.")
    return "".join(notes)


def comparison_report(output: Path, folders: Sequence[RunFolder], baseline: str | None = None) -> tuple[Table, str]:
    """Write comparison.csv, seeds.csv, comparison.md (with the differences by seed), figures/accuracy.svg and
    report.html into ``output``; the brief table, and what is to be said below it.

    Args:
        baseline: the label that the others are held against; default: the first.

    Raises:
        OutputError: no folder holds a finished run.
    """
    rows, by_label, targets = rows_of_runs(folders)
    if not rows:
        raise OutputError(f"{', '.join(str(folder.path) for folder in folders)}: no finished run to report on")
    write_comparison_csv(rows, output / "comparison.csv")
    by_seed = _rows_by_seed(by_label, targets)
    write_comparison_csv(by_seed, output / "seeds.csv")
    brief = comparison_table(rows, targets, brief=True)
    differences = _difference_table(by_seed, targets, baseline)
    other = _accuracy_notes(by_label)
    text = f"{markdown_table(*brief)}\n{_LEGEND}{other}\n"
    if differences is not None:
        text += f"\n{markdown_table(*differences)}\n{_PAIRED_LEGEND}\n"
    (output / "comparison.md").write_text(text, encoding="utf-8")
    columns, cells = comparison_table(rows, targets)
    histories = {label: [folder.history() for folder in members] for label, members in by_label.items()}
    of = "accuracy" if other else "test accuracy"
    curves = save_svg(output, "accuracy", accuracy_figure(histories, targets, of))
    first = next(iter(by_label.values()))[0]
    note = (
        f"Mean ± sample standard deviation over seeds; best: the largest {of} of any round.{html.escape(other)} "
        "Rounds, time and energy to a target are means over the seeds that reached it. Virtual time and "
        "energy are modelled, wall time is measured. Virtual time holds the training of devices and server, not the "
        "making of synthetic images: its wall seconds are in the summary.json of the run that made them, and 0 in "
        "those that found them in the cache. Samples trained: samples times epochs, of clients and server."
    )
    sections = [
        html.section("Results", html.table(columns, cells), f'<p class="note">{note}</p>'),
        html.section("Seed by seed", html.table(*differences), f'<p class="note">{_PAIRED_LEGEND}</p>')
        if differences is not None
        else "",
        html.section(
            "Accuracy",
            html.figure(curves, f"{of.capitalize()}; shaded: one standard deviation. Dashed: the targets."),
        ),
        clients_section(output, by_label),
        partition_section(first),
        samples_section({label: members[0] for label, members in by_label.items()}),
        _links(output, by_label),
    ]
    summary = first.summary()
    seeds = sorted({folder.summary()["seed"] for members in by_label.values() for folder in members})
    lead = f"{summary['data']}, {len(rows)} settings, seeds {' '.join(map(str, seeds))}"
    text = html.page(f"fl_ray: {summary['name']}", lead, [part for part in sections if part])
    (output / "report.html").write_text(text, encoding="utf-8")
    return brief, f"{_LEGEND}{other}"


def markdown_table(columns: list[str], cells: list[list[str]]) -> str:
    """The table for a README, so that nobody types numbers."""
    rule = ["---"] + ["---:"] * (len(columns) - 1)
    return "".join("| " + " | ".join(line) + " |\n" for line in [columns, rule, *cells])


def _links(output: Path, by_label: dict[str, list[RunFolder]]) -> str:
    rows = []
    for label, members in by_label.items():
        for folder in members:
            summary = folder.summary()
            accuracy = f"{100 * summary['final_accuracy']:.2f}"
            inside = folder.path.resolve().is_relative_to(output.resolve())
            place = folder.path.resolve().relative_to(output.resolve()) if inside else folder.path
            rows.append([label, str(summary["seed"]), accuracy, f"{summary['wall_total_s']:.1f}", str(place)])
    return html.section("Runs", html.table(["run", "seed", "final accuracy [%]", "wall [s]", "folder"], rows))
