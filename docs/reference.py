"""A hook of mkdocs: the reference pages are made from the code, so that they can't fall behind it.

A page has ``<!-- make: NAME -->`` where the text goes.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import itertools
import re
from pathlib import Path
from typing import Any

import yaml

from fl_ray import config as cfg
from fl_ray.allocation import settings as allocation
from fl_ray.recipes import INJECTED
from fl_ray.registry import REGISTRY
from fl_ray.studies import settings as studies

ROOT = Path(__file__).parent.parent
SECTIONS = {
    "data": cfg.DataConfig,
    "training": cfg.TrainingConfig,
    "fleet": cfg.FleetConfig,
    "fleet.tiers": cfg.TierConfig,
    "fleet.availability": cfg.AvailabilityConfig,
    "fleet.trace": cfg.TraceConfig,
    "allocation": allocation.AllocationConfig,
    "generator": cfg.GeneratorConfig,
    "generator.pool": cfg.PoolConfig,
    "runtime": cfg.RuntimeConfig,
    "ray": cfg.RayConfig,
    "clock": cfg.ClockConfig,
    "early_stopping": cfg.StoppingConfig,
    "checkpoint": cfg.CheckpointConfig,
    "tracking": cfg.TrackingConfig,
}
TITLES = {
    "method": "Methods",
    "data": "Data sets",
    "partition": "Partitioners",
    "model": "Models",
    "sampling": "Client samplers",
    "update": "Update post-processors",
    "generator": "Generators",
}
NOTES = {
    "model": "\nEvery model takes `start`, a safetensors file to start from, as `model.safetensors` of a run; the head "
    "is left as drawn where the file has one for other classes.\n"
}


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Put made text in the place of its mark."""
    return re.sub(r"<!-- make: (\w+)(?: ([\w/]+))? -->", lambda found: MAKERS[found[1]](found[2]), markdown)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("``", "`")


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _field_docs(kind: type) -> dict[str, str]:
    """What stands as a string behind each field of a dataclass."""
    tree = ast.parse(inspect.cleandoc("\n" + inspect.getsource(kind)))
    body = tree.body[0].body
    found = {}
    for field, after in itertools.pairwise(body):
        text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) and after.value.value
        if isinstance(field, ast.AnnAssign) and isinstance(text, str):
            found[field.target.id] = text
    return found


def _yaml(value: Any) -> str:
    return f"`{yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}`"


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return _yaml(field.default)
    if field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
        name = getattr(value, "name", None)
        return f"`{name}`" if isinstance(name, str) and not isinstance(value, (list, dict)) else ""
    return "must be given"


def _fields(kind: type, hidden: tuple[str, ...] = ("settings",)) -> str:
    docs = _field_docs(kind)
    rows = [
        [f"`{field.name}`", _default(field), _cell(docs.get(field.name, ""))]
        for field in dataclasses.fields(kind)
        if field.name not in hidden
    ]
    return _table(["setting", "default", ""], rows)


def recipe_sections(argument: str | None) -> str:
    """Every section of a recipe."""
    parts = ["## The recipe itself\n", _fields(cfg.RunConfig)]
    for name, kind in SECTIONS.items():
        summary = _cell(inspect.getdoc(kind) or "")
        parts.append(f"## {name}\n\n{summary}\n\n{_fields(kind)}")
    return "\n".join(parts)


def _arguments(target: Any) -> dict[str, str]:
    """The Args (or Attributes) section of a docstring, by name; a line may name several."""
    text = inspect.getdoc(target) or ""
    if inspect.isclass(target) and "Args:" not in text and "Attributes:" not in text:
        text = inspect.getdoc(target.__init__) or text
    section = re.search(r"(?:Args|Attributes):\n((?:    .*\n?|\n)+)", text)
    found: dict[str, str] = {}
    if section is None:
        return found
    names: list[str] = []
    for line in section[1].splitlines():
        start = re.match(r"    ([\w, ]+): (.*)", line)
        if start and not line.startswith("     "):
            names = [name.strip() for name in start[1].split(",")]
            for name in names:
                found[name] = start[2]
        else:
            for name in names:
                found[name] += f" {line.strip()}"
    return found


def _component(kind: str, name: str) -> str:
    entry = REGISTRY[kind][name]
    module, _, attribute = entry.target.partition(":")
    target = getattr(importlib.import_module(module), attribute)
    told = _arguments(target)
    rows = []
    for parameter in inspect.signature(target).parameters.values():
        hidden = parameter.name in INJECTED[kind] or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        if hidden:
            continue
        default, summary = parameter.default, _cell(told.get(parameter.name, ""))
        if dataclasses.is_dataclass(default):  # a section of its own
            inner, values = _arguments(type(default)), dataclasses.asdict(default)
            rows.append([f"`{parameter.name}`", "", summary])
            rows += [[f"`{parameter.name}.{key}`", _yaml(values[key]), _cell(inner.get(key, ""))] for key in values]
            continue
        empty = default is inspect.Parameter.empty
        rows.append([f"`{parameter.name}`", "must be given" if empty else _yaml(default), summary])
    text = f"### {name}\n\n{entry.summary[0].upper()}{entry.summary[1:]}.\n"
    return text + (f"\n{_table(['setting', 'default', ''], rows)}" if rows else "")


def components(argument: str | None) -> str:
    """Every registered component with its settings."""
    parts = []
    for kind, entries in REGISTRY.items():
        parts.append(f"## {TITLES[kind]}\n{NOTES.get(kind, '')}")
        parts += [_component(kind, name) for name in entries]
    return "\n".join(parts)


def component(argument: str) -> str:
    """One of them, as ``method/genfl``."""
    return _component(*argument.split("/"))


def study_keys(argument: str | None) -> str:
    """The keys of a study file."""
    told: dict[str, str] = {}
    text = (inspect.getdoc(studies.Study) or "").split("Attributes:\n")[1]
    names: list[str] = []
    for line in text.splitlines():
        start = re.match(r"    ([\w, ]+): (.*)", line)
        if start and not line.startswith("     "):
            names = [name.strip() for name in start[1].split(",")]
            told |= dict.fromkeys(names, start[2])
        else:
            for name in names:
                told[name] += f" {line.strip()}"
    rows = [
        [f"`{field.name}`", _default(field), _cell(told.get(field.name, ""))]
        for field in dataclasses.fields(studies.Study)
    ]
    return _table(["key", "default", ""], rows)


def commands(argument: str | None) -> str:
    """What ``fl-ray COMMAND --help`` says."""
    from fl_ray.cli import COMMANDS, main

    parts = []
    for name in COMMANDS:
        said = io.StringIO()
        with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
            main([name, "--help"])
        parts.append(f"## {name}\n\n```\n{said.getvalue().rstrip()}\n```\n")
    return "\n".join(parts)


def benchmarks(argument: str | None) -> str:
    """The README's section on speed: figures stand in one place."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    section = re.search(r"^## Speed\n(.*?)(?=^## )", text, re.DOTALL | re.MULTILINE)[1]
    return re.sub(r"\]\((?!http)[^)]*\)", "]", section).replace("\n[", "\n")


MAKERS = {
    "recipe_sections": recipe_sections,
    "components": components,
    "component": component,
    "study_keys": study_keys,
    "commands": commands,
    "benchmarks": benchmarks,
}
