"""Study files: what they may say, and what is refused before anything is started."""

from pathlib import Path
from typing import Any

import pytest

from fl_ray.errors import SettingError
from fl_ray.studies.settings import load_study
from tests.fl_ray.studies.own import study_file

STUDIES = Path(__file__).parents[3] / "experiments" / "tuning"


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_study_is_whole(path: Path) -> None:
    study = load_study(path, {})
    assert study.trials >= 1
    assert study.search_space().parameters


def test_a_study_comes_back_from_its_own_file(tmp_path: Path) -> None:
    study = load_study(
        study_file(tmp_path, algorithm={"name": "cross_entropy", "population": 4, "elite": 2}, seeds=[3, 4]), {}
    )
    import yaml

    (tmp_path / "again.yaml").write_text(yaml.safe_dump(study.to_dict()), encoding="utf-8")
    assert load_study(tmp_path / "again.yaml", {}) == study


def test_the_recipe_may_be_a_file_with_settings_and_overrides_on_top(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("{rounds: 7, training: {lr: 0.5}, model: mlp}", encoding="utf-8")
    path = study_file(tmp_path, recipe="base.yaml", settings={"training.lr": 0.2})
    study = load_study(path, {"data.clients": 3}, trials=9)
    base = study.base()
    assert (base.rounds, base.training.lr, base.data.clients, study.trials) == (7, 0.2, 3, 9)
    assert study.config({"training.lr": 0.3}).training.lr == 0.3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spcae": {}}, "unknown key 'spcae'. Did you mean 'space'"),
        ({"space": {"training.lrr": {"uniform": [0.1, 1]}}}, "training.lrr"),
        ({"space": {"training.lr": {"uniform": [-1.0, -0.5]}}}, "training.lr"),
        ({"space": {"training.lr": {"unifrm": [0, 1]}}}, "must have one of"),
        ({"metric": "accuracy"}, "unknown name 'accuracy'"),
        ({"metric": "rounds_to_0.9"}, "Add 0.9 to the recipe's targets"),
        ({"mode": "best"}, "max or min"),
        ({"metric": ["final_accuracy", "energy_j"], "mode": ["max"]}, "max or min for each"),
        ({"metric": ["final_accuracy", "energy_j"], "mode": ["max", "min"], "algorithm": "cmaes"}, "one metric"),
        ({"algorithm": "tep"}, "algorithm is tep"),
        ({"algorithm": {"name": "tpe", "populaton": 3}}, "populaton"),
        ({"algorithm": {"name": "cross_entropy", "elite": 1}}, "elite is 1"),
        ({"algorithm": "grid"}, "steps"),
        ({"scheduler": "hyperband"}, "scheduler is hyperband"),
        ({"scheduler": {"name": "asha", "grace": 3}}, "scheduler asha: unknown setting grace. Known: .*grace_period"),
        ({"trials": 0}, "trials is 0"),
        ({"trials": "many"}, "trials is many"),
        ({"concurrency": 0}, "concurrency is 0"),
        ({"seeds": [1, 1]}, "seeds is"),
        ({"objective": "plan"}, "objective plan"),
        ({"objective": "walk"}, "run or plan"),
    ],
)
def test_bad_studies_are_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(SettingError, match=said):
        load_study(study_file(tmp_path, **changes), {})


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="nowhere"):
        load_study(tmp_path / "nowhere.yaml", {})
