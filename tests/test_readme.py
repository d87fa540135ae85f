"""The README's recipe parses, and what its table names is what there is."""

import re
from pathlib import Path

import yaml

from fl_ray.experiment import check
from fl_ray.recipes import apply_overrides, compare_entries, make_config
from fl_ray.registry import REGISTRY
from fl_ray.studies.settings import load_study

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_recipe_of_the_readme_parses() -> None:
    text, _, more = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    recipe = yaml.safe_load(text)
    assert make_config(recipe).method.name == "genfl"
    faults = {"method": "fedavg", "data": {"client_test_fraction": 0.2}, **yaml.safe_load(more)}
    check(make_config(faults | {"tracking": {"enabled": False}}))
    for _, changes in compare_entries(recipe):
        assert make_config(apply_overrides(recipe, changes))


def test_the_study_of_the_readme_parses(tmp_path: Path) -> None:
    _, text, _ = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    study = {**yaml.safe_load(text), "name": "of-the-readme"}
    study["recipe"] = str(Path(__file__).parent.parent / "experiments" / "genfl" / "mnist.yaml")
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    assert load_study(tmp_path / "study.yaml", {}).metric == ("final_accuracy", "energy_j")


def test_the_table_names_exactly_what_is_registered() -> None:
    kinds = {"methods": "method", "data sets": "data", "partitioners": "partition", "models": "model"}
    kinds |= {"client samplers": "sampling", "update post-processors": "update"}
    for title, kind in kinds.items():
        (row,) = re.findall(rf"^\| {title} \|(.*)\|$", README, re.MULTILINE)
        assert set(re.findall(r"`(\w+)`", row)) == set(REGISTRY[kind])


def test_files_that_the_readme_names_are_there() -> None:
    root = Path(__file__).parent.parent
    for name in set(re.findall(r"(?:experiments|docs|fl_ray)/[\w/.-]+\.(?:yaml|png|py)", README)):
        assert (root / name).exists(), name
