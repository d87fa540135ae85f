"""``fl-ray plan``, ``learning-curve`` and ``energy-check``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fl_ray.commands.output import default_output, print_config, print_configs, print_table
from fl_ray.errors import SettingError

__all__ = ["energy_check", "learning_curve", "plan"]

_SHOWN = 40  # devices in the printed table


def plan(options: Any, overrides: dict[str, Any]) -> int:
    """Plan a recipe's cell, or compare searches on it over several seeds."""
    from fl_ray.recipes import apply_overrides, load_recipe, make_config

    config = make_config(apply_overrides(load_recipe(options.recipe), overrides))
    if options.print_config:
        print_config(config)
        return 0
    if options.seeds and not config.allocation.compare:
        raise SettingError("--seeds goes with allocation.compare; for one plan of another seed give --seed")
    if config.allocation.compare:
        return _compare(options, config)
    from fl_ray.allocation.plan import make_plan
    from fl_ray.planning import recipe_cell
    from fl_ray.report.plan_report import DEVICE_COLUMNS, device_rows, total_rows, write_plan
    from fl_ray.run_folder import new_folder

    made = make_plan(recipe_cell(config), config.allocation, config.seed)
    output = new_folder(Path(options.output) if options.output else default_output(f"{config.name}-plan"))
    write_plan(made, config.name, output)
    print_table(list(DEVICE_COLUMNS), device_rows(made, _SHOWN), f"{config.name}, seed {config.seed}")
    if made.cell.devices > _SHOWN:
        print(f"shown: the first {_SHOWN} of {made.cell.devices} devices; all are in {output / 'devices.csv'}")
    print_table(["", "value"], total_rows(made), f"search {made.search}")
    print(f"plan: {output / 'plan.json'}\nreport: {output / 'plan.html'}")
    return 0


def _compare(options: Any, config: Any) -> int:
    from fl_ray.progress import Progress
    from fl_ray.report.search_report import write_searches
    from fl_ray.search_comparison import compare_searches

    seeds = options.seeds or [config.seed]
    output = Path(options.output) if options.output else default_output(f"{config.name}-searches")
    output.mkdir(parents=True, exist_ok=True)
    progress = Progress()
    try:
        found = compare_searches(config, seeds, output, progress)
    finally:
        progress.stop()
    for table in write_searches(found, config, output):
        print_table(*table)
    print(f"everything: {output / 'searches.json'}")
    return 0


def learning_curve(options: Any, overrides: dict[str, Any]) -> int:
    """Train at several amounts of data and fit the curve that the planner reads."""
    from fl_ray.curve_measurement import curve_comparison, fit_from_runs
    from fl_ray.recipes import load_recipe

    comparison = curve_comparison(load_recipe(options.recipe), overrides, options.amounts, options.seeds)
    if options.print_config:
        print_configs(comparison.configs)
        return 0
    from fl_ray.comparison import run_comparison
    from fl_ray.progress import Progress
    from fl_ray.report.curve_report import write_curve

    output = Path(options.output) if options.output else default_output(comparison.name)
    run_comparison(comparison, output, Progress(), options.jobs)
    fit = fit_from_runs(output)
    for table in write_curve(fit, comparison.name, output):
        print_table(*table)
    print(f"curve: {output / 'learning_curve.json'} (allocation.curve takes it)\nreport: {output / 'curve.html'}")
    return 0


def energy_check(options: Any, overrides: dict[str, Any]) -> int:
    """Measure the recipe's local training, and hold the cost model against it."""
    from fl_ray.recipes import apply_overrides, load_recipe, make_config

    config = make_config(apply_overrides(load_recipe(options.recipe), overrides))
    if options.print_config:
        print_config(config)
        return 0
    from fl_ray.energy_check import check_energy
    from fl_ray.progress import Progress
    from fl_ray.run_folder import new_folder, write_json

    progress = Progress()
    try:
        asked = options.threads, options.batch_sizes, options.samples, options.repeats
        found = check_energy(config, *asked, progress)
    finally:
        progress.stop()
    output = new_folder(Path(options.output) if options.output else default_output(f"{config.name}-energy-check"))
    write_json(output / "energy_check.json", found.to_dict())
    for title, unit, factor, fits in (("time", "ms", 1e3, found.time), ("energy", "mJ", 1e3, found.energy)):
        rows = [
            [
                f"{threads} threads, batch {batch}",
                f"{factor * fit.per_sample:.4g}",
                *([f"{fit.per_sample * found.clock_hz:.3g}"] if title == "time" and found.clock_hz else []),
                f"{fit.worst:.1%}",
                f"{fit.constant:.1%}",
            ]
            for (threads, batch), fit in fits.items()
        ]
        cycles = ["cycles per sample"] if title == "time" and found.clock_hz else []
        columns = ["", f"{unit} per sample", *cycles, "worst error of the model", "constant part"]
        if rows:
            print_table(columns, rows, f"{title}, {config.model.name} on {config.data.name}, {found.device}")
    if not found.energy:
        print(
            "energy: not measured, there is no sensor (NVML, RAPL) that can be read here, or extra [energy] is missing"
        )
    print(f"points: {output / 'energy_check.json'}")
    return 0
