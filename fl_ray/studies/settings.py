"""Study files: a recipe, what may change in it, and how the best is looked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import optuna
import yaml

from fl_ray.config import Component, RunConfig
from fl_ray.errors import SettingError, require
from fl_ray.recipes import apply_overrides, load_recipe, make_config
from fl_ray.registry import nearest
from fl_ray.studies.metrics import check_metric
from tuning.algorithms import SEVERAL_OBJECTIVES, make_sampler
from tuning.space import SearchSpace
from tuning.tune_study import make_scheduler

__all__ = ["Study", "load_study"]


@dataclass(frozen=True)
class Study:
    """A study, checked.

    Attributes:
        name: of its MLflow experiment, and of its folder.
        recipe: the recipe's settings, with those that the study changes for all trials.
        space: what the search chooses, by dotted setting name. Of ``objective: plan`` there is none: the search chooses
            FIMI's time splits, one for each device.
        metric, mode: what is searched for, see ``fl_ray.studies.metrics``; ``max`` or ``min``; several: the front.
        algorithm: one of ``tuning.algorithms``, with its settings.
        scheduler: ``asha``, ``median`` or ``none``, with its settings; it counts rounds, over all seeds.
        trials: how many; of a grid at most all.
        concurrency: trials at a time.
        seeds: of the runs of a trial, one after another; its metrics are their means.
        seed: of the search.
        objective: ``run``, or ``plan``: the energy of a plan with the trial's time splits, without any training.
    """

    name: str
    recipe: dict[str, Any]
    space: dict[str, Any] = field(default_factory=dict)
    metric: tuple[str, ...] = ("final_accuracy",)
    mode: tuple[str, ...] = ("max",)
    algorithm: Component = field(default_factory=lambda: Component("tpe"))
    scheduler: Component = field(default_factory=lambda: Component("none"))
    trials: int = 10
    concurrency: int = 1
    seeds: tuple[int, ...] = (0,)
    seed: int = 0
    objective: Literal["run", "plan"] = "run"

    def __post_init__(self) -> None:
        require(self.objective in ("run", "plan"), "objective", self.objective, "run or plan")
        require(self.trials >= 1, "trials", self.trials, "at least 1")
        require(self.concurrency >= 1, "concurrency", self.concurrency, "at least 1")
        whole = all(isinstance(seed, int) for seed in self.seeds)
        require(whole and len(set(self.seeds)) == len(self.seeds) > 0, "seeds", self.seeds, "different whole numbers")
        if len(self.metric) != len(self.mode) or not set(self.mode) <= {"max", "min"}:
            raise SettingError(f"mode is {list(self.mode)}, but it must be max or min for each of {list(self.metric)}")
        base = self.base()
        if self.objective == "plan":
            if self.space or self.metric != ("energy_j",) or self.scheduler.name != "none":
                raise SettingError(
                    "objective plan searches FIMI's time splits for the least energy_j: leave space and scheduler out"
                )
        else:
            for name in self.metric:
                check_metric(name, base)
            self._try_space()
        if len(self.metric) > 1 and self.algorithm.name not in SEVERAL_OBJECTIVES:
            raise SettingError(
                f"algorithm {self.algorithm.name} searches for one metric, but there are {len(self.metric)}; take one "
                f"of {', '.join(SEVERAL_OBJECTIVES)}"
            )
        if len(self.metric) > 1 and self.scheduler.name != "none":
            raise SettingError(f"scheduler {self.scheduler.name} compares one metric; leave it out for several")
        try:
            make_sampler(self.algorithm.name, self.algorithm.settings, self.seed)
            self.make_scheduler(base)
            if self.algorithm.name == "grid":
                self.search_space().grid()
        except ValueError as error:
            raise SettingError(str(error)) from error

    @property
    def directions(self) -> list[str]:
        """Optuna's words for ``mode``."""
        return ["maximize" if mode == "max" else "minimize" for mode in self.mode]

    def base(self) -> RunConfig:
        """The recipe as it is where the search changes nothing."""
        return make_config(self.recipe)

    def config(self, params: Mapping[str, Any]) -> RunConfig:
        """The recipe of a trial.

        Raises:
            SettingError: what was chosen does not go together.
        """
        return replace(make_config(apply_overrides(self.recipe, params)), name=self.name)

    def search_space(self) -> SearchSpace:
        """What the search chooses."""
        if self.objective == "plan":
            from fl_ray.allocation.search import HIGH, LOW

            splits = {"uniform": [LOW, HIGH]}
            return SearchSpace.parse({f"rho{device}": splits for device in range(self.base().data.clients)})
        return SearchSpace.parse(self.space)

    def make_scheduler(self, base: RunConfig) -> Any:
        """Ray Tune's scheduler."""
        settings, steps = self.scheduler.settings, base.rounds * len(self.seeds)
        return make_scheduler(self.scheduler.name, settings, self.metric[0], self.mode[0], steps)

    def to_dict(self) -> dict[str, Any]:
        """As a study file; ``load_study`` takes it back."""
        content = dataclasses.asdict(self)
        for key in ("algorithm", "scheduler"):
            content[key] = {"name": content[key]["name"], **content[key]["settings"]}
        for key in ("metric", "mode", "seeds"):
            content[key] = list(content[key])
        return content

    def _try_space(self) -> None:
        """Refuse what no recipe takes, before anything is started: one value of each setting, with what it needs."""
        try:
            space = SearchSpace.parse(self.space)
        except ValueError as error:
            raise SettingError(str(error)) from error
        known = {parameter.name: parameter for parameter in space.parameters}
        for parameter in space.parameters:
            params = {name: allowed[0] for name, allowed in parameter.when.items()}
            for other in list(params):
                params |= {name: allowed[0] for name, allowed in known[other].when.items()}
            params[parameter.name] = parameter.suggest(optuna.create_study().ask())
            try:
                self.config(params)
            except SettingError as error:
                raise SettingError(f"space.{parameter.name}: {error}") from error


