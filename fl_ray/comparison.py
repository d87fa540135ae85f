"""Several runs side by side: labelled overrides of one recipe, or several recipes, each over the same seeds."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fl_ray.config import RunConfig
from fl_ray.errors import FlRayError, InfeasibleError, OutputError, SettingError, TooFewClientsError
from fl_ray.experiment import Experiment, check
from fl_ray.input_files import check_inputs, input_files
from fl_ray.parallel_runs import PlannedRun, run_at_once
from fl_ray.progress import Progress
from fl_ray.recipes import apply_overrides, compare_entries, flattened, make_config, to_dict
from fl_ray.registry import nearest
from fl_ray.run_folder import RunFolder, at_work, new_folder
from fl_ray.runtime.start import OpenRuntimes
from fl_ray.summary import aggregate, outcome

__all__ = [
    "Comparison",
    "differing",
    "goes_on",
    "plan_comparison",
    "result_settings",
    "row_of",
    "rows_of_runs",
    "run_comparison",
    "same_settings",
    "write_comparison_csv",
]


@dataclass(frozen=True)
class Comparison:
    """What is compared: a configuration by label, and what of it is run: ``labels`` (None: all), with every seed."""

    name: str
    configs: dict[str, RunConfig]
    seeds: tuple[int, ...]
    labels: tuple[str, ...] | None = None

    def runs(self) -> list[tuple[str, RunConfig]]:
        """(label, configuration) of every run: all labels of the first seed come first, so that a cut is fair."""
        return [
            (label, replace(config, seed=seed, name=self.name))
            for seed in self.seeds
            for label, config in self.configs.items()
            if self.labels is None or label in self.labels
        ]

    def only(self, labels: Sequence[str]) -> Comparison:
        """The same comparison, of which these labels alone are run.

        Raises:
            SettingError: a label is not in it.
        """
        for label in labels:
            if label not in self.configs:
                raise SettingError(f"--labels {label}: no run has this label.{nearest(label, self.configs)}")
        return replace(self, labels=tuple(labels))


def plan_comparison(
    recipes: Sequence[Mapping[str, Any]], overrides: Mapping[str, Any], seeds: Sequence[int]
) -> Comparison:
    """Resolve a comparison, so that bad input is found before anything runs.

    Raises:
        SettingError: nothing to compare, labels or seeds are double, or recipes differ in their data or rounds.
    """
    if len(set(seeds)) != len(seeds) or not seeds:
        raise SettingError(f"--seeds {' '.join(map(str, seeds))}: give each seed once")
    if len(recipes) == 1:
        base = apply_overrides(recipes[0], overrides)
        entries = compare_entries(base)
        if not entries:
            raise SettingError("the recipe has no compare list; add one, or name several recipes")
        configs = {}
        for label, changes in entries:
            try:
                configs[label] = make_config(apply_overrides(base, changes))
            except SettingError as error:
                raise SettingError(f"compare, label {label!r}: {error}") from error
        return _distinct(Comparison(str(base["name"]), configs, tuple(seeds)))
    configs = {}
    for recipe in recipes:
        config = make_config(apply_overrides(recipe, overrides))
        if config.name in configs:
            raise SettingError(f"two recipes are named {config.name!r}; give them different names")
        configs[config.name] = config
    first, *others = configs.values()
    for other in others:
        for setting in ("data", "rounds", "clients_per_round", "targets"):
            if getattr(other, setting) != getattr(first, setting):
                raise SettingError(
                    f"recipes {first.name} and {other.name} differ in {setting!r}, so their results can't be compared; "
                    f"make them equal, or override it for all with --{setting}..."
                )
    return _distinct(Comparison("-".join(configs), configs, tuple(seeds)))


def _folder_name(label: str) -> str:
    return re.sub(r"[^\w.+-]+", "_", label)


def _distinct(comparison: Comparison) -> Comparison:
    """Refuse labels that would share a folder, or have none."""
    owners: dict[str, str] = {}
    for label in comparison.configs:
        name = _folder_name(label)
        if not name.strip("._"):
            raise SettingError(f"compare: the label {label!r} names no folder; use letters or digits")
        if name in owners:
            raise SettingError(
                f"compare: the labels {owners[name]!r} and {label!r} share the folder {name!r}; rename one"
            )
        owners[name] = label
    return comparison


def run_folder_of(output: Path, label: str, seed: int) -> Path:
    """Where a comparison keeps one run."""
    return output / "runs" / _folder_name(label) / f"seed{seed}"


def run_comparison(comparison: Comparison, output: Path, progress: Progress, jobs: int = 1) -> None:
    """Run what is not finished yet in ``output``.

    Args:
        jobs: 1: one run after another on the same actors; more: so many at a time, in processes of their own.

    Raises:
        OutputError: ``output`` holds something else, or runs of other settings, or another process is at work in it,
            with whatever seeds: ``jobs`` is for several runs at a time.
        FlRayError: some failed; the others were finished first.
    """
    with at_work(output):
        _run_open(comparison, output, progress, jobs)


def _run_open(comparison: Comparison, output: Path, progress: Progress, jobs: int) -> None:
    """``run_comparison`` where no other process is at it."""
    _claim(comparison, output)
    runs = comparison.runs()
    open_runs = [(label, config) for label, config in runs if not _is_done(output, label, config)]
    if len(open_runs) < len(runs):
        progress.message(f"{len(runs) - len(open_runs)} of {len(runs)} runs were finished before in {output}")
    inputs: dict[str, dict[str, str]] = {}
    for label, config in runs:
        check(config)  # also makes the tracking store, once, before any run logs into it
        if label not in inputs:  # the same for each seed
            inputs[label] = input_files(config)
        folder = run_folder_of(output, label, config.seed)
        check_inputs(RunFolder(folder).begun().get("inputs", {}), inputs[label], f"--output {folder}")
    planned = []
    for number, (label, config) in enumerate(open_runs, len(runs) - len(open_runs) + 1):
        name = f"{number}/{len(runs)} {label}, seed {config.seed}"
        planned.append((name, label, config, run_folder_of(output, label, config.seed)))
    if jobs > 1:
        for _, label, config, folder in planned:
            if not goes_on(folder, config):
                RunFolder(folder).begin(config, label, _tags(comparison, label), inputs[label])
        run_at_once([PlannedRun(name, config, folder) for name, _, config, folder in planned], jobs, progress)
        return
    runtimes = OpenRuntimes(progress)
    failed: dict[str, FlRayError] = {}
    try:
        for name, label, config, folder in planned:
            progress.label = name
            tags = _tags(comparison, label)
            runtime = runtimes.of(config)
            try:
                with at_work(folder):  # ``fl-ray run --resume`` of it may be, or have been, too
                    if RunFolder(folder).finished():
                        continue
                    resume = goes_on(folder, config)
                    Experiment(config, folder, runtime, progress, label, tags, resume).run()
            except (SettingError, InfeasibleError, TooFewClientsError) as error:  # its own; the others may do better
                failed[name] = error
                progress.message(f"failed: {error}")
    finally:
        progress.label = ""
        runtimes.close()
    if failed:
        first = next(iter(failed.values()))
        if len(runs) == len(failed):
            raise first
        raise FlRayError(
            f"{len(failed)} of {len(planned)} runs failed: {', '.join(failed)}; the first: {first}. The others are "
            "finished; give the same --output once it is mended"
        ) from first


def _tags(comparison: Comparison, label: str) -> dict[str, str]:
    return {"comparison": comparison.name, "label": label}


def goes_on(folder: Path, config: RunConfig) -> bool:
    """Whether the folder holds the run's beginning; otherwise it is made, empty."""
    if (folder / "config.yaml").exists() and same_settings(RunFolder(folder).config(), config):
        return True
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that was cut before it had settings
    new_folder(folder)
    return False


