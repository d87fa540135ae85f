"""The cross-entropy method as an Optuna sampler, and any sampler with its randomness by trial."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from optuna import Study
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.search_space import IntersectionSearchSpace
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from tuning.cross_entropy import CrossEntropy

__all__ = ["CrossEntropySampler", "SeededByTrial"]

_GENERATION = "cross_entropy:generation"
_LEAST_PROBABILITY = 0.01  # of a choice: none is lost for ever


def _seed_of(seed: int, *key: object) -> int:
    """31 bits that depend on the seed and the key alone."""
    text = repr((seed, *key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") % 2**31


class CrossEntropySampler(BaseSampler):
    """The cross-entropy method (``tuning.cross_entropy``): each generation is drawn around the elite of the last.

    Numbers are drawn from a Gaussian in the unit cube (logarithmic ones by their logarithm), choices with the
    frequencies that they had in the elite. Everything follows from the study's trials and the seed, so that a study in
    a storage goes on after a restart as it would have; trials at work at the same time belong to one generation.
    Infeasible trials (by ``Trial.set_constraint``) come behind all feasible ones, by their violation. Pruned trials
    count with the value that they had; failed ones do not.

    Args:
        population, elite: trials of a generation, and how many of them the next one follows.
        mean, std: of the first generation, in the unit cube.
        smoothing: share of the old mean and deviation that is kept.
        least_std: a deviation never falls below it, so that the search goes on.
        seed: of the draws; None: another one each time.

    Raises:
        ValueError: the elite does not fit into the population; and, for several objectives, when a trial begins.
    """

    def __init__(
        self,
        population: int = 10,
        elite: int = 3,
        mean: float = 0.5,
        std: float = 0.3,
        smoothing: float = 0.2,
        least_std: float = 0.01,
        seed: int | None = None,
    ) -> None:
        self.population, self.elite, self.mean, self.std = population, elite, mean, std
        self.smoothing, self.least_std = smoothing, least_std
        self._seed = int(np.random.SeedSequence().generate_state(1)[0]) if seed is None else seed
        self._space = IntersectionSearchSpace()
        self._core(1)

    def _core(self, dimensions: int) -> CrossEntropy:
        sizes = {"population": self.population, "elite": self.elite}
        return CrossEntropy(dimensions, self.mean, self.std, 0.0, 1.0, **sizes, smoothing=self.smoothing)

    def reseed_rng(self) -> None:
        self._seed = int(np.random.SeedSequence().generate_state(1)[0])

    def _rng(self, trial: FrozenTrial, name: str) -> np.random.Generator:
        return np.random.default_rng(_seed_of(self._seed, trial.number, name))

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return {name: kind for name, kind in self._space.calculate(study).items() if not kind.single()}

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        self._raise_error_if_multi_objective(study)
        if not search_space:
            return {}
        generations = self._generations(study, trial)
        if _GENERATION not in trial.system_attrs:  # a trial that was cut keeps the one that it was drawn in
            study._storage.set_trial_system_attr(trial._trial_id, _GENERATION, len(generations))
        sign = 1.0 if study.direction == StudyDirection.MINIMIZE else -1.0
        numbers = {name: kind for name, kind in search_space.items() if not isinstance(kind, CategoricalDistribution)}
        drawn: dict[str, Any] = {}
        if numbers:
            core = self._core(len(numbers))
            for members in generations:
                places = [[_to_unit(kind, each.params[name]) for name, kind in numbers.items()] for each in members]
                core.refit(np.array(places), *_ranking(members, sign))
                core.spread = core.spread.clip(self.least_std)
            rng = self._rng(trial, "")
            place = rng.normal(core.center, core.spread).clip(0.0, 1.0)
            drawn = {name: _from_unit(kind, x) for (name, kind), x in zip(numbers.items(), place, strict=True)}
        for name, kind in search_space.items():
            if isinstance(kind, CategoricalDistribution):
                shares = self._shares(kind, name, generations, sign)
                drawn[name] = kind.choices[int(self._rng(trial, name).choice(len(shares), p=shares))]
        return drawn

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """What not all trials have had (or, at first, none): as in the first generation."""
        self._raise_error_if_multi_objective(study)
        rng = self._rng(trial, param_name)
        if isinstance(param_distribution, CategoricalDistribution):
            return param_distribution.choices[int(rng.integers(len(param_distribution.choices)))]
        return _from_unit(param_distribution, float(rng.normal(self.mean, self.std)))

    def _generations(self, study: Study, trial: FrozenTrial) -> list[list[FrozenTrial]]:
        """The trials of each generation that is whole, in order: the next one follows the last of them."""
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
        by_number: dict[int, list[FrozenTrial]] = {}
        for each in ended:
            if each.number != trial.number:
                by_number.setdefault(each.system_attrs.get(_GENERATION, 0), []).append(each)
        whole = []
        while len(by_number.get(len(whole), [])) >= self.population:
            whole.append(by_number[len(whole)][: self.population])
        return whole

    def _shares(
        self, kind: CategoricalDistribution, name: str, generations: Sequence[Sequence[FrozenTrial]], sign: float
    ) -> np.ndarray:
        shares = np.full(len(kind.choices), 1 / len(kind.choices))
        for members in generations:
            values, violations = _ranking(members, sign)
            best = np.lexsort((np.where(violations > 0, 0.0, values), violations))[: self.elite]
            chosen = [int(kind.to_internal_repr(members[place].params[name])) for place in best]
            found = np.bincount(chosen, minlength=len(shares)) / len(chosen)
            shares = self.smoothing * shares + (1 - self.smoothing) * found
            shares = np.maximum(shares, _LEAST_PROBABILITY)
            shares /= shares.sum()
        return shares


def _ranking(members: Sequence[FrozenTrial], sign: float) -> tuple[np.ndarray, np.ndarray]:
    """(value, less is better; violation) of each trial."""
    values = []
    for each in members:
        value = each.value if each.state == TrialState.COMPLETE else None
        if value is None and each.intermediate_values:
            value = each.intermediate_values[max(each.intermediate_values)]
        values.append(math.inf if value is None or math.isnan(value) else sign * value)
    return np.array(values), np.array([sum(max(0.0, x) for x in each.constraints.values()) for each in members])


def _to_unit(kind: BaseDistribution, value: float) -> float:
    low, high, log = _bounds(kind)
    place = (
        (math.log(value) - math.log(low)) / (math.log(high) - math.log(low)) if log else (value - low) / (high - low)
    )
    return min(1.0, max(0.0, place))


def _from_unit(kind: BaseDistribution, place: float) -> float | int:
    """The value at a place of the unit interval, on the parameter's own grid."""
    place = min(1.0, max(0.0, place))
    low, high, log = _bounds(kind)
    value = math.exp(math.log(low) + place * (math.log(high) - math.log(low))) if log else low + place * (high - low)
    if isinstance(kind, IntDistribution):
        return min(kind.high, max(kind.low, kind.low + kind.step * round((value - kind.low) / kind.step)))
    if kind.step is not None:
        steps = round((value - kind.low) / kind.step)
        return float(min(kind.high, max(kind.low, kind.low + kind.step * steps)))
    return float(min(kind.high, max(kind.low, value)))


def _bounds(kind: BaseDistribution) -> tuple[float, float, bool]:
    """What the unit interval stands for; on a grid with half a step to both sides, so that the ends are as likely."""
    half = 0.0 if kind.step is None else kind.step / 2
    low = kind.low - half
    if kind.log and low <= 0:
        low = kind.low
    return low, kind.high + half, kind.log


class SeededByTrial(BaseSampler):
    """Any sampler, made anew for each trial with a seed of the trial's number.

    Where a sampler keeps all but its random generator in the study, as Optuna's own do, a study that is cut
    anywhere goes on with the candidates that it would have had.

    Args:
        make: the sampler with a seed.
        seed: of all trials.
    """

    def __init__(self, make: Callable[[int], BaseSampler], seed: int) -> None:
        self._make, self._seed = make, seed
        self._number, self._sampler = -1, make(seed)

    def _of(self, trial: FrozenTrial) -> BaseSampler:
        if trial.number != self._number:
            self._number, self._sampler = trial.number, self._make(_seed_of(self._seed, trial.number))
        return self._sampler

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._of(trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return self._of(trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        return self._of(trial).sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._of(trial).before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: TrialState, values: Sequence[float] | None) -> None:
        self._of(trial).after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Nothing to do: a trial's number decides."""
