"""Numbers of a run and of several seeds of one, from histories and summaries."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "CLIENT_RESULTS",
    "DOMAIN",
    "METHOD_RESULTS",
    "REACHED",
    "aggregate",
    "mean_std",
    "method_results",
    "outcome",
    "spread_text",
    "target_key",
    "values_text",
    "worst_decile",
]

METHOD_RESULTS = {  # what methods put into the summary beside accuracy: title and scale in tables
    "clean_accuracy": ("test accuracy, clean [%]", 100),
    "size_weighted_accuracy": ("weighted by size [%]", 100),
    "pretrained_accuracy": ("after pre-training [%]", 100),
    "cas": ("CAS [%]", 1),
}
CLIENT_RESULTS = {"client_accuracy": "mean", "client_accuracy_worst_decile": "worst_decile"}
DOMAIN = "accuracy_on_"  # in front of a domain's name
REACHED = (("rounds", "round"), ("virtual_time_s", "virtual_time_s"), ("energy_j", "energy_j"))


def target_key(target: float) -> str:
    """How a target accuracy is named in summaries and tables."""
    return f"{target:g}"


def outcome(history: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> dict[str, Any]:
    """Final, best and late accuracy, and round, virtual time and energy at which each target was first reached (or
    null).

    The late accuracy is the mean of the last quarter of the evaluated rounds (at least one). Under skew accuracy swings
    from round to round: the last one is one draw of that, and the best one is chosen by the test images and flatters
    what swings most.
    """
    evaluated = [row for row in history if not math.isnan(row["test_accuracy"])]
    last = history[-1] if history else None
    late = [row["test_accuracy"] for row in evaluated[-math.ceil(len(evaluated) / 4) :]]
    reached = {}
    for target in targets:
        first = next((row for row in evaluated if row["test_accuracy"] >= target), None)
        reached[target_key(target)] = None if first is None else {name: first[column] for name, column in REACHED}
    return {
        "rounds": len(history),
        "final_accuracy": evaluated[-1]["test_accuracy"] if evaluated else None,
        "best_accuracy": max((row["test_accuracy"] for row in evaluated), default=None),
        "late_accuracy": statistics.fmean(late) if late else None,
        "final_loss": evaluated[-1]["test_loss"] if evaluated else None,
        "targets": reached,
        "virtual_time_s": last["virtual_time_s"] if last else 0.0,
        "energy_j": last["energy_j"] if last else 0.0,
        "bytes_up": last["bytes_up"] if last else 0,
        "bytes_down": last["bytes_down"] if last else 0,
    }


def method_results(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a method has measured beside accuracy, as title and text."""
    found = {title: (summary.get(name), scale) for name, (title, scale) in METHOD_RESULTS.items()}
    return [(title, f"{scale * value:.2f}") for title, (value, scale) in found.items() if value is not None]


def worst_decile(accuracies: Sequence[float]) -> float:
    """Mean over the tenth of the clients (at least one) that are worst off."""
    return statistics.fmean(sorted(accuracies)[: max(1, len(accuracies) // 10)])


def mean_std(values: Sequence[float]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None where there are no values, or is but one."""
    if not values:
        return None, None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def aggregate(label: str, summaries: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> dict[str, Any]:
    """One row of a comparison: means and sample standard deviations over seeds.

    Means of rounds, time and energy to a target are over the seeds that reached it; ``reached_T`` says how many did.
    """
    row: dict[str, Any] = {
        "label": label,
        "method": summaries[0]["method"],
        "seeds": " ".join(str(summary["seed"]) for summary in summaries),
        "runs": len(summaries),
        "partitions": " ".join(dict.fromkeys(summary["partition"] for summary in summaries)),
    }
    plain = (
        "final_accuracy",
        "best_accuracy",
        "late_accuracy",
        "virtual_time_s",
        "energy_j",
        "bytes_up",
        "bytes_down",
        "samples_trained",
        "wall_rounds_s",
    )
    for name in plain:
        values = [summary[name] for summary in summaries if summary[name] is not None]
        row[f"{name}_mean"], row[f"{name}_std"] = mean_std(values)
    for name, key in CLIENT_RESULTS.items():
        tested = [summary["client_accuracy"][key] for summary in summaries if summary.get("client_accuracy")]
        if tested:
            row[f"{name}_mean"], row[f"{name}_std"] = mean_std(tested)
    for name in METHOD_RESULTS:
        measured = [summary[name] for summary in summaries if summary.get(name) is not None]
        if measured:
            row[f"{name}_mean"], row[f"{name}_std"] = mean_std(measured)
            row[f"{name}_runs"] = len(measured)
    for name in dict.fromkeys(name for summary in summaries for name in summary.get("domain_accuracy", {})):
        measured = [summary["domain_accuracy"][name] for summary in summaries if name in summary["domain_accuracy"]]
        row[f"{DOMAIN}{name}_mean"], row[f"{DOMAIN}{name}_std"] = mean_std(measured)
    for target in targets:
        key = target_key(target)
        hits = [summary["targets"][key] for summary in summaries if summary["targets"].get(key) is not None]
        row[f"reached_{key}"] = len(hits)
        for name, _ in REACHED:
            row[f"{name}_to_{key}_mean"], row[f"{name}_to_{key}_std"] = mean_std([hit[name] for hit in hits])
    return row


def values_text(values: Sequence[float], digits: int) -> str:
    """``mean ± std`` of those values that are finite; a dash where none is."""
    mean, std = mean_std([value for value in values if math.isfinite(value)])
    return spread_text({"of_mean": mean, "of_std": std}, "of", digits)


def spread_text(row: Mapping[str, Any], name: str, digits: int, scale: float = 1.0) -> str:
    """``mean ± std`` of a column pair of ``aggregate``; a dash where there is none."""
    mean, std = row.get(f"{name}_mean"), row.get(f"{name}_std")
    if mean is None:
        return "–"
    text = f"{scale * mean:,.{digits}f}"
    return text if std is None else f"{text} ± {scale * std:,.{digits}f}"
