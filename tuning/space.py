"""Search spaces: parameters by name, as a study file writes them.

lr:       {loguniform: [0.001, 0.3]}
epochs:   {int: [1, 5]}                 # with step: 2, or log: true
share:    {uniform: [0.0, 1.0]}         # with steps: 5 for a grid
policy:   {choice: [static, decay]}
factor:   {uniform: [0.5, 1.0], when: {policy: decay}}    # only asked for where policy is decay
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution

__all__ = ["Parameter", "SearchSpace"]

_KINDS = ("uniform", "loguniform", "int", "choice")
_OPTIONS = {"uniform": ("steps",), "loguniform": ("steps",), "int": ("step", "log"), "choice": ()}


@dataclass(frozen=True)
class Parameter:
    """One parameter: what it may be, and under which values of earlier ones it exists; ``steps`` of a grid."""

    name: str
    kind: BaseDistribution
    when: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    steps: int | None = None

    def exists(self, params: Mapping[str, Any]) -> bool:
        """Whether the values chosen so far ask for it."""
        return all(name in params and params[name] in allowed for name, allowed in self.when.items())

    def suggest(self, trial: optuna.Trial) -> Any:
        """A value from Optuna's sampler."""
        kind = self.kind
        if isinstance(kind, CategoricalDistribution):
            return trial.suggest_categorical(self.name, kind.choices)
        if isinstance(kind, IntDistribution):
            return trial.suggest_int(self.name, kind.low, kind.high, step=kind.step, log=kind.log)
        return trial.suggest_float(self.name, kind.low, kind.high, log=kind.log)

    def grid(self) -> list[Any]:
        """All its values, or ``steps`` of an interval.

        Raises:
            ValueError: an interval without ``steps``.
        """
        kind = self.kind
        if isinstance(kind, CategoricalDistribution):
            return list(kind.choices)
        if isinstance(kind, IntDistribution) and not kind.log:
            return list(range(kind.low, kind.high + 1, kind.step))
        if self.steps is None:
            raise ValueError(f"{self.name}: a grid needs a choice, a list of whole numbers, or steps")
        space = np.geomspace if kind.log else np.linspace
        return [float(x) for x in space(kind.low, kind.high, self.steps)]


@dataclass(frozen=True)
class SearchSpace:
    """Parameters in the order in which they are asked for."""

    parameters: tuple[Parameter, ...]

    @classmethod
    def parse(cls, content: Mapping[str, Any]) -> SearchSpace:
        """From a study file's mapping.

        Raises:
            ValueError: no parameters, an unknown kind, bad bounds, or a condition on what does not come before.
        """
        if not isinstance(content, Mapping) or not content:
            raise ValueError(
                "space is empty; it maps settings to what they may be, as {training.lr: {loguniform: [0.01, 1]}}"
            )
        found: dict[str, Parameter] = {}
        for name, entry in content.items():
            found[str(name)] = _parameter(str(name), entry, found)
        return cls(tuple(found.values()))

    def suggest(self, trial: optuna.Trial) -> dict[str, Any]:
        """A candidate from Optuna's sampler; what does not exist under the others' values is not in it."""
        params: dict[str, Any] = {}
        for parameter in self.parameters:
            if parameter.exists(params):
                params[parameter.name] = parameter.suggest(trial)
        return params

    def grid(self) -> list[dict[str, Any]]:
        """Every candidate of the grid, the last parameter changing fastest.

        Raises:
            ValueError: an interval without ``steps``.
        """
        candidates: list[dict[str, Any]] = [{}]
        for parameter in self.parameters:
            values = parameter.grid()
            candidates = [
                {**each, **chosen}
                for each in candidates
                for chosen in ([{parameter.name: value} for value in values] if parameter.exists(each) else [{}])
            ]
        return candidates


def _parameter(name: str, entry: Any, earlier: Mapping[str, Parameter]) -> Parameter:
    kinds = [kind for kind in _KINDS if isinstance(entry, Mapping) and kind in entry]
    if len(kinds) != 1:
        raise ValueError(f"space.{name} is {entry}, but it must have one of {', '.join(_KINDS)}")
    kind, options = kinds[0], {key: value for key, value in entry.items() if key not in (kinds[0], "when")}
    unknown = sorted(set(options) - set(_OPTIONS[kind]))
    if unknown:
        raise ValueError(f"space.{name}: {unknown[0]} does not go with {kind}; {kind} takes {_OPTIONS[kind] or 'none'}")
    when = _conditions(name, entry.get("when", {}), earlier)
    values = entry[kind]
    if not isinstance(values, list) or (kind != "choice" and len(values) != 2) or not values:
        need = "a list of values" if kind == "choice" else "[least, most]"
        raise ValueError(f"space.{name}.{kind} is {values}, but it must be {need}")
    if kind == "choice":
        if not all(isinstance(value, (str, int, float, bool, type(None))) for value in values):
            raise ValueError(f"space.{name}.choice is {values}, but choices are single values")
        return Parameter(name, CategoricalDistribution(values), when)
    low, high = values
    if not all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in values) or low > high:
        raise ValueError(f"space.{name}.{kind} is {values}, but it must be [least, most]")
    if kind == "int":
        if not all(isinstance(x, int) for x in values):
            raise ValueError(f"space.{name}.int is {values}, but it must be two whole numbers")
        step, log = options.get("step", 1), bool(options.get("log", False))
        if not isinstance(step, int) or step < 1 or (log and (step > 1 or low < 1)):
            raise ValueError(f"space.{name}: step is {step}; with log it must be 1 and the bounds at least 1")
        return Parameter(name, IntDistribution(low, low + (high - low) // step * step, log, step), when)
    if kind == "loguniform" and low <= 0:
        raise ValueError(f"space.{name}.loguniform is {values}, but the least must be positive")
    steps = options.get("steps")
    if steps is not None and (not isinstance(steps, int) or steps < 2):
        raise ValueError(f"space.{name}.steps is {steps}, but it must be at least 2")
    return Parameter(name, FloatDistribution(float(low), float(high), log=kind == "loguniform"), when, steps)


def _conditions(name: str, when: Any, earlier: Mapping[str, Parameter]) -> dict[str, tuple[Any, ...]]:
    if not isinstance(when, Mapping):
        raise ValueError(f"space.{name}.when is {when}, but it maps earlier settings to their values")
    conditions = {}
    for other, values in when.items():
        if other not in earlier:
            raise ValueError(f"space.{name}.when: {other} does not stand before {name} in space")
        allowed = tuple(values) if isinstance(values, list) else (values,)
        kind = earlier[other].kind
        if isinstance(kind, CategoricalDistribution) and not set(allowed) <= set(kind.choices):
            raise ValueError(f"space.{name}.when: {other} is never {list(allowed)}; it may be {list(kind.choices)}")
        conditions[str(other)] = allowed
    return conditions
