"""Our Optuna sampler under Optuna's own published tests, against random search, and through a restart."""

import math
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.samplers import BaseSampler, CmaEsSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.testing.pytest_samplers import BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase

from tuning.samplers import CrossEntropySampler, SeededByTrial

optuna.logging.set_verbosity(optuna.logging.ERROR)


class TestAsOptunaAsks(BasicSamplerTestCase, RelativeSamplerTestCase, SingleOnlySamplerTestCase):
    """Optuna's tests for samplers of one objective that draw all parameters together."""

    @pytest.fixture
    def sampler(self) -> Callable[[], BaseSampler]:
        return lambda: CrossEntropySampler(seed=0)


def objective(trial: optuna.Trial) -> float:
    x = trial.suggest_float("x", -5, 5)
    rate = trial.suggest_float("rate", 1e-5, 1, log=True)
    steps = trial.suggest_int("steps", 1, 20)
    kind = trial.suggest_categorical("kind", ["bad", "good", "worse"])
    far = {"good": 0.0, "bad": 1.0, "worse": 2.0}[kind]
    return (x - 1.5) ** 2 + (math.log10(rate) + 2) ** 2 + 0.1 * (steps - 7) ** 2 + far


def search(sampler: BaseSampler, trials: int, storage: JournalStorage | None = None) -> optuna.Study:
    study = optuna.create_study(sampler=sampler, storage=storage, study_name="s", load_if_exists=True)
    study.optimize(objective, n_trials=trials)
    return study


def test_comes_nearer_than_random_search() -> None:
    found = [search(CrossEntropySampler(seed=seed), 120).best_value for seed in range(3)]
    drawn = [search(optuna.samplers.RandomSampler(seed=seed), 120).best_value for seed in range(3)]
    assert max(found) < 0.5 * min(drawn)
    assert all(search(CrossEntropySampler(seed=seed), 120).best_params["kind"] == "good" for seed in range(3))


def test_the_elite_is_what_the_next_generation_is_drawn_around() -> None:
    sampler = CrossEntropySampler(population=4, elite=2, smoothing=0.0, least_std=1e-6, std=0.3, seed=0)
    study = optuna.create_study(sampler=sampler)
    for x, value in [(0.1, 5.0), (0.2, 1.0), (0.4, 2.0), (0.9, 9.0)]:
        study.enqueue_trial({"x": x})
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        study.tell(trial, value)
    drawn = []
    for _ in range(400):  # of the second generation, which has no ended trial yet
        drawn.append(study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"])
    mean = sum(drawn) / len(drawn)
    assert mean == pytest.approx(0.3, abs=0.02)
    assert sum((x - mean) ** 2 for x in drawn) / len(drawn) == pytest.approx(0.1**2, rel=0.2)


def test_infeasible_trials_come_behind_all_feasible_ones() -> None:
    sampler = CrossEntropySampler(population=4, elite=2, smoothing=0.0, least_std=1e-6, seed=0)
    study = optuna.create_study(sampler=sampler)
    for x, value, violation in [(0.1, 0.0, 3.0), (0.6, 7.0, 0.0), (0.8, 8.0, -1.0), (0.2, 1.0, 1.0)]:
        study.enqueue_trial({"x": x})
        trial = study.ask()
        trial.suggest_float("x", 0, 1)
        trial.set_constraint("limit", violation)
        study.tell(trial, value)
    drawn = [study.ask({"x": optuna.distributions.FloatDistribution(0, 1)}).params["x"] for _ in range(300)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.7, abs=0.02)


@pytest.mark.parametrize(
    "make",
    [
        lambda: CrossEntropySampler(population=4, elite=2, seed=3),
        lambda: SeededByTrial(lambda seed: TPESampler(n_startup_trials=4, seed=seed), 3),
        lambda: SeededByTrial(lambda seed: CmaEsSampler(n_startup_trials=2, seed=seed), 3),
    ],
    ids=["cross_entropy", "tpe", "cmaes"],
)
def test_a_study_that_was_cut_goes_on_as_it_would_have(make: Callable[[], BaseSampler], tmp_path: Path) -> None:
    whole = search(make(), 16)
    storage = JournalStorage(JournalFileBackend(str(tmp_path / "study.log")))
    search(make(), 7, storage)
    again = search(make(), 9, JournalStorage(JournalFileBackend(str(tmp_path / "study.log"))))
    assert [trial.params for trial in again.trials] == [trial.params for trial in whole.trials]


@pytest.mark.parametrize("bad", [{"elite": 1}, {"elite": 11}, {"smoothing": 1.0}])
def test_bad_settings_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CrossEntropySampler(**bad)
