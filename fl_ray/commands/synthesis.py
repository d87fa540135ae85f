"""``fl-ray pretrain``, ``generate`` and ``quality``: a recipe's generator by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_ray.commands.output import default_output, print_config, print_configs, print_table
from fl_ray.commands.reports import run_folders
from fl_ray.errors import SettingError

if TYPE_CHECKING:
    from fl_ray.config import RunConfig
    from fl_ray.progress import Progress
    from fl_ray.synthesis import Synthesis

__all__ = ["generate", "pretrain", "quality"]


def pretrain(options: Any, overrides: dict[str, Any]) -> int:
    """Train the recipe's generator, or find it trained."""
    config = _config(options.recipe, overrides)
    if options.print_config:
        print_config(config)
        return 0
    from fl_ray.progress import Progress

    with _opened(config, Progress()) as synthesis:
        made = synthesis.trained
        folder = made.prepare()
        trained = f"trained in {made.training_seconds():.0f} s" if made.train_seconds else "found, trained before"
        print(f"generator: {config.generator.name}, {trained}\nkey: {made.key}\nweights: {folder}")
        if made.unpublished is not None:
            raise made.unpublished
    return 0


def generate(options: Any, overrides: dict[str, Any]) -> int:
    """Write images of every class, and a manifest of where they come from."""
    config = _config(options.recipe, overrides)
    seed = config.seed if options.sampling_seed is None else options.sampling_seed
    for name, value in {"per_class": options.per_class, "sampling_seed": seed}.items():
        if value < 0:
            raise SettingError(f"--{name} is {value}, but it must be at least 0")
    if options.print_config:
        print_config(config)
        return 0
    from fl_ray.image_export import export_images
    from fl_ray.progress import Progress

    output = Path(options.output) if options.output else default_output(f"{config.name}-images")
    with _opened(config, Progress()) as synthesis:
        if not synthesis.generator.knows_classes:
            raise SettingError(
                f"generator {config.generator.name} knows no classes with these settings, so there are no images of "
                "each to write; take another one, or (diffusion) set guidance above 0"
            )
        count = export_images(synthesis, options.per_class, seed, output)
    print(f"images: {count} in {output}\nmanifest: {output / 'manifest.csv'}")
    return 0


def _config(path: str, overrides: dict[str, Any]) -> RunConfig:
    from fl_ray.recipes import apply_overrides, load_recipe, make_config

    config = make_config(apply_overrides(load_recipe(path), overrides))
    if config.generator is None:
        raise SettingError(f"recipe {path} has no generator; add a generator section")
    return config


@contextmanager
def _opened(config: RunConfig, progress: Progress) -> Iterator[Synthesis]:
    from fl_ray.data.parts import prepare
    from fl_ray.federated_generator import recipe_synthesis
    from fl_ray.runtime.start import open_runtime

    data = prepare(config.data, config.seed)
    with open_runtime(config, progress, ahead=False) as runtime:
        synthesis = recipe_synthesis(config, data, runtime, progress)
        try:
            yield synthesis
        finally:
            progress.stop()
            synthesis.close()


def quality(options: Any, overrides: dict[str, Any]) -> int:
    """Measure the images of a recipe's generators, or those that the clients of a finished run have guided."""
    if Path(options.recipe).is_dir():
        return _quality_of_run(options, overrides)
    from fl_ray.recipes import load_recipe
    from fl_ray.run_folder import filled_folder

    runs = (Path(options.runs), run_folders(Path(options.runs))) if options.runs else None
    recipe = load_recipe(options.recipe)
    from fl_ray.progress import Progress
    from fl_ray.quality import QualityOptions, plan_quality
    from fl_ray.quality import quality as measure

    per_class = QualityOptions.per_class if options.per_class is None else options.per_class
    asked = QualityOptions(per_class, options.inception, options.clip)
    configs = plan_quality(recipe, overrides)
    if options.print_config:
        print_configs(configs)
        return 0
    output = Path(options.output) if options.output else default_output(f"{recipe['name']}-quality")
    with filled_folder(output):
        for table in measure(configs, asked, output, Progress(), runs):
            print_table(*table)
    print(f"measures: {output / 'quality.json'}\nreport: {output / 'quality.html'}")
    return 0


def _quality_of_run(options: Any, overrides: dict[str, Any]) -> int:
    given = {"per_class": options.per_class, "runs": options.runs, **overrides}
    refused = next((name for name, value in given.items() if value is not None), None)
    if refused is not None:
        raise SettingError(f"{options.recipe} is a run's folder, and is measured as it was run; leave --{refused} out")
    from fl_ray.finished_run import FinishedRun
    from fl_ray.progress import Progress
    from fl_ray.quality import QualityOptions, quality_of_run
    from fl_ray.run_folder import filled_folder

    progress, run = Progress(), FinishedRun.open(Path(options.recipe))
    if options.print_config:
        print_config(run.config)
        return 0
    output = Path(options.output) if options.output else default_output(f"{run.config.name}-quality")
    asked = QualityOptions(inception=options.inception, clip=options.clip)
    try:
        with filled_folder(output):
            print_table(*quality_of_run(run, asked, output, progress))
    finally:
        progress.stop()
    print(f"measures: {output / 'quality.json'}\nreport: {output / 'quality.html'}")
    return 0
