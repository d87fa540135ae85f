"""The report of one run, from its folder alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fl_ray.recipes import to_dict
from fl_ray.report import page as html
from fl_ray.report.figures import (
    accuracy_figure,
    client_accuracy_figure,
    kappa_figure,
    partition_figure,
    save_svg,
    timeline_figure,
)
from fl_ray.run_folder import RunFolder
from fl_ray.summary import method_results

__all__ = ["clients_section", "partition_section", "run_report", "samples_section"]

_LISTED = 20  # classes whose amounts are told one by one


def run_report(folder: RunFolder) -> Path:
    """Write report.html and figures/*.svg of a run's folder; the report's path."""
    config, summary, history = folder.config(), folder.summary() or {}, folder.history()
    sections = [_outcome(summary)]
    of = summary.get("accuracy_of")
    drawn = accuracy_figure({config.method.name: [history]}, config.targets, "accuracy" if of else "test accuracy")
    curve = save_svg(folder.path, "accuracy", drawn)
    what = f"Accuracy on {of}," if of else "Test accuracy"
    caption = f"{what} against rounds, virtual time and the devices' energy. Dashed: the recipe's targets."
    sections.append(html.section("Accuracy", html.figure(curve, caption)))
    sections.append(clients_section(folder.path, {config.method.name: [folder]}))
    sections += [_kappa(folder, summary), partition_section(folder), samples_section({config.method.name: folder})]
    sections += [_timeline(folder, config.clock.mode), _wall(summary)]
    settings = yaml.safe_dump(to_dict(config), sort_keys=False)
    versions = yaml.safe_dump(folder.environment(), sort_keys=False)
    sections.append(
        html.section(
            "Settings", html.definitions("resolved recipe", settings), html.definitions("what ran it", versions)
        )
    )
    lead = f"{config.method.name} on {config.data.name}, {config.data.clients} clients, seed {config.seed}"
    path = folder / "report.html"
    path.write_text(html.page(f"fl_ray: {config.name}", lead, [part for part in sections if part]), encoding="utf-8")
    return path


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.2f} %"


def _outcome(summary: dict[str, Any]) -> str:
    if not summary:
        return html.section("Result", '<p class="note">The run has not come to its end.</p>')
    rows = [["status", summary["status"]]]
    if summary.get("accuracy_of"):
        rows.append(["accuracy is on", summary["accuracy_of"]])
    rows.append(["final accuracy", _percent(summary["final_accuracy"])])
    rows.append(["best accuracy", _percent(summary["best_accuracy"])])
    if summary.get("best_round") is not None:
        rows.append(["best round", str(summary["best_round"])])
    rows += [
        ["rounds", _rounds(summary)],
        ["virtual time", f"{summary['virtual_time_s']:,.1f} s"],
        ["energy of all devices", f"{summary['energy_j']:,.1f} J"],
        ["sent up / down", f"{summary['bytes_up'] / 1e6:,.2f} / {summary['bytes_down'] / 1e6:,.2f} MB"],
        ["updates left out", _left_out(summary)],
    ]
    if summary.get("clients_retried"):
        rows.append(["clients that raised once, and were trained again", str(summary["clients_retried"])])
    for target, hit in summary["targets"].items():
        reached = "not reached"
        if hit is not None:
            reached = f"round {hit['rounds']}, {hit['virtual_time_s']:,.1f} s, {hit['energy_j']:,.1f} J"
        rows.append([f"accuracy {float(target):.0%}", reached])
    if summary.get("client_accuracy"):
        found = summary["client_accuracy"]
        spread = f"{_percent(found['mean'])}, worst tenth {_percent(found['worst_decile'])}"
        rows.append([f"mean accuracy on {found['clients']} clients' own held-out images", spread])
    rows += [[title, text] for title, text in method_results(summary)]
    if summary.get("synthetic_images"):
        rows.append(["synthetic images by class", _amounts(summary["synthetic_images"])])
    if summary.get("kappa2"):
        rows.append(["κ2, weight of the augmented model", _range(summary["kappa2"])])
    if summary.get("label_sharing"):
        rows.append(["label statistics that a client shared", _shared(summary["label_sharing"])])
    return html.section("Result", html.table(["", "value"], rows))


def _amounts(counts: Sequence[int]) -> str:
    if len(counts) > _LISTED:
        return f"{min(counts):,} to {max(counts):,}, {sum(counts):,} in all"
    return ", ".join(f"{count:,}" for count in counts)


def _range(values: Sequence[float]) -> str:
    least, most = (f"{value:.3g}" for value in (min(values), max(values)))
    return least if least == most else f"{least} to {most}, {values[-1]:.3g} in the last round"


def _shared(note: dict[str, Any]) -> str:
    spent = note["epsilon_spent"]
    privacy = "no guarantee of privacy"
    if spent is not None:  # runs of before it was noted hid a sample that is there or not
        privacy = f"privacy budget spent: epsilon {spent:g} (hides {note.get('hides', 'one sample more or less')})"
    return f"{note['level']}, {note['bytes_per_client']} bytes; {privacy}"


def _kappa(folder: RunFolder, summary: dict[str, Any]) -> str:
    """The figure of a kappa that changes, or nothing."""
    kappas = summary.get("kappa2") or []
    if len(set(kappas)) < 2:
        return ""
    caption = "The weight of the augmented model in each round; the clients' average has the rest."
    return html.section("Kappa", html.figure(save_svg(folder.path, "kappa", kappa_figure(kappas)), caption))


def _rounds(summary: dict[str, Any]) -> str:
    early = summary.get("stopped_early")
    return str(summary["rounds"]) + ("" if early is None else ", stopped early: the accuracy rose no more")


def _left_out(summary: dict[str, Any]) -> str:
    kinds = [
        f"{kind.replace('_', ' ')}: {count}" for kind, count in summary.get("clients_left_out", {}).items() if count
    ]
    return str(summary["updates_left_out"]) + (f" ({', '.join(kinds)})" if kinds else "")


def clients_section(output: Path, runs: Mapping[str, Sequence[RunFolder]]) -> str:
    """The figure of the clients' last own tests in the runs of each label, or nothing."""
    found = {label: [folder.last_client_test() for folder in folders] for label, folders in runs.items()}
    tests = {label: [[row["accuracy"] for row in rows] for rows in all_ if rows] for label, all_ in found.items()}
    tests = {label: seeds for label, seeds in tests.items() if seeds}
    if not tests:
        return ""
    drawn = save_svg(output, "clients", client_accuracy_figure(tests))
    caption = (
        "Accuracy of each client's model on the images that it held out, at its last test: the share of clients that "
        "have at most so much. Dashed: a tenth of the clients; dot: the mean of that worst tenth."
    )
    return html.section("Clients", html.figure(drawn, caption))


def partition_section(folder: RunFolder) -> str:
    """The bubble figure with its entropy and distance, or nothing."""
    if not (folder / "partition.json").exists():
        return ""
    found = json.loads((folder / "partition.json").read_text(encoding="utf-8"))
    drawn = save_svg(folder.path, "partition", partition_figure(np.array(found["counts"]), found["classes"]))
    caption = (
        f"Training samples of each class at each client (area). Mean label entropy {found['mean_entropy_bits']:.2f} "
        f"bits, mean EMD to the global distribution {found['mean_emd']:.2f} (0: the same, 2: disjoint)."
    )
    return html.section("Partition", html.figure(drawn, caption))


def samples_section(runs: Mapping[str, RunFolder]) -> str:
    """The grids of real and synthetic images by label, each once, or nothing."""
    labels: dict[bytes, list[str]] = {}
    for label, folder in runs.items():
        if (folder / "samples.png").exists():
            labels.setdefault((folder / "samples.png").read_bytes(), []).append(label)
    if not labels:
        return ""
    figures = [
        html.figure(html.data_image(picture, f"real and synthetic images of {', '.join(own)}"), f"{', '.join(own)}.")
        for picture, own in labels.items()
    ]
    note = "Generated images, beside real ones where there are any; a row for each class, or for each guiding client."
    return html.section("Synthetic images", *figures, f'<p class="note">{note}</p>')


def _timeline(folder: RunFolder, mode: str) -> str:
    rounds = folder.timeline()
    # An asynchronous round has no common start to draw its devices from.
    if not rounds or mode == "asynchronous":
        return ""
    caption = f"The first {len(rounds)} rounds on the virtual clock: each ends with its slowest device or its deadline."
    return html.section(
        "Device timeline", html.figure(save_svg(folder.path, "timeline", timeline_figure(rounds)), caption)
    )


def _wall(summary: dict[str, Any]) -> str:
    if not summary:
        return ""
    rows = [[name, f"{seconds:,.2f} s"] for name, seconds in summary["wall_s"].items()]
    kept = summary.get("client_models") or {}
    if kept.get("from_cache"):
        told = "of train, the clients' training, which this run took from the cache: as an earlier run measured it"
        rows.append([told, f"{kept['train_seconds']:,.2f} s"])
    rows += [
        [f"peak memory of the process so far, {name}", f"{size:,.0f} MB"]
        for name, size in summary["process_peak_memory_mb"].items()
    ]
    return html.section("Wall time and memory", html.table(["", "measured"], rows))
