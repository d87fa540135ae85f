"""``fl-ray quality``: what a recipe's generators make, measured; a row for each generator, and for real images.

The rows of real images say what the measures give where nothing is synthetic: ``public`` are those that a generator
learns from (and the feature extractor), ``clients`` are images that neither has seen (but a generator that clients
train has).

Of a finished run in which clients have guided the images (``fl_ray.methods.fedlmg``), there is a row for each client
instead, against test images of its domains, and one for as many of its own images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fl_ray.artifacts import columns_of_classes, sample_grid
from fl_ray.comparison import plan_comparison
from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.downstream import gains_of_runs, rank_correlations, with_measures
from fl_ray.errors import SettingError
from fl_ray.experiment import check
from fl_ray.federated_generator import recipe_synthesis
from fl_ray.finished_run import FinishedRun
from fl_ray.image_scores import ImageScores
from fl_ray.progress import Progress
from fl_ray.recipes import apply_overrides, compare_entries, make_config
from fl_ray.run_folder import RunFolder, environment, write_json
from fl_ray.runtime.base import Runtime
from fl_ray.runtime.start import open_runtime
from fl_ray.synthesis import Synthesis
from fl_ray.tracking import Tracker
from fl_ray.tracking_store import tracking_uri
from generators.quality.manifold import NEIGHBOURS

if TYPE_CHECKING:  # matplotlib, imported when there is something to draw
    from fl_ray.report.comparison_report import Table

__all__ = ["Measured", "QualityOptions", "measure", "measure_guided", "plan_quality", "quality", "quality_of_run"]

_SAME = ("data", "model", "training")  # sections that all generators of a table must share


@dataclass(frozen=True)
class QualityOptions:
    """How to measure: images of each class (a finished run has as many as it has), and as for ``ImageScores``.

    Raises:
        SettingError: too few images.
    """

    per_class: int = 100
    inception: str | None = None
    clip: str | None = None

    def __post_init__(self) -> None:
        if self.per_class <= NEIGHBOURS:
            raise SettingError(
                f"--per_class is {self.per_class}, but precision and recall compare with {NEIGHBOURS} neighbours: give "
                f"at least {NEIGHBOURS + 1}"
            )


@dataclass
class Measured:
    """What was measured.

    Attributes:
        rows: one of each generator, then one of each real part: measures by name, and ``labels``, the recipe's labels
            that use the generator; or one of each ``client``, then one of its own images.
        configs: of each generator, in the order of the rows; none where clients have guided the images.
        samples: PNG of each generator, or client.
        extractor: where features come from.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    configs: list[RunConfig] = field(default_factory=list)
    samples: list[bytes] = field(default_factory=list)
    extractor: dict[str, Any] = field(default_factory=dict)


def plan_quality(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, RunConfig]:
    """The configurations whose images are measured: those of the compare list whose method uses its generator, else the
    recipe itself, by its name.

    Raises:
        SettingError: there is no generator, or a setting is wrong.
    """
    base = apply_overrides(recipe, overrides)
    config = make_config(base)
    configs = plan_comparison([recipe], overrides, [config.seed]).configs if compare_entries(base) else {}
    users = {label: own for label, own in configs.items() if check(own).uses_generator}
    if users:
        return users
    if config.generator is None:
        raise SettingError("the recipe has no generator, so there are no images to measure; add a generator section")
    check(config)
    return {config.name: config}


def measure(configs: Mapping[str, RunConfig], options: QualityOptions, progress: Progress) -> Measured:
    """Measure the images of every distinct generator, and real ones.

    Raises:
        SettingError: generators differ in what they are measured with as well, or there are too few images.
    """
    first = next(iter(configs.values()))
    torch.set_num_threads(first.runtime.threads)  # so that a sample's last bits are those of the runs
    data = prepare(first.data, first.seed)
    with open_runtime(first, progress, ahead=False) as runtime:
        generators = _distinct(configs, data, runtime, progress)
        scores = ImageScores(first, data, options.per_class, options.inception, options.clip)
        found = Measured(extractor=scores.extractor)
        for labels, synthesis, config in generators:
            progress.message(f"measuring the images of {', '.join(labels)}")
            try:
                images = synthesis.images(np.full(data.num_classes, options.per_class), config.seed)
                cost = {
                    "training_s": synthesis.trained.training_seconds(),
                    "sampling_s_per_image": synthesis.seconds_per_image(config.seed),
                }
            finally:
                progress.stop()
                synthesis.close()
            found.rows.append({"label": ", ".join(labels), "labels": labels, **scores.of(*images), **cost})
            found.configs.append(config)
            found.samples.append(sample_grid(data, *images))
    for part, images in scores.real_sets().items():
        progress.message(f"measuring real images ({part})")
        found.rows.append({"label": f"real ({part})", "labels": [], **scores.of(*images, part)})
    return found


