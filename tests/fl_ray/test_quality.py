"""``fl-ray quality``: a row for each generator and real part, the same for a seed, joined with what runs gained."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
import yaml

from fl_ray.cli import main
from fl_ray.commands.reports import run_folders
from fl_ray.config import RunConfig
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.downstream import gains_of_runs
from fl_ray.errors import SettingError
from fl_ray.image_scores import ImageScores
from fl_ray.model import ImageShape
from fl_ray.progress import Progress
from fl_ray.quality import QualityOptions, measure, plan_quality
from fl_ray.randomness import seeded_torch, torch_generator
from fl_ray.recipes import load_recipe
from fl_ray.report.quality_report import downstream_report
from tests.conftest import TINY_GENERATOR
from tests.synthesis import synthesis_of

RECIPE = {
    "name": "small",
    "data": {"name": "digits", "clients": 4, "public_fraction": 0.3, "max_samples": 800, "partition": "iid"},
    "model": {"name": "mlp", "hidden": [16]},
    "method": {"name": "genfl", "images_per_round": 20, "max_images": 40},
    "generator": TINY_GENERATOR,
    "training": {"lr": 0.1, "batch_size": 8},
    "runtime": {"backend": "in_process", "training_path": "plain"},
    "rounds": 2,
    "targets": [0.2],
    "tracking": {"enabled": False},
    "compare": [
        {"label": "FedAvg", "method.name": "fedavg"},
        {"label": "two steps", "generator.steps": 2},
        {"label": "GenFL"},
        {"label": "less GenFL", "method.kappa1": 0.8, "method.kappa2": 0.2},
        {"label": "barely trained", "generator.train_steps": 3},
    ],
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trainings of seconds cut to moments; threads as before."""
    monkeypatch.setattr("fl_ray.image_scores.EXTRACTOR_STEPS", 60)
    monkeypatch.setattr("fl_ray.image_scores.CAS_EPOCHS", 3)
    monkeypatch.setattr("fl_ray.image_scores.CAS_LEAST_STEPS", 0)
    monkeypatch.setattr("generators.quality.domain_shift._STEPS", 20)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # the command line adds the working folder


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(RECIPE, sort_keys=False))
    return path


def scores(config: RunConfig, per_class: int = 8) -> tuple[ImageScores, FederatedData]:
    data = prepare(config.data, config.seed)
    return ImageScores(config, data, per_class, None, None), data


def test_one_row_of_each_generator_and_the_same_again() -> None:
    configs = plan_quality(RECIPE, {})
    assert list(configs) == ["two steps", "GenFL", "less GenFL", "barely trained"]
    configs.pop("barely trained")
    found, again = (measure(configs, QualityOptions(6), Progress(False)) for _ in range(2))
    assert [row["label"] for row in found.rows] == [
        "two steps",
        "GenFL, less GenFL",
        "real (public)",
        "real (clients)",
    ]
    assert found.rows[1]["labels"] == ["GenFL", "less GenFL"]
    costs = ("training_s", "sampling_s_per_image")
    for row, other in zip(found.rows, again.rows, strict=True):
        assert {k: v for k, v in row.items() if k not in costs} == {k: v for k, v in other.items() if k not in costs}
    two, full, public, clients = found.rows
    assert two["training_s"] == full["training_s"] > 0  # the same weights, and what was noted when they were made
    assert 0 < two["sampling_s_per_image"] < full["sampling_s_per_image"] * 2
    assert two["images"] == full["images"] == public["images"] == clients["images"] == 60
    assert set(two["neighbours"]) == {"public", "clients"}
    assert set(public["neighbours"]) == {"clients"}
    assert set(clients["neighbours"]) == {"public"}
    assert clients["fid"] < full["fid"]
    assert clients["cas"] > full["cas"]


def test_real_images_that_are_copied_are_found(small: Callable[..., RunConfig]) -> None:
    measured, data = scores(small(data__max_samples=1500))
    sets = measured.real_sets()
    copied = measured.of(*sets["public"])
    assert copied["closer_to_public"] == 1.0
    assert copied["neighbours"]["public"]["train_median"] == 0.0
    assert abs(copied["closer_to_clients"] - 0.5) < 0.25
    labels = data.test_labels
    test = measured.of(data.test_images, labels)
    assert test["neighbours"]["public"]["held_out_median"] == 0.0
    assert test["closer_to_public"] < 0.2  # of those test images alone that were cut to have equal counts
    assert test["recall"] == 1.0  # every compared test image is among them


