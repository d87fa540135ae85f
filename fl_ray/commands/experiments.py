"""``fl-ray run``, ``compare`` and ``replay``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_ray.commands.output import default_output, print_config, print_configs, print_table
from fl_ray.commands.reports import check_baseline, report_comparison, run_folders
from fl_ray.errors import OutputError, SettingError

if TYPE_CHECKING:
    from fl_ray.config import RunConfig

__all__ = ["compare", "replay", "run"]


def run(options: Any, overrides: dict[str, Any]) -> int:
    """Run a recipe, or go on with an interrupted run."""
    from fl_ray.recipes import apply_overrides, load_recipe, make_config
    from fl_ray.run_folder import RunFolder
    from fl_ray.runtime.start import connect_ahead
    from fl_ray.storage import opened_output

    if (options.recipe is None) == (options.resume is None):
        raise SettingError("fl-ray run takes a recipe, or --resume DIR")
    if options.resume is not None:
        with opened_output(options.resume) as output:
            config = RunFolder(output).config()
            if overrides:
                raise SettingError(
                    f"--resume goes on with the settings in {options.resume}/config.yaml; leave --{min(overrides)} out"
                )
            _refuse_finished(output, options.resume)
            return _run(config, output, options.resume, resume=True)
    recipe = apply_overrides(load_recipe(options.recipe), overrides)
    if not options.print_config:
        connect_ahead(recipe)
    config = make_config(recipe)
    if options.print_config:
        print_config(config)
        return 0
    wanted = options.output or default_output(config.name)
    with opened_output(wanted) as output:
        return _run(config, output, str(wanted), resume=False)


def _refuse_finished(output: Path, shown: str) -> None:
    from fl_ray.run_folder import RunFolder

    if RunFolder(output).finished():
        raise OutputError(f"--resume {shown}: the run is finished")


def _run(config: RunConfig, output: Path, shown: str, resume: bool) -> int:
    """Run a checked recipe in its folder, which the user knows as ``shown``."""
    from fl_ray.progress import Progress
    from fl_ray.run_folder import at_work, new_folder
    from fl_ray.runtime.start import open_runtime

    progress = Progress()
    with open_runtime(config, progress) as runtime:
        from fl_ray.experiment import Experiment, check  # while Ray starts
        from fl_ray.summary import method_results

        check(config)
        with at_work(output):
            if resume:
                _refuse_finished(output, shown)  # by another process meanwhile, perhaps
            else:
                new_folder(output)
            summary = Experiment(config, output, runtime, progress, resume=resume).run()
    of = summary.get("accuracy_of")
    rows = [
        *([["accuracy is on", of]] if of else []),
        ["final accuracy", f"{summary['final_accuracy']:.4f}"],
        ["best accuracy", f"{summary['best_accuracy']:.4f}"],
        ["virtual time", f"{summary['virtual_time_s']:.1f} s"],
        ["energy of the devices", f"{summary['energy_j']:.1f} J"],
    ]
    for target, hit in summary["targets"].items():
        rows.append([f"rounds to {float(target):.0%}", "not reached" if hit is None else str(hit["rounds"])])
    rows += [[title, text] for title, text in method_results(summary)]
    print_table(["", "value"], rows, f"{config.method.name} on {config.data.name}, seed {config.seed}")
    print(f"report: {shown.rstrip('/')}/report.html")
    return 0


def compare(options: Any, overrides: dict[str, Any]) -> int:
    """Run several configurations with several seeds, and report them side by side."""
    from fl_ray.comparison import plan_comparison, run_comparison
    from fl_ray.recipes import load_recipe
    from fl_ray.storage import opened_output

    if options.jobs < 1:
        raise SettingError(f"--jobs is {options.jobs}, but it must be at least 1")
    if bool(options.recipes) == (options.mlflow is not None):
        raise SettingError("fl-ray compare takes recipes, or --mlflow EXPERIMENT to read runs from the tracking store")
    if options.mlflow is not None:
        if options.labels is not None:
            raise SettingError("--labels goes with recipes: it says what is run")
        from fl_ray.commands.store import compare_store

        return compare_store(options, overrides)
    if options.filter is not None:
        raise SettingError("--filter goes with --mlflow EXPERIMENT")
    comparison = plan_comparison([load_recipe(path) for path in options.recipes], overrides, options.seeds)
    if options.labels is not None:
        comparison = comparison.only(options.labels)
    check_baseline(options.baseline, comparison.configs)
    if options.print_config:
        print_configs({label: comparison.configs[label] for label in comparison.labels or comparison.configs})
        return 0
    from fl_ray.progress import Progress

    wanted = options.output or default_output(comparison.name)
    with opened_output(wanted) as output:
        try:
            run_comparison(comparison, output, Progress(), options.jobs)
        except KeyboardInterrupt:
            print(f"fl-ray: go on with the same command and --output {wanted}", file=sys.stderr)
            raise
        return report_comparison(output, run_folders(output), str(wanted), options.baseline)


def replay(options: Any, overrides: dict[str, Any]) -> int:
    """Train one client of a run's round again."""
    import traceback

    from fl_ray.progress import Progress
    from fl_ray.replay import replay as retrain

    if overrides:
        raise SettingError(
            f"replay takes the settings in {options.folder}/config.yaml; leave --{min(overrides)} out, or use fl-ray "
            f"run {options.folder}/config.yaml with it"
        )
    failed = False
    for found in retrain(Path(options.folder), options.round, options.client, Progress()):
        title = f"client {found.client} in round {found.round}"
        print_table(["", "value"], [[name, value] for name, value in found.facts().items()], title)
        if found.error is not None:
            traceback.print_exception(found.error)
        failed |= found.failed
    return 1 if failed else 0
