"""Does the quality of synthetic images matter? Measures of ``fl-ray quality`` beside what runs gained over FedAvg.

The question of GenFL (arXiv 2503.20166). A gain is taken seed by seed, so that what a seed does to both (partition,
cohorts, first weights) is not in it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scipy.stats import spearmanr

from fl_ray.comparison import differing, result_settings, row_of, rows_of_runs, same_settings
from fl_ray.config import RunConfig
from fl_ray.errors import OutputError
from fl_ray.run_folder import RunFolder
from fl_ray.summary import mean_std, outcome, target_key

__all__ = ["MEASURES", "gains_of_runs", "rank_correlations", "with_measures"]

BASELINE = "fedavg"
QUALITY = (
    "domain_shift",
    "fid",
    "kid",
    "precision",
    "recall",
    "cas",
    "clip_score",
    "closer_to_public",
    "closer_to_clients",
)
MEASURES = (*QUALITY, "training_s", "sampling_s_per_image")
_SETTING = ("data", "model", "training", "rounds", "clients_per_round")
_LEAST = 3  # labels that a rank correlation is taken over


def gains_of_runs(
    configs: Mapping[str, RunConfig], folders: Sequence[RunFolder], where: str
) -> tuple[list[dict[str, Any]], list[float]]:
    """FedAvg's row, then one of each label in ``configs``; and all targets.

    Args:
        configs: the recipe's configurations by label.
        folders: runs of ``fl-ray compare`` on the recipe.
        where: what names the folders in messages.

    Returns:
        Columns as of a comparison, over the seeds that FedAvg has, too; ``gain`` (final accuracy less FedAvg's),
        ``late_gain`` (of the mean of the last quarter of the rounds, see ``fl_ray.summary.outcome``) and
        ``rounds_saved_to_T`` (FedAvg's rounds less the label's, over the ``_seeds`` in which both reached T), each
        ``_mean`` and ``_std``; and ``group``: labels that differ in nothing but their generators have the same.

    Raises:
        OutputError: runs of a label or of FedAvg are missing, or were made with other settings.
    """
    results, by_label, targets = rows_of_runs(folders)
    plain_row = next((row for row in results if _is_plain(by_label[row["label"]][0].config())), None)
    if plain_row is None:
        raise OutputError(
            f"--runs {where}: no finished run of {BASELINE}, which a gain is counted from; add {{label: FedAvg, "
            f"method.name: {BASELINE}}} to the recipe's compare list and run fl-ray compare"
        )
    baseline = plain_row["label"]
    plain = _outcomes(by_label[baseline], targets)
    found: list[dict[str, Any]] = [{**plain_row, "group": None}]
    groups: list[dict[str, Any]] = []
    for label, config in configs.items():
        runs = [run for run in by_label.get(label, []) if run.summary()["seed"] in plain]
        others = [
            run.config() for run in runs if not same_settings(run.config(), replace(config, seed=run.config().seed))
        ]
        if not runs or others:
            what = f"no finished run with a seed of {baseline}"
            if others:
                what = f"other settings than the recipe's ({', '.join(differing(others[0], config))})"
            raise OutputError(
                f"--runs {where}: {what} for the label {label!r}; give the recipe and the overrides that fl-ray "
                "compare was given, and let it come to its end"
            )
        _same_setting(config, by_label[baseline][0].config(), label, baseline, where)
        beside = {key: value for key, value in result_settings(config).items() if key != "generator"}
        if beside not in groups:
            groups.append(beside)
        gains = _gains(_outcomes(runs, targets), plain, targets)
        found.append({**row_of(label, runs, targets), **gains, "group": groups.index(beside)})
    return found, targets


def _is_plain(config: RunConfig) -> bool:
    """Whether it is FedAvg as it stands, whose server takes the average."""
    settings = config.method.settings
    averages = settings.get("server_optimizer", "sgd") == "sgd" and settings.get("server_lr") in (None, 1)
    return config.method.name == BASELINE and averages


def with_measures(gains: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of ``gains_of_runs`` with the measures of each label's generator, which are in rows of ``measure``."""
    measured = {label: row for row in rows for label in row["labels"]}
    return [
        {**row, **{name: measured[row["label"]][name] for name in MEASURES if name in measured.get(row["label"], {})}}
        for row in gains
    ]


def _same_setting(config: RunConfig, plain: RunConfig, label: str, baseline: str, where: str) -> None:
    """Refuse a gain between runs that differ in more than their method."""
    own, other = result_settings(config), result_settings(plain)
    for setting in _SETTING:
        if own[setting] != other[setting]:
            raise OutputError(
                f"--runs {where}: {label!r} and {baseline!r}, which its gain is counted from, differ in {setting!r}; "
                "leave one of them out of the compare list"
            )


def _outcomes(runs: Sequence[RunFolder], targets: Sequence[float]) -> dict[int, dict[str, Any]]:
    return {run.summary()["seed"]: outcome(run.history(), targets) for run in runs}


def _gains(
    own: Mapping[int, dict[str, Any]], plain: Mapping[int, dict[str, Any]], targets: Sequence[float]
) -> dict[str, float | None]:
    pairs = [(own[seed], plain[seed]) for seed in own]
    gains = {
        name: [a[of] - b[of] for a, b in pairs]
        for name, of in (("gain", "final_accuracy"), ("late_gain", "late_accuracy"))
    }
    for key in map(target_key, targets):
        both = [(a["targets"][key], b["targets"][key]) for a, b in pairs if a["targets"][key] and b["targets"][key]]
        gains[f"rounds_saved_to_{key}"] = [b["rounds"] - a["rounds"] for a, b in both]
    found: dict[str, float | None] = {}
    for name, values in gains.items():
        found[f"{name}_mean"], found[f"{name}_std"] = mean_std(values)
        if name.startswith("rounds_saved_to_"):
            found[f"{name}_seeds"] = len(values)
    return found


def rank_correlations(rows: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> list[dict[str, Any]]:
    """Spearman's rank correlation of each measure of quality with each gain, over the labels of a group. Groups of
    fewer than three labels have none.

    Returns:
        Rows of ``group``, ``measure``, ``gain`` (its column), ``levels`` (labels that have both) and ``spearman``: None
        where there are fewer than three levels, or one side is the same for all.
    """
    gains = ["gain_mean", "late_gain_mean", *(f"rounds_saved_to_{target_key(target)}_mean" for target in targets)]
    found = []
    for group in sorted({row["group"] for row in rows if row["group"] is not None}):
        members = [row for row in rows if row["group"] == group]
        if len(members) < _LEAST:
            continue
        for name in QUALITY:
            for gain in gains if any(name in row for row in members) else []:
                pairs = [(row.get(name), row[gain]) for row in members]
                known = [pair for pair in pairs if None not in pair]
                found.append({"group": group, "measure": name, "gain": gain, "levels": len(known)})
                found[-1]["spearman"] = _spearman(known)
    return found


def _spearman(pairs: Sequence[tuple[float, float]]) -> float | None:
    if len(pairs) < _LEAST or any(len(set(values)) == 1 for values in zip(*pairs, strict=True)):
        return None
    return float(spearmanr(*zip(*pairs, strict=True)).statistic)