def test_cas_is_training_of_the_recipes_model_on_these_images(small: Callable[..., RunConfig]) -> None:
    """Against a plain loop in the order that the keys give."""
    config = small(training__lr=0.05)
    measured, data = scores(config)
    images, labels = measured.real_sets()["clients"]
    with seeded_torch(config.seed, "quality/cas"):
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 16), torch.nn.ReLU(), torch.nn.Linear(16, 10))
    shape = ImageShape.of(data.source)
    x, y = shape.normalise(images, torch.device("cpu")), torch.from_numpy(labels)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    orders = torch_generator(config.seed, "quality/cas/order", 0, 0)
    for _ in range(3):
        for rows in torch.randperm(len(x), generator=orders).split(8):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(net(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        predicted = net(shape.normalise(data.test_images, torch.device("cpu"))).argmax(dim=1).numpy()
    found = measured.of(images, labels, "clients")
    assert found["cas"] == pytest.approx((predicted == data.test_labels).mean(), abs=1e-9)
    of_class = data.test_labels == 4
    assert found["by_class"]["cas"][4] == pytest.approx((predicted == data.test_labels)[of_class].mean(), abs=1e-9)


def test_parts_that_are_too_small(small: Callable[..., RunConfig]) -> None:
    config = small()
    with pytest.raises(SettingError, match=r"public part holds 0 images.*data.public_fraction, or give --inception"):
        scores(small(data__public_fraction=0.0))
    with pytest.raises(
        SettingError, match=r"test part holds \d images of class.*4 are needed; raise data.test_fraction"
    ):
        scores(small(data__test_fraction=0.03))
    measured, _ = scores(config)
    images, labels = measured.real_sets()["clients"]
    kept = labels != 3
    with pytest.raises(
        SettingError, match=r"--per_class is 8: KID needs at least 3 images.*but class 3 has 0; raise it"
    ):
        measured.of(images[kept], labels[kept])


def test_generators_of_different_data_are_not_put_side_by_side(small: Callable[..., RunConfig]) -> None:
    configs = {"a": small(with_generator=True), "b": small(with_generator=True, data__public_fraction=0.25)}
    with pytest.raises(SettingError, match="'a' and 'b' differ in 'data' as well as in their images"):
        measure(configs, QualityOptions(5), Progress(False))


def test_the_command_and_what_the_images_brought(recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    overrides = ["--generator.lr", "0.002"]
    assert main(["compare", "small.yaml", "--seeds", "0", "1", "--output", "cmp", *overrides]) == 0
    capsys.readouterr()
    words = ["quality", "small.yaml", "--per_class", "5", "--runs", "cmp", *overrides]
    store = f"sqlite:///{tmp_path / 'store.db'}"
    assert main([*words, "--output", "q", "--tracking.enabled", "true", "--tracking.uri", store]) == 0
    said = capsys.readouterr().out
    assert "domain shift" in said
    assert "gain [points]" in said
    assert (tmp_path / "q" / "quality.md").read_text().count("\n") == 2 + 5
    assert (tmp_path / "q" / "quality.csv").read_text().startswith("label,images,fid,kid")
    stored = json.loads((tmp_path / "q" / "quality.json").read_text())
    rows = {row["label"]: row for row in stored["downstream"]["rows"]}
    assert list(rows) == ["FedAvg", "two steps", "GenFL", "less GenFL", "barely trained"]
    for label in ("two steps", "less GenFL"):
        gains = [
            accuracy(tmp_path, label.replace(" ", "_"), seed) - accuracy(tmp_path, "FedAvg", seed) for seed in (0, 1)
        ]
        assert rows[label]["gain_mean"] == pytest.approx(np.mean(gains))
        assert rows[label]["gain_std"] == pytest.approx(np.std(gains, ddof=1))
    assert [rows[label]["group"] for label in rows] == [None, 0, 0, 1, 0]
    assert rows["GenFL"]["fid"] == rows["less GenFL"]["fid"] != rows["two steps"]["fid"]
    ranks = {(entry["group"], entry["measure"], entry["gain"]): entry for entry in stored["downstream"]["spearman"]}
    assert ranks[0, "fid", "gain_mean"]["levels"] == 3
    assert {group for group, *_ in ranks} == {0}  # of one level there are no ranks
    page = (tmp_path / "q" / "quality.html").read_text()
    assert page.count("data:image/png") == 3
    assert "Spearman" in page
    (tmp_path / "few").mkdir()
    few, _ = downstream_report(tmp_path / "few", stored["downstream"]["rows"][:3], [])
    assert "Spearman" not in few + (tmp_path / "few" / "downstream.md").read_text()
    assert "<svg" in (tmp_path / "q" / "figures" / "gain.svg").read_text()
    client = mlflow.MlflowClient(store)
    logged = client.search_runs([client.get_experiment_by_name("small").experiment_id])
    by_label = {run.data.tags["label"]: run for run in logged}
    assert set(by_label) == {"two steps", "GenFL, less GenFL", "barely trained"}
    assert by_label["two steps"].data.metrics["fid"] == pytest.approx(stored["rows"][0]["fid"])
    assert by_label["two steps"].data.params["generator.steps"] == "2"
    assert main([*words, "--output", "q2", "--rounds", "3"]) == 2
    assert "other settings than the recipe's (rounds) for the label 'two steps'" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "cmp" / "runs" / "FedAvg" / "seed1")  # then what is shown is of seed 0 alone, gain or not
    configs = plan_quality(load_recipe(recipe), {"generator.lr": 0.002})
    found, _ = gains_of_runs(configs, run_folders(tmp_path / "cmp"), "cmp")
    assert [row["seeds"] for row in found] == ["0"] * 5
    assert found[1]["gain_mean"] == found[1]["final_accuracy_mean"] - found[0]["final_accuracy_mean"]


def accuracy(folder: Path, label: str, seed: int) -> float:
    return json.loads((folder / "cmp" / "runs" / label / f"seed{seed}" / "summary.json").read_text())["final_accuracy"]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("--per_class", "0"), r"--per_class is 0.*at least 4"),
        (("--generator", "null", "--compare", "[]", "--method.name", "fedavg"), "has no generator.*add a generator"),
        (("--generator", "null"), "needs a generator"),
        (("--inception", "none.pth"), "--inception: none.pth: No such file"),
        (("--inception", "small.yaml"), "--inception: small.yaml can't be read as a file of tensors"),
        (("--runs", "nothing"), "nothing: there is no such folder"),
        (("--runs", "."), r"\.: neither a run's folder nor a comparison's"),
        (("--per_clas", "5"), "Did you mean 'per_class'"),
        (("--generator.steps", "0"), "steps is 0"),
        (("--data.test_fraction", "0.02"), "test part holds"),
    ],
)
def test_bad_input_is_exit_code_2_and_one_clear_message(
    recipe: Path, capsys: pytest.CaptureFixture, words: tuple[str, ...], match: str
) -> None:
    assert main(["quality", "small.yaml", *words]) == 2
    error = capsys.readouterr().err
    assert re.search(match, error), error
    assert error.splitlines()[-1].startswith("fl-ray: ")


def test_a_folder_that_is_no_clip_model_is_refused(recipe: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers", reason="the CLIP score needs transformers, which is not installed")
    assert main(["quality", "small.yaml", "--clip", "."]) == 2
    assert "--clip: . is no folder of a CLIP model" in capsys.readouterr().err


def test_a_recipe_without_a_compare_list_is_measured_by_its_name() -> None:
    alone = {**RECIPE, "compare": []}
    assert list(plan_quality(alone, {})) == ["small"]
    fedavg = plan_quality(alone, {"method.name": "fedavg"})  # it has a generator, though its method has no use for it
    assert fedavg["small"].generator == replace(fedavg["small"].generator)


def test_what_a_generator_costs(small: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = small(with_generator=True, generator__cache=str(tmp_path / "cache"))
    source = synthesis_of(config)
    assert source.seconds_per_image(0) > 0
    report = source.report()
    assert report["images_made"] == 0  # what is made for the clock is neither kept nor counted
    assert not list((tmp_path / "cache").rglob("block_*"))
    assert 0 < source.trained.training_seconds() < report["train_seconds"]
