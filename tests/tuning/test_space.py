"""Search spaces: what a study file may say, candidates, grids, and what is refused."""

from typing import Any

import optuna
import pytest

from tuning.space import SearchSpace

optuna.logging.set_verbosity(optuna.logging.ERROR)


def candidates(space: SearchSpace, count: int) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    found = []
    for _ in range(count):
        trial = study.ask()
        found.append(space.suggest(trial))
        study.tell(trial, 0.0)
    return found


def test_candidates_lie_in_their_bounds_and_on_their_steps() -> None:
    space = SearchSpace.parse(
        {
            "share": {"uniform": [0.25, 0.75]},
            "lr": {"loguniform": [1e-4, 1e-1]},
            "epochs": {"int": [1, 8], "step": 3},
            "kind": {"choice": ["a", "b", None]},
        }
    )
    drawn = candidates(space, 200)
    assert all(0.25 <= each["share"] <= 0.75 and 1e-4 <= each["lr"] <= 1e-1 for each in drawn)
    assert {each["epochs"] for each in drawn} == {1, 4, 7}
    assert {each["kind"] for each in drawn} == {"a", "b", None}
    below = sum(each["lr"] < 1e-2 for each in drawn) / 200
    assert below == pytest.approx(2 / 3, abs=0.1)  # by the logarithm: two of three decades


def test_a_conditional_setting_is_there_only_under_its_condition() -> None:
    space = SearchSpace.parse(
        {
            "policy": {"choice": ["static", "decay", "emd"]},
            "weight": {"uniform": [0, 1], "when": {"policy": ["static", "decay"]}},
            "factor": {"uniform": [0, 1], "when": {"policy": "decay"}},
        }
    )
    for each in candidates(space, 60):
        assert ("weight" in each) == (each["policy"] in ("static", "decay"))
        assert ("factor" in each) == (each["policy"] == "decay")


def test_a_grid_has_every_candidate_once() -> None:
    space = SearchSpace.parse(
        {
            "policy": {"choice": ["static", "decay"]},
            "epochs": {"int": [1, 2]},
            "factor": {"uniform": [0.0, 1.0], "steps": 3, "when": {"policy": "decay"}},
        }
    )
    assert space.grid() == [
        {"policy": "static", "epochs": 1},
        {"policy": "static", "epochs": 2},
        *({"policy": "decay", "epochs": epochs, "factor": factor} for epochs in (1, 2) for factor in (0.0, 0.5, 1.0)),
    ]


def test_a_logarithmic_grid_is_even_in_its_logarithm() -> None:
    space = SearchSpace.parse({"lr": {"loguniform": [0.001, 0.1], "steps": 3}})
    assert [each["lr"] for each in space.grid()] == pytest.approx([0.001, 0.01, 0.1])


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "space is empty"),
        ({"lr": {"normal": [0, 1]}}, "one of uniform, loguniform, int, choice"),
        ({"lr": {"uniform": [1, 0]}}, r"uniform is \[1, 0\]"),
        ({"lr": {"loguniform": [0, 1]}}, "least must be positive"),
        ({"lr": {"uniform": [0, 1], "step": 2}}, "step does not go with uniform"),
        ({"epochs": {"int": [0.5, 2]}}, "two whole numbers"),
        ({"kind": {"choice": []}}, "a list of values"),
        ({"kind": {"choice": [[1], [2]]}}, "single values"),
        ({"x": {"uniform": [0, 1], "when": {"y": 1}}}, "y does not stand before x"),
        ({"y": {"choice": [1, 2]}, "x": {"uniform": [0, 1], "when": {"y": 3}}}, "is never"),
    ],
)
def test_bad_spaces_are_refused(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        SearchSpace.parse(entry)


def test_a_grid_needs_steps() -> None:
    with pytest.raises(ValueError, match="steps"):
        SearchSpace.parse({"lr": {"uniform": [0, 1]}}).grid()
