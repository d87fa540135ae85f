"""Recipes: YAML files with settings, and overrides by dotted name, made into a checked ``RunConfig`` and back."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from fl_ray import config as cfg
from fl_ray.errors import SettingError
from fl_ray.registry import BASES, import_target, nearest, resolve_name
from fl_ray.setting_types import typed_arguments, typed_section

__all__ = [
    "INJECTED",
    "apply_overrides",
    "build",
    "compare_entries",
    "flattened",
    "load_recipe",
    "make_component",
    "make_config",
    "ray_settings",
    "start_of",
    "to_dict",
]

# Arguments that fl_ray hands to a component itself; they are no settings of a recipe.
INJECTED: dict[str, frozenset[str]] = {
    "data": frozenset({"root", "download"}),
    "model": frozenset({"in_channels", "image_size", "num_classes", "optimizer"}),
    "method": frozenset(),
    "partition": frozenset(),
    "generator": frozenset(),
    "sampling": frozenset(),
    "update": frozenset(),
}
TOP_LEVEL = tuple(field.name for field in dataclasses.fields(cfg.RunConfig))
_PLAIN_SECTIONS = {
    "training": cfg.TrainingConfig,
    "fleet": cfg.FleetConfig,
    "allocation": cfg.AllocationConfig,
    "runtime": cfg.RuntimeConfig,
    "ray": cfg.RayConfig,
    "tracking": cfg.TrackingConfig,
    "checkpoint": cfg.CheckpointConfig,
    "clock": cfg.ClockConfig,
    "early_stopping": cfg.StoppingConfig,
}
_LABELS = {"partition": "data.partition", "update": "updates"}
_COMPONENTS = ("model", "method", "sampling")


def load_recipe(path: str | Path, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in a YAML file, not yet checked. ``extends`` names another recipe, relative to the file's folder,
    whose settings (but for ``compare``) are those that the file does not change.

    Raises:
        SettingError: no such file, not YAML, or not a mapping.
    """
    path = Path(path)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise SettingError(f"recipe {path}: not a text file in UTF-8") from error
    except yaml.YAMLError as error:
        raise SettingError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        raise SettingError(f"recipe {path} is empty; a recipe is a mapping of settings")
    if not isinstance(content, dict):
        raise SettingError(f"recipe {path} holds {type(content).__name__}, but a recipe is a mapping of settings")
    content.pop("environment", None)  # a run's config.yaml is a recipe, too; that part says what ran it
    content.setdefault("name", path.stem)
    if "extends" not in content:
        return content
    if path.resolve() in extended_by:
        raise SettingError(f"recipe {path} extends itself: {' -> '.join(each.name for each in extended_by)}")
    base = load_recipe(path.parent / str(content.pop("extends")), (*extended_by, path.resolve()))
    base.pop("compare", None)
    return apply_overrides(base, content)