_RUNTIME_OF_RESULTS = ("threads", "gpus_per_actor", "training_path", "min_clients")


def result_settings(config: RunConfig) -> dict[str, Any]:
    """The settings that decide a run's results, but for its seed."""
    content = to_dict(config)
    for key in ("ray", "tracking", "checkpoint", "compare", "seed", "model_store"):
        content.pop(key)
    # These change a result, if only its last bits; where actors are placed does not.
    content["runtime"] = {key: content["runtime"][key] for key in _RUNTIME_OF_RESULTS}
    content["data"].pop("root")
    content["data"].pop("download")
    if content["generator"] is not None:
        content["generator"] = {k: v for k, v in content["generator"].items() if k not in ("cache", "pool")}
    return content


def _settings(comparison: Comparison) -> dict[str, Any]:
    """What makes results: everything but how and where runs are carried out."""
    plain = {label: result_settings(config) for label, config in comparison.configs.items()}
    return yaml.safe_load(yaml.safe_dump({"name": comparison.name, "runs": plain}, sort_keys=False))


def _claim(comparison: Comparison, output: Path) -> None:
    marker = output / "comparison.yaml"
    settings = _settings(comparison)
    if marker.exists():
        stored = _with_defaults(yaml.safe_load(marker.read_text(encoding="utf-8")))
        kept = {label: settings["runs"].get(label) for label in stored["runs"]}
        if {**settings, "runs": kept} != stored:
            raise OutputError(
                f"--output {output}: it holds a comparison with other settings, and nothing is overwritten; name "
                "another folder (entries may be added to a comparison, but none changed or left out)"
            )
        if stored == settings:
            return
    else:
        new_folder(output)
    draft = output / ".comparison.draft"
    draft.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    draft.replace(marker)