_KEYS = (*(each.name for each in dataclasses.fields(Study)), "settings")


def load_study(path: Path, overrides: Mapping[str, Any], trials: int | None = None) -> Study:
    """A study file, checked.

    Args:
        overrides: settings of its recipe, by dotted name.
        trials: in place of the file's.

    Raises:
        SettingError: no such file, unknown keys, or anything in it that can't be used.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)  # else it tells of every study in memory
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingError(f"study {path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingError(f"study {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict) or "recipe" not in content:
        raise SettingError(f"study {path}: a study is a mapping with a recipe (a file, or its settings), space, metric")
    unknown = sorted(set(content) - set(_KEYS))
    if unknown:
        raise SettingError(f"study {path}: unknown key {unknown[0]!r}.{nearest(unknown[0], _KEYS)}")
    recipe = content.pop("recipe")
    if not isinstance(recipe, dict):
        recipe = load_recipe(path.parent / str(recipe))
    recipe.pop("compare", None)
    recipe = apply_overrides(recipe, content.pop("settings", None) or {})
    content["recipe"] = apply_overrides(recipe, overrides)
    content.setdefault("name", path.stem)
    for key, default in (("metric", "final_accuracy"), ("mode", "max"), ("seeds", 0)):
        value = content.get(key, default)
        content[key] = tuple(value) if isinstance(value, list) else (value,)
    for key, default in (("algorithm", "tpe"), ("scheduler", "none")):
        value = content.get(key, default)
        entry = {"name": value} if isinstance(value, str) else value
        if not isinstance(entry, dict) or "name" not in entry:
            raise SettingError(f"study {path}: {key} is {value}, but it must be a name, or a mapping with its name")
        content[key] = Component(entry["name"], {name: item for name, item in entry.items() if name != "name"})
    if trials is not None:
        content["trials"] = trials
    for key in ("trials", "concurrency", "seed"):
        if key in content and (not isinstance(content[key], int) or isinstance(content[key], bool)):
            raise SettingError(f"study {path}: {key} is {content[key]}, but it must be a whole number")
    return Study(**content)
