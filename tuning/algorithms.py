"""Search algorithms by name: Optuna's and ours, each with its randomness by trial."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from optuna import samplers
from optuna.samplers import BaseSampler

from tuning.samplers import CrossEntropySampler, SeededByTrial

__all__ = ["ALGORITHMS", "SEVERAL_OBJECTIVES", "make_sampler"]

_SAMPLERS: dict[str, type[BaseSampler]] = {
    "tpe": samplers.TPESampler,
    "cmaes": samplers.CmaEsSampler,
    "gp": samplers.GPSampler,
    "nsga2": samplers.NSGAIISampler,
    "random": samplers.RandomSampler,
    "cross_entropy": CrossEntropySampler,
}
ALGORITHMS = (*_SAMPLERS, "grid")
SEVERAL_OBJECTIVES = ("tpe", "nsga2", "random", "gp", "grid")


def make_sampler(name: str, settings: Mapping[str, Any], seed: int) -> BaseSampler:
    """A sampler; ``grid`` asks for its candidates one by one, and what draws is never reached.

    Args:
        name: one of ALGORITHMS.
        settings: keyword arguments of the sampler, but for its seed.
        seed: of all draws.

    Raises:
        ValueError: an unknown name or setting, or one that the sampler refuses.
    """
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm is {name}, but it must be one of {', '.join(ALGORITHMS)}")
    kind: Callable[..., BaseSampler] = _SAMPLERS.get(name, samplers.RandomSampler)
    known = set(inspect.signature(kind).parameters) - {"seed"}
    unknown = sorted(set(settings) - known)
    if unknown:
        raise ValueError(f"algorithm.{unknown[0]}: {name} has no such setting; it has {', '.join(sorted(known))}")
    if name == "cross_entropy":
        return CrossEntropySampler(**settings, seed=seed)
    try:
        kind(**settings)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"algorithm {name}: {error}") from error
    return SeededByTrial(lambda number: kind(**settings, seed=number), seed)