def _with_defaults(stored: dict[str, Any]) -> dict[str, Any]:
    """A comparison's stored settings with those that have come since then, at their defaults; as they are where
    they can't be read any more.
    """
    try:
        filled = {label: result_settings(make_config(settings)) for label, settings in stored["runs"].items()}
    except SettingError:
        return stored
    return yaml.safe_load(yaml.safe_dump({**stored, "runs": filled}))


def same_settings(stored: RunConfig, config: RunConfig) -> bool:
    """Whether a folder's resolved settings are those of a run."""
    return stored.seed == config.seed and not differing(stored, config)


def differing(stored: RunConfig, config: RunConfig) -> list[str]:
    """The names of the settings that decide results, but for the seed, in which a folder's resolved ones differ from
    those of a run; ``auto`` was resolved when it began.
    """
    if config.runtime.training_path == "auto":
        stored = replace(stored, runtime=replace(stored.runtime, training_path="auto"))
    a, b = (dict(flattened(result_settings(each))) for each in (stored, config))
    missing = object()
    return [key for key in dict.fromkeys([*a, *b]) if a.get(key, missing) != b.get(key, missing)]


def _is_done(output: Path, label: str, config: RunConfig) -> bool:
    return RunFolder(run_folder_of(output, label, config.seed)).finished()


def _is_same_run(folder: RunFolder, known: RunFolder) -> bool:
    own, other = folder.summary(), known.summary()
    if own["seed"] != other["seed"]:
        return False
    if not same_settings(folder.config(), known.config()):
        raise OutputError(
            f"{folder.path} and {known.path} are both {own['label']!r} with seed {own['seed']}, but their settings "
            "differ; report on them one by one"
        )
    return True


def rows_of_runs(
    folders: Sequence[RunFolder],
) -> tuple[list[dict[str, Any]], dict[str, list[RunFolder]], list[float]]:
    """A row of the comparison per label, in order of first appearance; finished folders by label; all targets. The same
    run in two folders counts once: it would pass for two seeds.

    Raises:
        OutputError: two runs of one label and seed have different settings.
    """
    by_label: dict[str, list[RunFolder]] = {}
    for folder in folders:
        if folder.finished():
            members = by_label.setdefault(folder.summary()["label"], [])
            if not any(_is_same_run(folder, known) for known in members):
                members.append(folder)
    targets = sorted(
        {target for members in by_label.values() for folder in members for target in folder.config().targets}
    )
    for members in by_label.values():
        members.sort(key=lambda folder: folder.summary()["seed"])
    return [row_of(label, members, targets) for label, members in by_label.items()], by_label, targets


def row_of(label: str, members: Sequence[RunFolder], targets: Sequence[float]) -> dict[str, Any]:
    """The row of a comparison that finished runs of a label come to."""
    # Runs of several comparisons may have had other targets: reached or not is read off the histories again.
    summaries = [{**folder.summary(), **outcome(folder.history(), targets)} for folder in members]
    return aggregate(label, summaries, targets)


def write_comparison_csv(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """comparison.csv: a row per label, a column per number and its spread."""
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, columns)
        writer.writeheader()
        writer.writerows(rows)
