"""Settings: defaults, overrides, types, names that are nearly right, and that a resolved recipe is a recipe."""

from pathlib import Path

import pytest
import yaml

from fl_ray.config import Component
from fl_ray.errors import SettingError
from fl_ray.recipes import apply_overrides, build, compare_entries, load_recipe, make_config, to_dict
from fl_ray.registry import BASES

EXPERIMENTS = Path(__file__).parent.parent.parent / "experiments"
# Studies of recipes have tests of their own (studies/test_study_files.py).
# One folder down; below that are results.
RECIPES = [path for path in sorted(EXPERIMENTS.glob("*/*.yaml")) if path.parent.name != "tuning"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_recipe_parses_with_all_its_comparisons(path: Path) -> None:
    recipe = load_recipe(path)
    config = make_config(recipe)
    assert make_config(to_dict(config)) == config
    for label, changes in compare_entries(recipe):
        assert make_config(apply_overrides(recipe, changes)), label


def test_a_resolved_recipe_survives_yaml() -> None:
    config = make_config({"fleet": {"tiers": [{"name": "a", "frequency_hz": [1e9, 2e9]}]}, "generator": "diffusion"})
    assert make_config(yaml.safe_load(yaml.safe_dump(to_dict(config)))) == config


def test_checking_a_recipe_leaves_it_as_it_is() -> None:
    recipe = {"fleet": {"tiers": [{"name": "a"}]}, "data": {"partition": {"name": "iid"}}}
    before = yaml.safe_dump(recipe)
    make_config(recipe)
    assert yaml.safe_dump(recipe) == before


def test_overrides_reach_every_depth_and_names_start_afresh() -> None:
    recipe = {"data": {"partition": {"name": "dirichlet", "alpha": 0.3, "min_samples": 2}}, "method": {"name": "genfl"}}
    changed = apply_overrides(recipe, {"data.partition.alpha": 0.1, "method.kappa1": 1, "method.kappa2": 0})
    assert make_config(changed).data.partition.settings == {"alpha": 0.1, "min_samples": 2}
    assert make_config(changed).method.settings["kappa2"] == 0
    other = make_config(apply_overrides(changed, {"method.name": "fedavg", "data.partition.name": "iid"}))
    assert other.method.name == "fedavg"
    assert other.data.partition.settings == {"min_samples": 2}
    assert recipe["data"]["partition"]["alpha"] == 0.3  # the recipe itself stays


def test_text_from_the_command_line_becomes_the_right_type() -> None:
    config = make_config({"training": {"lr": "1e-3"}, "rounds": "7", "data": {"download": "true"}})
    assert (config.training.lr, config.rounds, config.data.download) == (1e-3, 7, True)


@pytest.mark.parametrize(
    ("recipe", "match"),
    [
        ({"dta": {}}, "Did you mean 'data'"),
        ({"data": {"clents": 3}}, "Did you mean 'clients'"),
        ({"data": {"partition": {"name": "dirichlet", "alpa": 1}}}, "Did you mean 'alpha'"),
        ({"data": {"partition": {"name": "dirichelt"}}}, "Did you mean 'dirichlet'"),
        ({"method": {"name": "fedavgg"}}, "Did you mean 'fedavg'"),
        ({"method": {"name": "genfl", "kapa1": 1}}, "Did you mean 'kappa1'"),
        ({"method": {"name": "feddf", "server": {"step": 1}}}, "^method: unknown setting 'server.step'; --print"),
        ({"method": {"name": "feddf", "server": {"epochs": "few"}}}, "^method.server.epochs is few, .* of type int"),
        ({"model": {"name": "vgg"}}, "Did you mean 'vgg9'"),
        ({"model": {"name": "no.such:Thing"}}, "can't import no.such"),
        ({"model": {"name": "torch:NoSuchThing"}}, "has no 'NoSuchThing'"),
        ({"data": {"name": "digit"}}, "Did you mean 'digits'"),
        ({"training": {"lr": "fast"}}, "training.lr"),
        ({"training": {"lr": 0}}, "training.lr is 0"),
        ({"training": {"optimiser": "sgd"}}, "Did you mean 'optimizer'"),
        ({"rounds": 0}, "rounds is 0"),
        ({"rounds": 1.5}, "rounds"),
        ({"clients_per_round": 11}, r"clients_per_round is 11.*1\.\.10"),
        ({"targets": [1.5]}, "targets"),
        ({"fleet": {"tiers": [{"cpu": 1}]}}, "Did you mean 'cpus'"),
        ({"fleet": {"tiers": [{"frequency_hz": [2e9, 1e9]}]}}, "frequency_hz"),
        ({"generator": {"name": "diffusion", "pool": {"actor": 1}}}, "Did you mean 'actors'"),
        ({"compare": [{"method.name": "fedavg"}]}, "label"),
        ({"compare": [{"label": "a"}, {"label": "a"}]}, "twice"),
        ({"data": 3}, "data is 3"),
    ],
)
def test_bad_settings_are_named_with_the_way_out(recipe: dict, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        make_config(recipe)


def test_an_override_reaches_an_item_of_a_list() -> None:
    recipe = {"fleet": {"tiers": [{"name": "a", "cpus": 1}, {"name": "b", "cpus": 1}]}}
    assert make_config(apply_overrides(recipe, {"fleet.tiers.1.cpus": 0.5})).fleet.tiers[1].cpus == 0.5
    for key in ("fleet.tiers.2.cpus", "fleet.tiers.x"):
        with pytest.raises(SettingError, match=r"fleet\.tiers"):
            apply_overrides(recipe, {key: 1})


@pytest.mark.parametrize("kind", sorted(BASES))
def test_a_class_of_ones_own_is_derived_from_its_base(kind: str) -> None:
    with pytest.raises(SettingError, match=r"os.path:join: it is no [a-z_.]+\.[A-Za-z]+; derive it"):
        build(kind, Component("os.path:join"))
    with pytest.raises(SettingError, match=r"fractions:Fraction: it is no [a-z_.]+\.[A-Za-z]+; derive it"):
        build(kind, Component("fractions:Fraction", {"numerator": 1}))


def test_an_override_into_a_value_is_refused() -> None:
    with pytest.raises(SettingError, match="rounds is 3"):
        apply_overrides({"rounds": 3}, {"rounds.x": 1})


@pytest.mark.parametrize(
    ("text", "match"), [("a: [", "not YAML"), ("- 1", "mapping"), ("", "mapping"), (b"\xff\xfe", "UTF-8")]
)
def test_files_that_are_no_recipes(tmp_path: Path, text: str | bytes, match: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(SettingError, match=match):
        load_recipe(path)
    with pytest.raises(SettingError, match="No such file"):
        load_recipe(tmp_path / "none.yaml")


def test_a_recipe_extends_another(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "name: base\ndata: {name: digits, clients: 4}\nmethod: {name: fedprox, mu: 0.5}\nrounds: 3\n"
        "compare: [{label: a}]\n"
    )
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "own.yaml").write_text(
        "extends: ../base.yaml\nname: own\nmethod: {mu: 0.1}\ncompare: [{label: b, rounds: 2}]\n"
    )
    found = load_recipe(tmp_path / "deep" / "own.yaml")
    assert found == {
        "name": "own",
        "data": {"name": "digits", "clients": 4},
        "method": {"name": "fedprox", "mu": 0.1},
        "rounds": 3,
        "compare": [{"label": "b", "rounds": 2}],
    }
    (tmp_path / "lost.yaml").write_text("extends: nowhere.yaml\n")
    with pytest.raises(SettingError, match=r"nowhere\.yaml: No such file"):
        load_recipe(tmp_path / "lost.yaml")
