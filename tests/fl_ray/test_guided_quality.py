"""``fl-ray quality`` of a run whose clients have guided images: a row of each client, against its own classes."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from PIL import Image

from fl_ray.artifacts import client_grid, columns_of_classes
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.finished_run import FinishedRun
from fl_ray.image_scores import ImageScores
from fl_ray.progress import Progress
from tests.conftest import Call
from tests.fl_ray.test_one_shot import GUIDED
from tests.synthesis import synthesis_of

Run = Callable[..., tuple[Experiment, dict[str, Any]]]

BLOCKS = {
    **GUIDED,
    "method__images_per_class": 5,
    "data__partition": {"name": "label_blocks", "classes_per_client": 5},
    "data__max_samples": 900,
}


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings of seconds cut to moments."""
    monkeypatch.setattr("fl_ray.image_scores.EXTRACTOR_STEPS", 60)
    monkeypatch.setattr("fl_ray.image_scores.CAS_EPOCHS", 3)
    monkeypatch.setattr("fl_ray.image_scores.CAS_LEAST_STEPS", 0)
    monkeypatch.setattr("generators.quality.domain_shift._STEPS", 20)


def test_a_row_of_each_client(run_small: Run, call: Call, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    experiment, _ = run_small(**BLOCKS, tracking__enabled=True, tracking__uri=store)
    folder = str(experiment.folder.path)
    run_id = json.loads((experiment.folder / "tracking.json").read_text())["run_id"]
    tracked = mlflow.MlflowClient(store).get_run(run_id)
    assert (experiment.folder / "samples.png").read_bytes().startswith(b"\x89PNG")
    said = call("quality", folder, "--output", "q")
    assert said.returncode == 0, said.stderr
    stored = json.loads((tmp_path / "q" / "quality.json").read_text())
    rows = {row["label"]: row for row in stored["rows"]}
    clients = [f"client {client}" for client in range(3)]
    assert list(rows) == clients + [f"real, of {name}" for name in clients]
    counts = prepare(experiment.config.data, 0).counts()
    for name, known in zip(clients, (counts > 0).sum(axis=1), strict=True):
        assert rows[name]["images"] == rows[f"real, of {name}"]["images"] == 5 * known
        assert len(rows[name]["by_class"]["cas"]) == known
        assert set(rows[name]["neighbours"]) == {"public", "clients"}
        assert set(rows[f"real, of {name}"]["neighbours"]) == {"public"}
        assert rows[f"real, of {name}"]["fid"] < rows[name]["fid"]  # the tiny generator draws noise
    assert (tmp_path / "q" / "quality.html").read_text().count("data:image/png") == 3
    logged = mlflow.MlflowClient(store).get_run(tracked.info.run_id)
    assert logged.data.metrics["quality/client 1/fid"] == pytest.approx(rows["client 1"]["fid"])
    assert logged.data.metrics["quality/client 1 real/cas"] == pytest.approx(rows["real, of client 1"]["cas"])
    assert (logged.info.status, logged.info.end_time) == ("FINISHED", tracked.info.end_time)
    assert "made again" not in said.stderr
    for words, why in {
        ("--per_class", "9"): "leave --per_class out",
        ("--runs", "."): "leave --runs out",
        ("--rounds", "2"): "leave --rounds out",
    }.items():
        refused = call("quality", folder, *words)
        assert refused.returncode == 2
        assert why in refused.stderr


def test_runs_without_guided_images_are_refused(run_small: Run, call: Call) -> None:
    experiment, _ = run_small()
    refused = call("quality", str(experiment.folder.path))
    assert refused.returncode == 2
    assert "method fedavg has no images that clients have guided" in refused.stderr
    experiment, _ = run_small(**BLOCKS | {"method__images_per_class": 3})
    refused = call("quality", str(experiment.folder.path))
    assert refused.returncode == 2
    assert "method.images_per_class is 3: class 0 has 3 images, but precision and recall" in refused.stderr
    refused = call("quality", str(experiment.folder.path.parent))
    assert refused.returncode == 2
    assert "no finished run" in refused.stderr
    assert not list((Path.cwd() / "runs").glob("*"))  # what is refused leaves no folder


def test_an_image_does_not_depend_on_who_else_came_in(run_small: Run, capsys: pytest.CaptureFixture) -> None:
    experiment, _ = run_small(**BLOCKS)
    run = FinishedRun.open(experiment.folder.path)
    uploads = run.uploads()
    everyone = run.guided_images(uploads, Progress(False))
    del uploads[0]
    others = run.guided_images(uploads, Progress())
    assert list(others) == [1, 2]
    for client, (images, labels) in others.items():
        assert np.array_equal(images, everyone[client][0])
        assert np.array_equal(labels, everyone[client][1])
    assert "made again" not in capsys.readouterr().err  # found in the cache, under their own client's classifier


def test_another_generator_than_the_run_s_is_refused_and_missing_images_are_told(
    run_small: Run, fresh_clients: Callable[[], None], call: Call
) -> None:
    experiment, summary = run_small(**BLOCKS)
    for kept in Path(os.environ["FL_RAY_CACHE"]).glob("generators/*/images-*"):
        shutil.rmtree(kept)
    again = call("quality", str(experiment.folder.path), "--output", "again")
    assert again.returncode == 0
    made = summary["guided_synthesis"]["images_made"]
    assert f"{made} of the guided images were not in the cache and have been made again" in again.stderr
    summary["synthesis"]["key"] = "another"
    (experiment.folder / "summary.json").write_text(json.dumps(summary))
    refused = call("quality", str(experiment.folder.path))
    assert refused.returncode == 2
    assert "the generator is not the run's (key another then" in refused.stderr


def test_a_client_with_too_few_images_of_its_own_has_no_row_of_them(run_small: Run, call: Call, tmp_path: Path) -> None:
    partition = {"name": "dirichlet", "alpha": 0.3, "min_samples": 3}
    experiment, _ = run_small(**BLOCKS | {"data__partition": partition})
    counts = prepare(experiment.config.data, 0).counts()
    few = np.where(counts > 0, counts, 99).min(axis=1) < 4
    assert few.any()
    said = call("quality", str(experiment.folder.path), "--output", "q")
    assert said.returncode == 0, said.stderr
    labels = [row["label"] for row in json.loads((tmp_path / "q" / "quality.json").read_text())["rows"]]
    assert labels == [f"client {k}" for k in range(3)] + [f"real, of client {k}" for k in np.flatnonzero(~few)]
    for client in np.flatnonzero(few):
        assert f"client {client} has too few images of its own of some class" in said.stderr


def test_a_clients_measures_are_of_its_domains(tmp_path: Path, small: Callable[..., Any]) -> None:
    """Two domains that nobody takes for the other: dark and bright images."""
    rng = np.random.default_rng(0)
    for domain, level in (("day", 200), ("night", 50)):
        for label in ("a", "b"):
            folder = tmp_path / "set" / domain / label
            folder.mkdir(parents=True)
            for image in range(40):
                noise = rng.integers(-40, 40, (8, 8, 3)) + level + (15 if label == "a" else 0)
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{image}.png")
    data_settings = {
        "name": "image_folder", "root": str(tmp_path), "path": "set", "image_size": 8, "clients": 2,
        "public_fraction": 0.5, "partition": {"name": "domain"},
    }  # fmt: skip
    config = small(data=data_settings, clients_per_round=2)
    data = prepare(config.data, 0)
    scores = ImageScores(config, data, 8, None, None)
    for client in (0, 1):
        images, labels = data.images[data.partition.of(client)], data.labels[data.partition.of(client)]
        own, other = scores.of_client(client).of(images, labels), scores.of_client(1 - client).of(images, labels)
        assert own["fid"] < other["fid"] / 5
        assert own["domain_shift"] < 0.8 < other["domain_shift"]
        like = data.test_domains == client
        copied = scores.of_client(client).of(data.test_images[like], data.test_labels[like])
        assert copied["recall"] == 1.0  # against all of its own domain's test images
    few = data.test_domains != 1
    few[np.flatnonzero(data.test_domains == 1)[:2]] = True  # two test images of night are left
    scarce = replace(
        data, test_images=data.test_images[few], test_labels=data.test_labels[few], test_domains=data.test_domains[few]
    )
    with pytest.raises(SettingError, match=r"the test part of client 1, night's domains holds \d images of class"):
        ImageScores(config, scarce, 8, None, None).of_client(1)


def test_images_of_a_run_on_ray_are_looked_for_where_its_actors_made_them(
    small: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a machine with a GPU: actors without one have sampled on the CPU."""
    config = small(with_generator=True)
    data = prepare(config.data, 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    on_ray = synthesis_of(config, on_ray=True, data=data)
    here = synthesis_of(config, data=data)
    again = synthesis_of(config, device="cpu", data=data)
    assert (on_ray.sampled_on, here.sampled_on) == ("cpu", "cuda")
    assert again.keys() == on_ray.keys() != here.keys()


def tiles(picture: bytes) -> tuple[np.ndarray, np.ndarray]:
    """The halves of a PNG, grey, without what is white, and the greys of text and edges."""
    grey = np.array(Image.open(io.BytesIO(picture)).convert("L"))
    half = grey.shape[1] // 2
    return grey[:, :half], grey[:, half:]


def is_grey(picture: np.ndarray, grey: int) -> np.ndarray:
    """Whether a pixel has this grey, as matplotlib's colour map rounds it."""
    return np.abs(picture.astype(int) - grey) <= 1


def test_a_grid_shows_the_classes_that_are_asked_for_real_ones_on_the_left() -> None:
    labels = np.repeat(np.arange(60), 8)
    real, made = (np.full((480, 1, 8, 8), grey, dtype=np.uint8) for grey in (60, 180))
    made[labels < 50] = 255
    names = [f"class {label}" for label in range(60)]
    picture = columns_of_classes(names, range(50, 60), (real, labels), (made, labels), of="real")
    left, right = tiles(picture)
    assert is_grey(left, 60).mean() > 0.3 > 0.001 > is_grey(left, 180).mean()  # text has all greys
    assert is_grey(right, 180).mean() > 0.3 > 0.001 > is_grey(right, 60).mean()


def test_a_grid_of_clients_has_a_row_for_each(small: Callable[..., Any]) -> None:
    data: FederatedData = prepare(small(data__clients=3, data__partition={"name": "label_blocks"}).data, 0)
    made = {}
    for client, grey in enumerate((60, 120, 180)):
        known = np.unique(data.labels[data.partition.of(client)])
        made[client] = np.full((len(known), *data.images.shape[1:]), grey, dtype=np.uint8), known
    left, right = tiles(client_grid(data, made))
    rows = [np.flatnonzero(is_grey(right, grey).sum(axis=1) > 20) for grey in (60, 120, 180)]
    assert rows[0].max() < rows[1].min() <= rows[1].max() < rows[2].min()
    wide = [is_grey(right[own], grey).sum() for grey, own in zip((60, 120, 180), rows, strict=True)]
    counts = (data.counts() > 0).sum(axis=1)
    assert np.array(wide) / wide[0] == pytest.approx(counts / counts[0], rel=0.1)
    assert len(np.unique(left[rows[0]])) > 8  # digits


def test_a_clients_measures_are_of_its_classes_and_its_images(small: Callable[..., Any]) -> None:
    config = small(data__partition={"name": "label_blocks", "classes_per_client": 4}, data__max_samples=900)
    data: FederatedData = prepare(config.data, 0)
    scores = ImageScores(config, data, 8, None, None)
    own = data.partition.of(3)
    known = np.unique(data.labels[own])
    assert 0 < len(known) < 10
    of_client = scores.of_client(3)
    copied = of_client.of(data.images[own], data.labels[own])
    assert copied["closer_to_clients"] > 0.5
    assert copied["neighbours"]["clients"]["train_p05"] == 0.0
    like = np.isin(data.test_labels, known)
    tests = of_client.of(data.test_images[like], data.test_labels[like])
    assert tests["recall"] == 1.0  # every compared test image is among them
    assert len(tests["by_class"]["cas"]) == len(known)
    everything = scores.of(data.test_images, data.test_labels)
    assert len(everything["by_class"]["cas"]) == 10  # the client's view is a copy
