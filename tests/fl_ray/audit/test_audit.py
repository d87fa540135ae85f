"""The audit: rates by hand and as scikit-learn counts them, attacks that find what was learned by heart."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn

from fl_ray.audit.inversion import invert
from fl_ray.audit.membership import attack, features, shadow_scores
from fl_ray.audit.run_audit import GLOBAL, audit_run
from fl_ray.errors import OutputError, SettingError
from fl_ray.experiment import Experiment
from fl_ray.finished_run import FinishedRun
from fl_ray.progress import Progress
from fl_ray.runtime.local_training import train_locally
from generators.guidance.losses import ClassifierGuide
from lightning_modules.networks import MLP
from tests.conftest import Call

Run = Callable[..., tuple[Experiment, dict[str, Any]]]


def test_rates_by_hand() -> None:
    found = attack(np.array([3.0, 2.0, 1.0]), np.array([2.0, 0.0]))
    # Above both: 3; 2 ties with one and is above the other; 1 is above one: (1 + 1 + .5 + 1 + 0 + 1) / 6.
    assert found.auc == pytest.approx(4.5 / 6)
    assert found.tpr == pytest.approx(1 / 3)  # only the 3 lies above every other
    assert found.curve.tolist() == [[0, 0], [0, 1 / 3], [0.5, 2 / 3], [0.5, 1], [1, 1]]
    assert (found.members, found.others) == (3, 2)


def test_the_area_is_scikit_learns_with_ties() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 6, 200).astype(float), rng.integers(0, 5, 150).astype(float)
    truth = np.repeat([1, 0], [200, 150])
    assert attack(members, others).auc == pytest.approx(roc_auc_score(truth, np.concatenate([members, others])))
    # The standard error, by drawing again.
    drawn = [
        attack(rng.integers(0, 6, 200).astype(float), rng.integers(0, 5, 150).astype(float)).auc for _ in range(400)
    ]
    assert attack(members, others).auc_error == pytest.approx(np.std(drawn), rel=0.2)


def test_nobody_to_compare_with_is_refused() -> None:
    with pytest.raises(ValueError, match="0 members and 2 others"):
        attack(np.empty(0), np.ones(2))


def by_heart(seed: int, width: int = 64) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """A network that has learned random labels of random images."""
    torch.manual_seed(seed)
    x, y = torch.randn(60, 1, 8, 8), torch.randint(0, 4, (60,))
    network = MLP(1, 8, 4, [width])
    optimiser = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(150):
        optimiser.zero_grad()
        nn.functional.cross_entropy(network(x), y).backward()
        optimiser.step()
    return network, x, y


def test_what_was_learned_by_heart_is_found_by_both_attacks() -> None:
    network, x, y = by_heart(0)
    others = torch.randn(60, 1, 8, 8), torch.randint(0, 4, (60,))
    inside, outside = features(network, x, y), features(network, *others)
    assert attack(inside[:, 0], outside[:, 0]).auc > 0.95
    shadows = []
    for seed in (1, 2):
        shadow, own, labels = by_heart(seed)
        unseen = torch.randn(60, 1, 8, 8), torch.randint(0, 4, (60,))
        shadows.append((features(shadow, own, labels), features(shadow, *unseen)))
    assert attack(*shadow_scores(shadows, inside, outside)).auc > 0.95
    fresh = MLP(1, 8, 4, [64])
    untrained = attack(features(fresh, x, y)[:, 0], features(fresh, *others)[:, 0])
    assert abs(untrained.auc - 0.5) < 4 * untrained.auc_error


def test_features_by_hand() -> None:
    class Logits(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([[2.0, 0.0, 1.0]]).expand(len(x), -1)

    found = features(Logits(), torch.zeros(1, 1, 2, 2), torch.tensor([2]))[0]
    odds = np.exp([2.0, 0.0, 1.0])
    odds /= odds.sum()
    assert found.tolist() == pytest.approx([np.log(odds[2]), -1.0, (odds * np.log(odds)).sum()])


def test_inverted_images_are_taken_for_their_class() -> None:
    network, _, _ = by_heart(0)
    guide = ClassifierGuide(network, 0.0, 8, 1, [0.5], [0.5], "batch")
    labels = np.repeat(np.arange(4), 3)
    images = invert(guide, labels, 40, 0)
    assert images.shape == (12, 1, 8, 8)
    with torch.no_grad():
        taken = network(guide.inputs(torch.from_numpy(images).float() / 255)).argmax(dim=1).numpy()
    assert (taken == labels).mean() > 0.9
    assert np.array_equal(images, invert(guide, labels, 40, 0))


def test_inversion_follows_the_batch_norms() -> None:
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(64, 3))
    for _ in range(60):  # bright images, of little contrast
        network(torch.randn(32, 1, 8, 8) * 0.2 + 1.2)
    labels, found = np.repeat(np.arange(3), 4), {}
    for weight in (0.0, 10.0):
        found[weight] = invert(ClassifierGuide(network, weight, 8, 1, [0.5], [0.25], "batch"), labels, 120, 0)
    x = {weight: (torch.from_numpy(images).float() / 255 - 0.5) / 0.25 for weight, images in found.items()}
    assert x[10.0].mean() == pytest.approx(float(network[0].running_mean), abs=0.15)
    assert abs(x[10.0].mean() - 1.2) < 0.5 * abs(x[0.0].mean() - 1.2)


def test_a_run_is_audited(run_small: Run, tmp_path: Path, call: Call) -> None:
    store = f"sqlite:///{tmp_path / 'store.db'}"
    models = [{"name": "mlp", "hidden": [64]}, {"name": "small_cnn", "width": 2, "hidden": 8, "batch_norm": True}]
    experiment, _ = run_small(
        method__name="fedlmg", with_generator=True, rounds=1, clients_per_round=None, data__clients=3,
        data__partition={"name": "iid"}, training__local_epochs=60, method__client_models=models,
        method__images_per_class=3, method__block_size=3, method__edits=1, method__server__epochs=2,
        tracking__enabled=True, tracking__uri=store,
    )  # fmt: skip
    done = call(
        "audit",
        str(experiment.folder.path),
        "--shadows",
        "1",
        "--inversion_steps",
        "5",
        "--output",
        str(tmp_path / "a"),
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert [model["name"] for model in found["models"]] == ["client 0", "client 1", "client 2", GLOBAL]
    first, last = found["models"][0], found["models"][-1]
    # Sixty epochs on 120 images: its own images stand out; the server's model never saw them.
    assert first["attacks"]["loss threshold"]["auc"] > 0.5 + 2 * first["attacks"]["loss threshold"]["auc_error"]
    assert abs(last["attacks"]["loss threshold"]["auc"] - 0.5) < 4 * last["attacks"]["loss threshold"]["auc_error"]
    for model in found["models"][:-1]:
        assert model["guided"]["compared"] == model["inverted"]["compared"] > 10
        assert 0 <= model["recognised"] <= 1
    assert last["guided"] is last["inverted"] is None
    assert "client 1" in (tmp_path / "a" / "audit.html").read_text()
    tracked = json.loads((experiment.folder / "tracking.json").read_text())["run_id"]
    client = mlflow.MlflowClient(store)
    logged = client.get_run(tracked).data.metrics
    assert logged["audit/client 0/loss threshold/auc"] == pytest.approx(first["attacks"]["loss threshold"]["auc"])
    assert logged["audit/client 1/guided closer"] == pytest.approx(found["models"][1]["guided"]["closer"])
    (experiment.folder / "tracking.json").write_text(json.dumps({"uri": store, "run_id": "0" * 32}))
    words = ["audit", str(experiment.folder.path), "--shadows", "0", "--inversion_steps", "0"]
    again = call(*words, "--output", str(tmp_path / "b"))
    assert again.returncode == 0
    assert "the run in MLflow did not take what was found" in again.stderr + again.stdout


def test_a_final_model_alone_is_audited(run_small: Run) -> None:
    experiment, _ = run_small(data__public_fraction=0.0)
    found = audit_run(FinishedRun.open(experiment.folder.path), 2, 0, 1, Progress(False))
    assert [model.name for model in found.models] == [GLOBAL]
    assert found.models[0].attacks["shadow models"] == "no public images to train shadows on"


def test_shadows_of_the_server_s_model_are_trained_as_long_as_it(
    run_small: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[int, int]] = []  # the size of a batch, and epochs

    def train(*arguments: Any) -> None:
        seen.append((arguments[3].batch_size, arguments[4]))
        train_locally(*arguments)

    monkeypatch.setattr("fl_ray.audit.run_audit.train_locally", train)
    for settings in ({"method": {"name": "centralised", "server_epochs": 4}}, {"training__local_epochs": 2}):
        experiment, _ = run_small(**settings)  # of three rounds
        audit_run(FinishedRun.open(experiment.folder.path), 1, 0, 1, Progress(False))
    assert seen == [(8, 12), (8, 6)]
    seen.clear()
    server = {"epochs": 3, "batch_size": 16}
    experiment, _ = run_small(
        method={"name": "feddf", "server": server}, rounds=1, clients_per_round=None, data__clients=3
    )
    audit_run(FinishedRun.open(experiment.folder.path), 1, 0, 1, Progress(False))
    assert seen == [(8, 1)] * 3 + [(16, 3)]  # three clients, and the server's model
    for method, why in (
        (
            {"name": "dense", "turns": 1, "generator_steps": 1, "student_steps": 1, "server": server},
            "images drawn for it",
        ),
        ({"name": "feddf", "server": {**server, "train": "head"}}, "whose head alone was trained"),
    ):
        experiment, _ = run_small(method=method, rounds=1, clients_per_round=None, data__clients=3)
        found = audit_run(FinishedRun.open(experiment.folder.path), 1, 0, 1, Progress(False))
        assert why in found.models[-1].attacks["shadow models"]


def test_images_are_recognised_by_clients_that_know_their_class_alone(run_small: Run) -> None:
    settings = {"method__name": "ensemble", "rounds": 1, "clients_per_round": None, "data__clients": 5}
    for own, known in ((None, False), (6, True)):
        partition = {"name": "label_blocks", "classes_per_client": own}
        experiment, _ = run_small(**settings, data__partition=partition, training__local_epochs=20)
        found = audit_run(FinishedRun.open(experiment.folder.path), 0, 3, 1, Progress(False))
        assert [model.recognised is not None for model in found.models[:5]] == [known] * 5


def test_what_can_not_be_audited(run_small: Run, tmp_path: Path, call: Call) -> None:
    with pytest.raises(OutputError, match="no finished run"):
        FinishedRun.open(tmp_path)
    experiment, _ = run_small(method__name="local_only", rounds=1)
    with pytest.raises(SettingError, match="leaves no single classifier"):
        audit_run(FinishedRun.open(experiment.folder.path), 1, 0, 1, Progress(False))
    assert "--shadows is -1" in call("audit", str(tmp_path), "--shadows", "-1").stderr
    assert "leave --rounds out" in call("audit", str(tmp_path), "--rounds", "3").stderr
