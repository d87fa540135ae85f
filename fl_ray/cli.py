"""The command line: ``fl-ray run | compare | quality | replay | partition | report | list``.

Heavy packages are imported by the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_ray.errors import FlRayError, OutputError, SettingError
from fl_ray.version import __version__

if TYPE_CHECKING:
    from collections.abc import Mapping

    from fl_ray.config import RunConfig
    from fl_ray.run_folder import RunFolder

__all__ = ["main"]

INTERRUPTED = 130
MOST_SHOWN = 10_000  # clients that ``fl-ray partition`` counts
_SETTINGS = (
    "Every setting of the recipe can be overridden by its dotted name, as --rounds 20 or "
    "--data.partition.alpha 0.1; --print_config shows all of them and stops. --debug shows an error's traceback."
)
_OPTIONS = ("--output", "--resume", "--seeds", "--jobs", "--help", "--version")
_OWN = {  # options of one command alone: --round elsewhere means --rounds
    "replay": ("--round", "--client"),
    "quality": ("--per_class", "--runs", "--inception", "--clip"),
}
_FLAGS = ("--debug", "--print_config")  # taken anywhere; jsonargparse keeps the name of the second for itself


def _parser() -> Any:
    from jsonargparse import ArgumentParser

    def command(name: str, summary: str, epilog: str | None = None) -> Any:
        parser = ArgumentParser(description=summary, epilog=epilog)
        commands.add_subcommand(name, parser, help=summary)
        return parser

    parser = ArgumentParser(
        prog="fl-ray",
        description="Run and compare federated learning helped by generative models, on PyTorch Lightning and Ray.",
        version=__version__,
    )
    commands = parser.add_subcommands(dest="command")
    run = command("run", "run a recipe", _SETTINGS)
    run.add_argument("recipe", nargs="?", type=str, help="YAML file")
    run.add_argument("--output", type=str, default=None, metavar="DIR", help="default: runs/NAME-DATE")
    run.add_argument("--resume", type=str, default=None, metavar="DIR", help="go on with an interrupted run")
    compare = command("compare", "run a recipe's compare list, or several recipes, side by side", _SETTINGS)
    compare.add_argument("recipes", nargs="+", type=str, help="YAML files")
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    compare.add_argument("--output", type=str, default=None, metavar="DIR", help="goes on with what is there")
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each in its own process")
    quality = command("quality", "measure the images of a recipe's generators, beside real ones", _SETTINGS)
    quality.add_argument("recipe", type=str, help="YAML file; its compare list may hold several generators")
    quality.add_argument("--output", type=str, default=None, metavar="DIR", help="default: runs/NAME-quality-DATE")
    quality.add_argument("--per_class", type=int, default=100, metavar="N", help="images of each class; default: 100")
    quality.add_argument("--runs", type=str, default=None, metavar="DIR", help="of fl-ray compare: did it matter?")
    quality.add_argument("--inception", type=str, default=None, metavar="FILE", help="weights of torchvision's v3")
    quality.add_argument("--clip", type=str, default=None, metavar="DIR", help="a CLIP model, for the CLIP score")
    replay = command("replay", "train one client of a run's round again, and show what happened")
    replay.add_argument("folder", type=str, metavar="DIR", help="a run; nothing is written into it")
    replay.add_argument("--round", type=int, required=True, metavar="R", help="counted from 1, as in history.csv")
    replay.add_argument("--client", type=int, required=True, metavar="C", help="counted from 0, as in messages")
    partition = command("partition", "show who owns what, as a table and a figure", _SETTINGS)
    partition.add_argument("recipe", type=str, help="YAML file")
    partition.add_argument("--output", type=str, default=None, metavar="DIR", help="where the figure goes")
    report = command("report", "make reports again from what runs left")
    report.add_argument("folders", nargs="+", type=str, metavar="DIR", help="a run, a comparison, or several runs")
    report.add_argument("--output", type=str, default=None, metavar="DIR", help="for several runs: where it goes")
    command("list", "list methods, data sets, partitioners, models and generators")
    return parser


def _split_overrides(arguments: list[str]) -> tuple[list[str], dict[str, Any]]:
    """Take ``--a.b value`` and ``--a.b=value`` out of the arguments where a is a top-level setting."""
    import yaml

    from fl_ray.recipes import TOP_LEVEL

    options = _OPTIONS + _OWN.get(arguments[0] if arguments else "", ())
    kept: list[str] = []
    overrides: dict[str, Any] = {}
    words = iter(arguments)
    for word in words:
        key, equals, value = word[2:].partition("=") if word.startswith("--") else ("", "", "")
        if key.split(".")[0] not in TOP_LEVEL:
            if "." in key:
                from fl_ray.registry import nearest

                raise SettingError(f"--{key}: unknown setting.{nearest(key.split('.')[0], TOP_LEVEL)}")
            option = word.split("=")[0]
            if option.startswith("--") and option not in options:
                from fl_ray.registry import nearest

                known = [*TOP_LEVEL, *(name[2:] for name in options)]
                raise SettingError(f"{option}: unknown option or setting.{nearest(key, known)}")
            kept.append(word)
            continue
        if not equals:
            following = next(words, None)
            if following is None:
                raise SettingError(f"--{key} needs a value")
            value = following
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingError(f"--{key} {value}: the value is not YAML") from error
    return kept, overrides


def main(arguments: list[str] | None = None) -> int:
    """Run a command; the exit code: 0 done, 2 bad input, 1 a failure, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    print_config = "--print_config" in arguments
    sys.path.insert(0, str(Path.cwd()))  # where a user's own package.module:Class lies
    signal.signal(signal.SIGTERM, _as_interrupt)
    try:
        kept, overrides = _split_overrides([word for word in arguments if word not in _FLAGS])
        parsed = _parser().parse_args(kept)
        options = parsed[parsed.command]
        options.print_config = print_config
        return _COMMANDS[parsed.command](options, overrides)
    except FlRayError as error:
        if debug:
            raise
        print(f"fl-ray: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if debug:
            raise
        print(f"fl-ray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("fl-ray: interrupted", file=sys.stderr)
        return INTERRUPTED


def _as_interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _default_output(name: str) -> Path:
    return Path("runs") / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"


def _print_table(columns: list[str], rows: list[list[str]], title: str | None = None) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title)
    for number, column in enumerate(columns):
        table.add_column(Text(column), justify="left" if number == 0 else "right")  # no markup: [s] is a unit
    for row in rows:
        table.add_row(*map(Text, row))
    console = Console()
    if not console.is_terminal:  # a file or a pipe has no width to keep to
        console = Console(width=max(console.width, 40 + sum(max(len(column), 14) for column in columns)))
    console.print(table)


def _print_config(config: RunConfig) -> None:
    import yaml

    from fl_ray.recipes import to_dict

    print(yaml.safe_dump(to_dict(config), sort_keys=False), end="")


def _print_configs(configs: Mapping[str, RunConfig]) -> None:
    for label, config in configs.items():
        print(f"# {label}")
        _print_config(config)


def _run(options: Any, overrides: dict[str, Any]) -> int:
    from fl_ray.recipes import apply_overrides, load_recipe, make_config
    from fl_ray.run_folder import RunFolder, new_folder
    from fl_ray.runtime.start import connect_ahead, open_runtime

    if (options.recipe is None) == (options.resume is None):
        raise SettingError("fl-ray run takes a recipe, or --resume DIR")
    if options.resume is not None:
        output = Path(options.resume)
        config = RunFolder(output).config()
        if overrides:
            raise SettingError(
                f"--resume goes on with the settings in {output}/config.yaml; leave --{min(overrides)} out"
            )
        if RunFolder(output).finished():
            raise OutputError(f"--resume {output}: the run is finished")
    else:
        recipe = apply_overrides(load_recipe(options.recipe), overrides)
        if not options.print_config:
            connect_ahead(recipe)
        config = make_config(recipe)
        if options.print_config:
            _print_config(config)
            return 0
        output = Path(options.output) if options.output else _default_output(config.name)
    from fl_ray.progress import Progress

    progress = Progress()
    with open_runtime(config, progress) as runtime:
        from fl_ray.experiment import Experiment, check  # while Ray starts

        check(config)
        if options.resume is None:
            new_folder(output)
        summary = Experiment(config, output, runtime, progress, resume=options.resume is not None).run()
    rows = [
        ["final accuracy", f"{summary['final_accuracy']:.4f}"],
        ["best accuracy", f"{summary['best_accuracy']:.4f}"],
        ["virtual time", f"{summary['virtual_time_s']:.1f} s"],
        ["energy of the devices", f"{summary['energy_j']:.1f} J"],
    ]
    for target, hit in summary["targets"].items():
        rows.append([f"rounds to {float(target):.0%}", "not reached" if hit is None else str(hit["rounds"])])
    _print_table(["", "value"], rows, f"{config.method.name} on {config.data.name}, seed {config.seed}")
    print(f"report: {output / 'report.html'}")
    return 0


def _compare(options: Any, overrides: dict[str, Any]) -> int:
    from fl_ray.comparison import plan_comparison, run_comparison
    from fl_ray.recipes import load_recipe

    if options.jobs < 1:
        raise SettingError(f"--jobs is {options.jobs}, but it must be at least 1")
    comparison = plan_comparison([load_recipe(path) for path in options.recipes], overrides, options.seeds)
    if options.print_config:
        _print_configs(comparison.configs)
        return 0
    from fl_ray.progress import Progress

    output = Path(options.output) if options.output else _default_output(comparison.name)
    try:
        run_comparison(comparison, output, Progress(), options.jobs)
    except KeyboardInterrupt:
        print(f"fl-ray: go on with the same command and --output {output}", file=sys.stderr)
        raise
    return _report_comparison(output, _run_folders(output))


def _run_folders(path: Path) -> list[RunFolder]:
    """The runs in or below a folder; a comparison's in the order in which it names its labels."""
    from fl_ray.run_folder import RunFolder

    if (path / "config.yaml").exists():
        return [RunFolder(path)]
    found = [RunFolder(file.parent) for file in sorted(path.glob("runs/*/*/config.yaml"))]
    if not found:
        raise OutputError(f"{path}: neither a run's folder nor a comparison's")
    if (path / "comparison.yaml").exists():
        import yaml

        order = list(yaml.safe_load((path / "comparison.yaml").read_text(encoding="utf-8"))["runs"])
        labels = {folder.path: (folder.summary() or {}).get("label") for folder in found}
        found.sort(key=lambda folder: order.index(labels[folder.path]) if labels[folder.path] in order else len(order))
    return found


def _report_comparison(output: Path, folders: list[RunFolder]) -> int:
    from fl_ray.report.comparison_report import comparison_report

    columns, rows = comparison_report(output, folders)
    _print_table(columns, rows)
    print(f"table: {output / 'comparison.csv'}\nfigures: {output / 'figures'}\nreport: {output / 'report.html'}")
    return 0


def _report(options: Any, overrides: dict[str, Any]) -> int:
    from fl_ray.report.run_report import run_report
    from fl_ray.run_folder import new_folder

    paths = [Path(folder) for folder in options.folders]
    folders = [folder for path in paths for folder in _run_folders(path)]
    for folder in folders:
        run_report(folder)
    if len(folders) == 1 and folders[0].path == paths[0]:
        print(f"report: {folders[0] / 'report.html'}")
        return 0
    if len(paths) == 1:
        return _report_comparison(paths[0], folders)
    output = new_folder(Path(options.output)) if options.output else new_folder(_default_output("report"))
    return _report_comparison(output, folders)


def _quality(options: Any, overrides: dict[str, Any]) -> int:
    from fl_ray.recipes import load_recipe
    from fl_ray.run_folder import new_folder

    runs = (Path(options.runs), _run_folders(Path(options.runs))) if options.runs else None
    recipe = load_recipe(options.recipe)
    from fl_ray.progress import Progress
    from fl_ray.quality import QualityOptions, plan_quality, quality

    asked = QualityOptions(options.per_class, options.inception, options.clip)
    configs = plan_quality(recipe, overrides)
    if options.print_config:
        _print_configs(configs)
        return 0
    output = new_folder(Path(options.output) if options.output else _default_output(f"{recipe['name']}-quality"))
    for table in quality(configs, asked, output, Progress(), runs):
        _print_table(*table)
    print(f"measures: {output / 'quality.json'}\nreport: {output / 'quality.html'}")
    return 0


def _replay(options: Any, overrides: dict[str, Any]) -> int:
    import traceback

    from fl_ray.progress import Progress
    from fl_ray.replay import replay

    if overrides:
        raise SettingError(
            f"replay takes the settings in {options.folder}/config.yaml; leave --{min(overrides)} out, or use fl-ray "
            f"run {options.folder}/config.yaml with it"
        )
    failed = False
    for found in replay(Path(options.folder), options.round, options.client, Progress()):
        title = f"client {found.client} in round {found.round}"
        _print_table(["", "value"], [[name, value] for name, value in found.facts().items()], title)
        if found.error is not None:
            traceback.print_exception(found.error)
        failed |= found.failed
    return 1 if failed else 0


def _partition(options: Any, overrides: dict[str, Any]) -> int:
    import numpy as np

    from fl_ray.data.parts import prepare
    from fl_ray.data.statistics import emd, label_entropy
    from fl_ray.recipes import apply_overrides, load_recipe, make_config
    from fl_ray.report.figures import partition_figure, save_svg

    config = make_config(apply_overrides(load_recipe(options.recipe), overrides))
    data = prepare(config.data, config.seed)
    table = data.counts(np.arange(min(len(data.partition), MOST_SHOWN)))
    entropy, distance = label_entropy(table), emd(table)
    rows = [
        [str(client), str(counts.sum()), f"{entropy[client]:.2f}", f"{distance[client]:.2f}", *map(str, counts[:20])]
        for client, counts in enumerate(table[:100])
    ]
    total = table.sum(axis=0)
    rows.append(["all", str(total.sum()), f"{entropy.mean():.2f}", f"{distance.mean():.2f}", *map(str, total[:20])])
    columns = ["client", "samples", "entropy [bit]", "EMD", *data.source.classes[:20]]
    _print_table(columns, rows, f"{config.data.name}, {config.data.partition.name}, seed {config.seed}")
    if len(table) > 100 or data.num_classes > 20:
        print("shown: the first 100 clients and 20 classes; the row 'all' has sums, and means of entropy and EMD")
    output = Path(options.output) if options.output else _default_output(f"{config.name}-partition")
    output.mkdir(parents=True, exist_ok=True)
    save_svg(output, "partition", partition_figure(table, data.source.classes))
    print(f"figure: {output / 'figures' / 'partition.svg'}")
    return 0


def _list(options: Any, overrides: dict[str, Any]) -> int:
    from fl_ray.registry import REGISTRY

    rows = [[kind, name, entry.summary] for kind, entries in REGISTRY.items() for name, entry in entries.items()]
    from rich.console import Console
    from rich.table import Table

    table = Table("kind", "name", "what it is", box=None)
    for row in rows:
        table.add_row(*row)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)
    return 0


_COMMANDS = {
    "run": _run,
    "compare": _compare,
    "quality": _quality,
    "replay": _replay,
    "partition": _partition,
    "report": _report,
    "list": _list,
}
