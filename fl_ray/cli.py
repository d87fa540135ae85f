"""The command line: ``fl-ray run | compare | tune | quality | plan | learning-curve | pretrain | generate | ...``.

Heavy packages are imported by the commands (``fl_ray.commands``), so that ``--help`` answers at once.
"""

from __future__ import annotations

import importlib
import signal
import sys
from pathlib import Path
from typing import Any

from fl_ray.errors import FlRayError, SettingError
from fl_ray.version import __version__

__all__ = ["COMMANDS", "main"]

INTERRUPTED = 130
COMMANDS = {  # in fl_ray.commands
    "run": "experiments:run",
    "compare": "experiments:compare",
    "quality": "synthesis:quality",
    "tune": "tuning:tune",
    "replay": "experiments:replay",
    "audit": "privacy:audit",
    "plan": "planning:plan",
    "learning-curve": "planning:learning_curve",
    "energy-check": "planning:energy_check",
    "pretrain": "synthesis:pretrain",
    "generate": "synthesis:generate",
    "partition": "catalogue:partition",
    "report": "reports:report",
    "ui": "store:ui",
    "submit": "cluster:submit",
    "jobs": "cluster:jobs",
    "logs": "cluster:logs",
    "stop": "cluster:stop",
    "list": "catalogue:list_components",
}
_SETTINGS = (
    "Every setting of the recipe can be overridden by its dotted name, as --rounds 20 or "
    "--data.partition.alpha 0.1; --print_config shows all of them and stops. --debug shows an error's traceback."
)
_OPTIONS = ("--output", "--resume", "--seeds", "--jobs", "--help", "--version")
_OWN = {  # options of one command alone: --round elsewhere means --rounds
    "compare": ("--labels", "--mlflow", "--filter", "--baseline"),
    "tune": ("--trials",),
    "ui": ("--port",),
    "submit": ("--address", "--wait", "--requirements", "--env"),
    "jobs": ("--address",),
    "logs": ("--address", "--follow"),
    "stop": ("--address",),
    "replay": ("--round", "--client"),
    "audit": ("--shadows", "--inversion_steps", "--images_per_class"),
    "quality": ("--per_class", "--runs", "--inception", "--clip"),
    "learning-curve": ("--amounts",),
    "energy-check": ("--threads", "--batch_sizes", "--samples", "--repeats"),
    "generate": ("--per_class", "--sampling_seed"),
    "report": ("--baseline",),
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
    compare.add_argument("recipes", nargs="*", type=str, help="YAML files")
    compare.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    compare.add_argument("--labels", nargs="+", type=str, default=None, metavar="L", help="run these; default: all")
    compare.add_argument("--output", type=str, default=None, metavar="DIR", help="goes on with what is there")
    compare.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each in its own process")
    compare.add_argument("--mlflow", type=str, default=None, metavar="EXPERIMENT", help="read runs instead of running")
    compare.add_argument("--filter", type=str, default=None, metavar="F", help="MLflow's, as \"tags.method = 'genfl'\"")
    compare.add_argument(
        "--baseline",
        type=str,
        default=None,
        metavar="LABEL",
        help="what the others are held against; default: the first label",
    )
    tune = command("tune", "search a recipe's settings: a study of many trials", _SETTINGS)
    tune.add_argument("study", nargs="?", type=str, help="YAML file")
    tune.add_argument("--trials", type=int, default=None, metavar="N", help="in place of the study's")
    tune.add_argument("--output", type=str, default=None, metavar="DIR", help="default: runs/NAME-DATE")
    tune.add_argument("--resume", type=str, default=None, metavar="DIR", help="go on with a study that was cut")
    quality = command("quality", "measure the images of a recipe's generators, beside real ones", _SETTINGS)
    quality.add_argument("recipe", type=str, help="YAML file (its compare list may hold several generators), or a run")
    quality.add_argument("--output", type=str, default=None, metavar="DIR", help="default: runs/NAME-quality-DATE")
    quality.add_argument("--per_class", type=int, default=None, metavar="N", help="images of each class; default: 100")
    quality.add_argument("--runs", type=str, default=None, metavar="DIR", help="of fl-ray compare: did it matter?")
    quality.add_argument("--inception", type=str, default=None, metavar="FILE", help="weights of torchvision's v3")
    quality.add_argument("--clip", type=str, default=None, metavar="DIR", help="a CLIP model, for the CLIP score")
    replay = command("replay", "train one client of a run's round again, and show what happened")
    replay.add_argument("folder", type=str, metavar="DIR", help="a run; nothing is written into it")
    replay.add_argument("--round", type=int, required=True, metavar="R", help="counted from 1, as in history.csv")
    replay.add_argument("--client", type=int, required=True, metavar="C", help="counted from 0, as in messages")
    audit = command("audit", "what a finished run gives away of its clients' images: membership, inversion")
    audit.add_argument("folder", type=str, metavar="DIR", help="a run")
    audit.add_argument("--shadows", type=int, default=4, metavar="N", help="shadow models for each; default: 4")
    audit.add_argument("--inversion_steps", type=int, default=200, metavar="N", help="0: no inversion; default: 200")
    audit.add_argument("--images_per_class", type=int, default=5, metavar="N", help="that inversion makes; default: 5")
    audit.add_argument("--output", type=str, default=None, metavar="DIR", help="default: runs/NAME-audit-DATE")
    pretrain = command("pretrain", "train a recipe's generator, or find it trained", _SETTINGS)
    pretrain.add_argument("recipe", type=str, help="YAML file")
    generate = command("generate", "write a generator's images, with a manifest", _SETTINGS)
    generate.add_argument("recipe", type=str, help="YAML file")
    generate.add_argument("--per_class", type=int, required=True, metavar="N", help="images of each class")
    generate.add_argument("--sampling_seed", type=int, default=None, metavar="S", help="default: the recipe's seed")
    generate.add_argument("--output", type=str, default=None, metavar="DIR", help="goes on with what is there")
    plan = command("plan", "plan synthetic data, frequency, bandwidth and power for least energy (FIMI)", _SETTINGS)
    plan.add_argument("recipe", type=str, help="YAML file; allocation.compare lists searches to try beside each other")
    plan.add_argument("--seeds", nargs="+", type=int, default=[], help="cells to compare searches on")
    plan.add_argument("--output", type=str, default=None, metavar="DIR", help="default: runs/NAME-plan-DATE")
    curve = command(
        "learning-curve", "train at several amounts of data and fit the planner's learning curve", _SETTINGS
    )
    curve.add_argument("recipe", type=str, help="YAML file")
    curve.add_argument("--amounts", nargs="+", type=int, default=[], help="samples per client; default: six up to all")
    curve.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    curve.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at a time, each in its own process")
    curve.add_argument("--output", type=str, default=None, metavar="DIR", help="goes on with what is there")
    energy = command("energy-check", "hold the cost model against measured time, and energy by a sensor", _SETTINGS)
    energy.add_argument("recipe", type=str, help="YAML file")
    energy.add_argument("--threads", nargs="+", type=int, default=[1, 2], help="default: 1 2")
    energy.add_argument("--batch_sizes", nargs="+", type=int, default=[8, 32, 128], help="default: 8 32 128")
    energy.add_argument("--samples", nargs="+", type=int, default=[128, 256, 512], help="default: 128 256 512")
    energy.add_argument("--repeats", type=int, default=3, metavar="N", help="the median of so many; default: 3")
    energy.add_argument("--output", type=str, default=None, metavar="DIR", help="default: runs/NAME-energy-check-DATE")
    partition = command("partition", "show who owns what, as a table and a figure", _SETTINGS)
    partition.add_argument("recipe", type=str, help="YAML file")
    partition.add_argument("--output", type=str, default=None, metavar="DIR", help="where the figure goes")
    report = command("report", "make reports again from what runs left")
    report.add_argument(
        "folders", nargs="+", type=str, metavar="DIR", help="a run, comparison or study, or several runs"
    )
    report.add_argument("--output", type=str, default=None, metavar="DIR", help="for several runs: where it goes")
    report.add_argument("--baseline", type=str, default=None, metavar="LABEL", help="default: the first label")
    ui = command("ui", "MLflow's page for the tracking store, on this machine alone")
    ui.add_argument("--port", type=int, default=5000, metavar="N", help="default: 5000")
    submit = command("submit", "run a recipe or a study as a job of a Ray cluster", _SETTINGS)
    submit.add_argument("file", type=str, help="YAML file, in or below the working folder, which is packed")
    submit.add_argument(
        "--output", type=str, default=None, metavar="DIR", help="that all nodes see, or s3://bucket/run"
    )
    submit.add_argument("--seeds", nargs="*", type=int, default=[], help="compare over them, in place of one run")
    submit.add_argument("--wait", action="store_true", help="show what it says, and return its exit code")
    submit.add_argument("--requirements", type=str, default=None, metavar="FILE", help="of pip, for the job")
    submit.add_argument("--env", nargs="*", type=str, default=[], metavar="NAME=VALUE", help="variables of the job")
    jobs = command("jobs", "our jobs of a Ray cluster")
    logs = command("logs", "what a job has said")
    logs.add_argument("job", type=str, metavar="ID")
    logs.add_argument("--follow", action="store_true", help="until it ends")
    stop = command("stop", "end a job")
    stop.add_argument("job", type=str, metavar="ID")
    for each in (submit, jobs, logs, stop):
        each.add_argument("--address", type=str, default="http://127.0.0.1:8265", help="default: http://127.0.0.1:8265")
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
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, _as_interrupt)
    try:
        kept, overrides = _split_overrides([word for word in arguments if word not in _FLAGS])
        parsed = _parser().parse_args(kept)
        options = parsed[parsed.command]
        options.print_config = print_config
        module, _, function = COMMANDS[parsed.command].partition(":")
        return getattr(importlib.import_module(f"fl_ray.commands.{module}"), function)(options, overrides)
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