def apply_overrides(recipe: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe with settings replaced by dotted name (``data.partition.alpha``), as a new mapping.

    A section whose ``name`` changes loses the settings of the old component (not those common to all, as
    ``data.clients``, ``data.partition.min_samples`` or ``generator.pool``): overriding ``method.name`` alone is enough.
    """
    result = copy.deepcopy(dict(recipe))
    flat = dict(flattened(overrides))
    for key in sorted(flat, key=lambda key: key.split(".")[-1] != "name"):  # names first: they may clear a section
        *path, last = key.split(".")
        section = result
        for depth, part in enumerate(path):
            section = _inside(section, part)
            if not isinstance(section, (dict, list)):
                inner = ".".join(path[: depth + 1])
                raise SettingError(f"--{key}: {inner} is {section!r}, which has no settings inside")
        if isinstance(section, list):
            raise SettingError(f"--{key}: give the whole list, or a setting of an item, as fleet.tiers.0.cpus")
        kind = "update" if path[:1] == ["updates"] else path[-1] if path else ""
        if last == "name" and kind in INJECTED and section.get("name") not in (None, flat[key]):
            for old in set(section) - _own_keys(kind):
                del section[old]
        section[last] = flat[key]
    return result


def _inside(section: Any, part: str) -> Any:
    """What ``part`` names in a mapping (made if it is not there) or, by number, in a list. A component that
    stands there as its name alone becomes a mapping.
    """
    place: Any = part
    if isinstance(section, list):
        if not (part.isdigit() and int(part) < len(section)):
            return None
        place = int(part)
    elif section.get(part) is None:
        section[part] = {}
    if isinstance(section[place], str) and (isinstance(section, list) or part in INJECTED):
        section[place] = {"name": section[place]}
    return section[place]


def _own_keys(kind: str) -> set[str]:
    if kind == "data":
        return {f.name for f in dataclasses.fields(cfg.DataConfig)} - {"settings"}
    if kind == "generator":
        return {f.name for f in dataclasses.fields(cfg.GeneratorConfig)} - {"settings"}
    return {"name", "min_samples"} if kind == "partition" else {"name"}


def flattened(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Settings by dotted name; an empty section is a value."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def compare_entries(recipe: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(label, overrides) of each item of the recipe's ``compare`` list.

    Raises:
        SettingError: an item is no mapping, or labels are missing or double.
    """
    entries: list[tuple[str, dict[str, Any]]] = []
    for item in recipe.get("compare") or []:
        if not isinstance(item, Mapping) or not isinstance(item.get("label"), str):
            raise SettingError(f"compare: {item!r} needs a 'label' and settings, as {{label: a, method.name: fedavg}}")
        entries.append((item["label"], {key: value for key, value in item.items() if key != "label"}))
    labels = [label for label, _ in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise SettingError(f"compare: the label {label!r} stands twice")
    return entries


def make_config(recipe: Mapping[str, Any]) -> cfg.RunConfig:
    """Check a recipe and fill in every default.

    Raises:
        SettingError: an unknown setting (the nearest right name is offered), a wrong type or a value out of range.
    """
    _refuse_unknown("recipe", recipe, TOP_LEVEL)
    values = {key: value for key, value in recipe.items() if value is not None}
    compare_entries(values)
    top: dict[str, Any] = {}
    for key, value in values.items():
        if key in _PLAIN_SECTIONS:
            top[key] = _plain(key, _PLAIN_SECTIONS[key], _mapping(key, value))
        elif key in _COMPONENTS:
            top[key] = make_component(key, _mapping(key, value))
        elif key == "data":
            top[key] = _data(_mapping(key, value))
        elif key == "generator":
            top[key] = _generator(_mapping(key, value))
        elif key == "updates":
            top[key] = _updates(value)
    for key in _COMPONENTS:  # the default components have default settings to fill in, too
        top.setdefault(key, make_component(key, {"name": getattr(cfg.RunConfig(), key).name}))
    top.setdefault("data", _data({}))
    scalars = {key: value for key, value in values.items() if key not in top}
    return _plain("", _Scalars, scalars).fill(top)


@dataclasses.dataclass
class _Scalars:
    """The top level's settings that are no sections, with their types for the check."""

    name: str = "run"
    rounds: int = 10
    clients_per_round: int | None = None
    evaluate_every: int = 1
    evaluate_clients_every: int = 0
    gradient_cosine_every: int = 0
    seed: int = 0
    model_store: str | None = None
    compare: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    targets: list[float] = dataclasses.field(default_factory=list)

    def fill(self, sections: dict[str, Any]) -> cfg.RunConfig:
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return cfg.RunConfig(**own, **sections)


def _updates(values: Any) -> list[cfg.Component]:
    if not isinstance(values, list):
        raise SettingError(f"updates is {values!r}, but it must be a list, as [{{name: clip, norm: 1.0}}]")
    return [make_component("update", _mapping("updates", item)) for item in values]


def ray_settings(recipe: Mapping[str, Any]) -> cfg.RayConfig | None:
    """The ``ray`` section alone, or None where the recipe runs without Ray.

    Raises:
        SettingError: as ``make_config``.
    """
    runtime = _plain("runtime", cfg.RuntimeConfig, _mapping("runtime", recipe.get("runtime") or {}))
    if runtime.backend != "ray":
        return None
    return _plain("ray", cfg.RayConfig, _mapping("ray", recipe.get("ray") or {}))


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str) and key in (*_COMPONENTS, "data", "generator", "data.partition", "updates"):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise SettingError(f"{key} is {value!r}, but it must be a mapping of settings")
    return dict(value)


def _data(values: dict[str, Any]) -> cfg.DataConfig:
    own = _own_keys("data")
    partition = make_component("partition", _mapping("data.partition", values.pop("partition", None) or "iid"))
    name = values.get("name", cfg.DataConfig.name)
    loader = resolve_name("data", name)
    settings = {key: value for key, value in values.items() if key not in own}
    settings = _checked("data", loader, settings, INJECTED["data"], own)
    common = _plain("data", cfg.DataConfig, {key: value for key, value in values.items() if key in own})
    return dataclasses.replace(common, settings=settings, partition=partition)


def _generator(values: dict[str, Any]) -> cfg.GeneratorConfig:
    own = _own_keys("generator")
    target = resolve_name("generator", values.get("name", cfg.GeneratorConfig.name))
    settings = {key: value for key, value in values.items() if key not in own}
    settings = _checked("generator", target, settings, INJECTED["generator"], own)
    common = _plain("generator", cfg.GeneratorConfig, {key: value for key, value in values.items() if key in own})
    return dataclasses.replace(common, settings=settings)


def make_component(kind: str, values: dict[str, Any]) -> cfg.Component:
    name = values.pop("name", None)
    if not isinstance(name, str):
        raise SettingError(f"{kind}.name is missing.{nearest('', [])}" if name is None else f"{kind}.name: {name!r}")
    label, target = _LABELS.get(kind, kind), resolve_name(kind, name)
    start = values.pop("start", None) if kind == "model" and "start" not in _parameters(target) else None
    if start is not None and not isinstance(start, str):
        raise SettingError(f"{label}.start is {start!r}, but it must be a file's name")
    beside = {} if start is None else {"start": start}
    return cfg.Component(name, {**_checked(label, target, values, INJECTED[kind]), **beside})


def start_of(model: cfg.Component) -> str | None:
    """The file of weights that a model starts from: ``start``, which every model has; where its own constructor takes
    something of that name, that is not ours.
    """
    return None if "start" in _parameters(resolve_name("model", model.name)) else model.settings.get("start")


def build(kind: str, component: cfg.Component, **injected: Any) -> Any:
    """Construct a component; ``injected`` arguments that its constructor doesn't take are left out.

    Raises:
        SettingError: the constructor refuses the settings with a ValueError, or makes something else.
    """
    target = resolve_name(kind, component.name)
    known = _parameters(target)
    if kind in BASES and inspect.isfunction(target):
        raise _no_component(kind, component.name)
    arguments = {key: value for key, value in injected.items() if key in known}
    ours = {"start"} - known if kind == "model" else set()
    settings = {key: value for key, value in component.settings.items() if key not in ours}
    try:
        made = target(**settings, **arguments)
    except SettingError:
        raise
    except (ValueError, TypeError) as error:
        raise SettingError(f"{_LABELS.get(kind, kind)} {component.name}: {error}") from error
    if kind in BASES and not isinstance(made, import_target(BASES[kind])):
        raise _no_component(kind, component.name)
    return made


def _no_component(kind: str, name: str) -> SettingError:
    what = BASES[kind].replace(":", ".")
    return SettingError(f"{_LABELS.get(kind, kind)} {name}: it is no {what}; derive it from that class")


def _parameters(target: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(target).parameters)


# What is said of a setting that some components have and others must do without.
_ELSEWHERE = {
    ("method", "client_models"): (
        "client_models is for the one-shot methods fedlmg, feddf, dense and ensemble; in others all clients train the "
        "recipe's model, and those that average can't average different ones; leave it out"
    )
}


def _refuse_unknown(label: str, values: Collection[str], known: Iterable[str]) -> None:
    known = list(known)
    for key in values:
        if key not in known:
            unknown = f"unknown setting {str(key)!r}.{nearest(str(key), known)}"
            raise SettingError(f"{label}: {_ELSEWHERE.get((label, key), unknown)}")


def _plain(label: str, kind: type, values: dict[str, Any]) -> Any:
    """An instance of the dataclass ``kind``; nested dataclasses and lists of them are checked too."""
    _refuse_nested(label or "recipe", kind, values)
    key = label or "recipe"
    return typed_section(key, kind, values)


def _refuse_nested(label: str, kind: type, values: dict[str, Any]) -> None:
    fields = {field.name: field for field in dataclasses.fields(kind)}
    _refuse_unknown(label, values, fields)
    if kind is cfg.FleetConfig:
        for tier in values.get("tiers") or []:
            _refuse_nested("fleet.tiers", cfg.TierConfig, _mapping("fleet.tiers", tier))
        for key, nested in (("availability", cfg.AvailabilityConfig), ("trace", cfg.TraceConfig)):
            if values.get(key) is not None:
                _plain(f"fleet.{key}", nested, _mapping(f"fleet.{key}", values[key]))  # tells what is wrong in it
    if kind is cfg.GeneratorConfig and values.get("pool"):
        _refuse_nested("generator.pool", cfg.PoolConfig, _mapping("generator.pool", values["pool"]))


def _checked(
    label: str,
    target: Callable[..., Any],
    values: dict[str, Any],
    injected: Collection[str],
    beside: Iterable[str] = (),
) -> dict[str, Any]:
    """The settings with types checked and defaults filled in, for a call of ``target``."""
    parameters = inspect.signature(target).parameters
    known = [name for name in parameters if name not in injected]
    _refuse_unknown(label, values, [*known, *beside, "name"])
    if not known:
        return {}
    return typed_arguments(label, target, frozenset(injected) & frozenset(parameters), values)


def to_dict(config: cfg.RunConfig) -> dict[str, Any]:
    """The resolved recipe as plain mappings, in the form of a recipe file: ``make_config`` takes it back."""
    plain = dataclasses.asdict(config)
    for key in (*_COMPONENTS, "generator"):
        if plain[key] is not None:
            plain[key] = _flat_component(plain[key])
    plain["updates"] = [_flat_component(item) for item in plain["updates"]]
    plain["data"]["partition"] = _flat_component(plain["data"]["partition"])
    plain["data"] = _flat_component(plain["data"])
    return plain


def _flat_component(values: dict[str, Any]) -> dict[str, Any]:
    settings = values.pop("settings")
    return {"name": values.pop("name"), **settings, **values}
