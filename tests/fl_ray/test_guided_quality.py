"""``fl-ray quality`` of a run whose clients have guided images: a row of each client, against its own classes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from fl_ray.data.parts import FederatedData, prepare
from fl_ray.experiment import Experiment
from fl_ray.image_scores import ImageScores
from tests.conftest import Call
from tests.fl_ray.test_one_shot import GUIDED

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
    monkeypatch.setattr("generators.quality.domain_shift._STEPS", 20)


def test_a_row_of_each_client(run_small: Run, call: Call, tmp_path: Path) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    experiment, _ = run_small(**BLOCKS, tracking__enabled=True, tracking__uri=store)
    folder = str(experiment.folder.path)
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
    tracked = json.loads((experiment.folder / "tracking.json").read_text())["run_id"]
    logged = mlflow.MlflowClient(store).get_run(tracked)
    assert logged.data.metrics["quality/client 1/fid"] == pytest.approx(rows["client 1"]["fid"])
    assert logged.info.status == "FINISHED"
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
    assert (
        "method.images_per_class is 3: KID needs at least 20 images on each side, but has 15; raise it"
        in refused.stderr
    )
    refused = call("quality", str(experiment.folder.path.parent))
    assert refused.returncode == 2
    assert "no finished run" in refused.stderr


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