def measure_guided(run: FinishedRun, options: QualityOptions, progress: Progress) -> Measured:
    """Measure the images that each client of a run has guided, and as many of its own. What can't be measured, as with
    too few images, is told and left out.

    Raises:
        SettingError: nothing was guided, or nothing can be measured.
    """
    data, config = run.data, run.config
    torch.set_num_threads(config.runtime.threads)
    guided = {client: made for client, made in run.guided_images(run.uploads(), progress).items() if len(made[0])}
    most = max(int(np.bincount(labels).max()) for _, labels in guided.values())
    scores = ImageScores(config, data, most, options.inception, options.clip, "method.images_per_class")
    found = Measured(extractor=scores.extractor)
    real: list[dict[str, Any]] = []
    refused = ""
    for client, made in guided.items():
        name = data.client_name(client)
        progress.message(f"measuring the images of {name}")
        try:
            own = scores.of_client(client)
            found.rows.append({"label": name, "client": client, **own.of(*made)})
        except SettingError as error:
            refused = f"{name} is left out: {error}"
            progress.message(refused)
            continue
        rows = data.partition.of(client)
        known = np.unique(data.labels[rows])
        sides = (data.images[rows], data.labels[rows]), made
        found.samples.append(columns_of_classes(data.source.classes, known, *sides, of="real (its own)"))
        its_own = own.real_sets().get("clients")
        if its_own is None:
            progress.message(f"{name} has too few images of its own of some class: there is no row to compare with")
        else:
            real.append({"label": f"real, of {name}", "client": client, **own.of(*its_own, "clients")})
    if not found.rows:
        raise SettingError(f"no client's images can be measured; {refused}")
    found.rows += real
    return found


def _distinct(
    configs: Mapping[str, RunConfig], data: FederatedData, runtime: Runtime, progress: Progress
) -> list[tuple[list[str], Synthesis, RunConfig]]:
    """The generators that make different images, each with all labels that use it."""
    found: dict[str, tuple[list[str], Synthesis, RunConfig]] = {}
    first_label, first = next(iter(configs.items()))
    for label, config in configs.items():
        own = data if config.data == first.data else prepare(config.data, config.seed)
        for section in _SAME:
            if getattr(config, section) != getattr(first, section):
                raise SettingError(
                    f"compare: {first_label!r} and {label!r} differ in {section!r} as well as in their images, so "
                    "these can't be measured alike; leave one of them out of the list, or give --compare '[]' for the "
                    "recipe's own generator alone"
                )
        synthesis = recipe_synthesis(config, own, runtime, progress)
        key = repr(synthesis.keys())
        if key in found:
            found[key][0].append(label)
        else:
            found[key] = [label], synthesis, config
    return list(found.values())


def quality(
    configs: Mapping[str, RunConfig],
    options: QualityOptions,
    output: Path,
    progress: Progress,
    runs: tuple[Path, Sequence[RunFolder]] | None = None,
) -> list[Table]:
    """Measure, and write quality.json, its tables and quality.html into ``output``; the tables.

    Args:
        configs: of ``plan_quality``.
        runs: a comparison's folder and its runs, to join the measures with what was gained.

    Raises:
        SettingError: as ``measure``.
        OutputError: the runs are not those of ``configs``.
    """
    from fl_ray.report.quality_report import downstream_report, quality_report

    gains, targets = gains_of_runs(configs, runs[1], str(runs[0])) if runs is not None else ([], [])
    measured = measure(configs, options, progress)
    first = measured.configs[0]
    content = _content(first, measured) | {"options": asdict(options)}
    more, tables = [], []
    if runs is not None:
        joined = with_measures(gains, measured.rows)
        content["downstream"] = {"rows": joined, "spearman": rank_correlations(joined, targets)}
        section, table = downstream_report(output, joined, targets)
        more, tables = [section], [table]
    write_json(output / "quality.json", content)
    lead = f"{first.name}: {first.data.name}, {options.per_class} images of each class, seed {first.seed}"
    tables.insert(0, quality_report(output, lead, measured.rows, measured.samples, more))
    _track(measured, [output / "quality.json", output / "quality.html"], progress)
    return tables


def quality_of_run(run: FinishedRun, options: QualityOptions, output: Path, progress: Progress) -> Table:
    """Measure what the clients of a run have guided, and write quality.json, its table and quality.html into
    ``output``; the table.

    Raises:
        SettingError: as ``measure_guided``.
    """
    from fl_ray.report.quality_report import quality_report

    measured, config = measure_guided(run, options, progress), run.config
    content = _content(config, measured) | {"run": str(run.folder.path)}
    write_json(output / "quality.json", content)
    lead = f"{config.name}: {config.method.name} on {config.data.name}, guided by each client, seed {config.seed}"
    table = quality_report(output, lead, measured.rows, measured.samples, by_client=True)
    synthetic = len(measured.samples)
    found = {
        f"quality/client {row['client']}{'' if place < synthetic else ' real'}/{name}": value
        for place, row in enumerate(measured.rows)
        for name, value in row.items()
        if isinstance(value, (int, float)) and name != "client"
    }
    run.log(found, [output / "quality.json", output / "quality.html"], progress)
    return table


def _content(config: RunConfig, measured: Measured) -> dict[str, Any]:
    return {
        "name": config.name,
        "seed": config.seed,
        "extractor": measured.extractor,
        "environment": environment(),
        "rows": measured.rows,
    }


def _track(measured: Measured, files: list[Path], progress: Progress) -> None:
    """Log each generator as an MLflow run: its settings, its measures, and ``files``."""
    for row, config in zip(measured.rows, measured.configs, strict=False):
        if not config.tracking.enabled:
            return
        tags = {"kind": "quality", "label": row["label"]}
        tracker = Tracker(config, tracking_uri(config), f"{row['label']}-quality-seed{config.seed}", tags)
        numbers = {name: value for name, value in row.items() if isinstance(value, (int, float))}
        tracker.finish("FINISHED", numbers, files)
        if tracker.error is not None:
            progress.message(f"MLflow did not take everything ({tracker.error}); the folder is complete")
