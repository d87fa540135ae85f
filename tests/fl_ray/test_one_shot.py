"""One-shot methods: what clients of different architectures send, and what the server makes of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional

from fl_ray.config import RunConfig, TrainingConfig
from fl_ray.data.parts import prepare
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.methods.fedlmg import FedLMG, recognised, teachers
from fl_ray.model import ImageShape, WeightLayout, build_module, initial_weights
from fl_ray.recipes import make_component
from fl_ray.replay import replay
from fl_ray.runtime.base import Phases
from fl_ray.runtime.start import open_runtime
from tests.fl_ray.own import Heard

Small = Callable[..., RunConfig]
Run = Callable[..., tuple[Experiment, dict[str, Any]]]
MODELS = [{"name": "mlp", "hidden": [8]}, {"name": "small_cnn", "width": 2, "hidden": 8, "batch_norm": True}]
COMMON = {
    "rounds": 1,
    "clients_per_round": None,
    "data__clients": 3,
    "training__local_epochs": 4,
    "method__client_models": MODELS,
}
GUIDED = {
    **COMMON,
    "method__name": "fedlmg",
    "with_generator": True,
    "method__images_per_class": 3,
    "method__block_size": 3,
    "method__edits": 1,
    "method__server__epochs": 4,
    "method__server__batch_size": 16,
}


def uploaded(experiment: Experiment, client: int) -> torch.nn.Module:
    """A client's classifier as its file has it, built by hand."""
    data = prepare(experiment.config.data, experiment.config.seed)
    own = MODELS[client % 2]
    module = build_module(make_component("model", dict(own)), ImageShape.of(data.source), TrainingConfig())
    module.load_state_dict(load_file(experiment.folder / "uploads" / f"client_{client:04d}.safetensors"))
    return module.eval()


def test_clients_send_their_own_classifiers_and_their_bytes_are_counted(run_small: Run) -> None:
    experiment, summary = run_small(**COMMON, method__name="ensemble")
    sizes = [WeightLayout(uploaded(experiment, client)).size for client in range(3)]
    assert sizes[0] == sizes[2] != sizes[1]
    assert summary["bytes_up"] == 4 * sum(sizes)
    assert summary["bytes_down"] == 0
    state = uploaded(experiment, 1).state_dict()
    moved = [name for name in state if name.endswith("running_mean") and state[name].abs().sum() > 0]
    assert len(moved) == 2  # the statistics travel, and are those of training


def test_the_ensemble_is_the_mean_of_the_clients_probabilities(run_small: Run) -> None:
    experiment, summary = run_small(**COMMON, method__name="ensemble")
    data = prepare(experiment.config.data, experiment.config.seed)
    x = ImageShape.of(data.source).normalise(data.test_images, torch.device("cpu"))
    with torch.no_grad():
        mean = torch.stack([uploaded(experiment, client)(x).softmax(dim=1) for client in range(3)]).mean(dim=0)
    right = (mean.argmax(dim=1).numpy() == data.test_labels).mean()
    assert summary["final_accuracy"] == pytest.approx(right, abs=1e-9)
    assert right > 0.3


def test_the_ensemble_is_tested_at_its_clients(run_small: Run) -> None:
    _, summary = run_small(**COMMON, method__name="ensemble", data__client_test_fraction=0.3)
    assert summary["client_accuracy"]["clients"] == 3
    assert summary["client_accuracy"]["mean"] > 0.3  # an untrained model would be at a tenth


def test_a_client_s_own_model_is_replayed(run_small: Run) -> None:
    experiment, _ = run_small(**COMMON, method__name="ensemble")
    for client in (0, 1):
        (found,) = replay(experiment.folder.path, 1, client)
        start = initial_weights(
            make_component("model", dict(MODELS[client])),
            ImageShape.of(prepare(experiment.config.data, 0).source),
            experiment.config.training,
            0,
        )
        own = WeightLayout(uploaded(experiment, client)).read().numpy()
        np.testing.assert_allclose(found.update, own - start, atol=1e-6)


def test_feddf_distils_the_mean_logits(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from fl_ray.methods.one_shot import FedDF

    seen: dict[str, np.ndarray] = {}
    train = FedDF.train

    def watched(self: FedDF, run: Any, weights: np.ndarray, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        seen.update(images=images, targets=targets)
        return train(self, run, weights, images, targets)

    monkeypatch.setattr(FedDF, "train", watched)
    experiment, _ = run_small(
        **COMMON, method__name="feddf", method__server__lr=0.1, method__server__epochs=60, method__server__batch_size=16
    )
    data = prepare(experiment.config.data, experiment.config.seed)
    assert np.array_equal(seen["images"], data.public_images)
    x = ImageShape.of(data.source).normalise(data.public_images, torch.device("cpu"))
    with torch.no_grad():
        logits = torch.stack([uploaded(experiment, client)(x) for client in range(3)]).mean(dim=0)
    np.testing.assert_allclose(seen["targets"], logits.softmax(dim=1).numpy(), atol=1e-5)
    student = build_module(experiment.config.model, ImageShape.of(data.source), TrainingConfig())
    student.load_state_dict(load_file(experiment.folder / "model.safetensors"))
    with torch.no_grad():
        agree = (student.eval()(x).argmax(dim=1) == logits.argmax(dim=1)).float().mean()
    assert agree > 0.8


def test_one_cross_entropy_against_label_and_teacher_is_the_sum_of_both() -> None:
    torch.manual_seed(0)
    logits, labels, teacher = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1]), torch.randn(5, 3).softmax(dim=1)
    apart = functional.cross_entropy(logits, labels) - (teacher * logits.log_softmax(dim=1)).sum(dim=1).mean()
    together = functional.cross_entropy(logits, functional.one_hot(labels, 3) + teacher)
    torch.testing.assert_close(together, apart)


def test_what_teachers_say_by_hand() -> None:
    said = np.array([[[0.5, 0.3, 0.2]], [[0.1, 0.2, 0.7]]])  # two teachers, one image
    known = np.array([[True, True, False], [True, True, True]])
    assert teachers(said, known, np.array([0]))[0] == pytest.approx([0.625, 0.375, 0])
    assert teachers(said, known, np.array([1]))[0] == pytest.approx([0.1, 0.2, 0.7])
    # The mean over those that know a class: 0.3, 0.25 and the second teacher's 0.7 alone.
    assert teachers(said, known, None)[0] == pytest.approx(np.array([0.3, 0.25, 0.7]) / 1.25)


def test_who_recognises_guided_images_by_hand() -> None:
    right = np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 1]], dtype=bool)  # three clients, four images
    labels, guided_by = np.array([0, 1, 0, 1]), np.array([0, 0, 1, 2])
    known = np.array([[1, 1], [1, 1], [1, 0]], dtype=bool)
    found = recognised(right, labels, guided_by, known, [[0], [0], [1]])
    assert found["own_classifier"] == 3 / 4  # 1, 1, 0, 1
    assert found["other_classifiers"] == 3 / 7  # image 0: 1, 0; 1: 0 (the third knows no class 1); 2: 0, 1; 3: 1, 0
    assert found["other_classifiers_of_the_domain"] == 1 / 3  # image 0: 1; 1: 0; 2: 0; nobody is like the third
    assert recognised(right, labels, guided_by, known, [[0], [1], [2]])["other_classifiers_of_the_domain"] is None
    assert "other_classifiers_of_the_domain" not in recognised(right, labels, guided_by, known, None)


def test_fedlmg_guides_and_a_second_aggregation_finds_the_images_in_the_cache(run_small: Run) -> None:
    _, summary = run_small(**GUIDED, method__aggregation="fine_tune", seed=5)
    made = summary["guided_synthesis"]
    assert sum(summary["synthetic_images"]) == made["images_made"] > 0
    assert made["loss_last"] < made["loss_first"]
    assert 0 <= summary["guided_accuracy"]["own_classifier"] <= 1
    accuracies = {summary["final_accuracy"]}
    for aggregation in ("multi_teacher", "specific_teacher"):
        _, other = run_small(**GUIDED, method__aggregation=aggregation, seed=5)
        assert other["guided_synthesis"]["images_made"] == 0
        assert other["guided_accuracy"] == summary["guided_accuracy"]
        accuracies.add(other["final_accuracy"])
    assert len(accuracies) > 1


def test_a_client_guides_the_classes_that_it_has(run_small: Run) -> None:
    _, summary = run_small(**GUIDED, data__partition__name="label_blocks")
    assert summary["synthetic_images"] == [3] * 10  # each class is one client's


def test_no_teacher_speaks_of_classes_that_it_has_not_seen(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Overlapping label spaces: of a client's image its teacher names the client's classes, all teachers name all."""
    seen: list[np.ndarray] = []
    train = FedLMG.train

    def watched(self: FedLMG, run: Any, weights: np.ndarray, images: np.ndarray, targets: np.ndarray) -> np.ndarray:
        seen.append(targets)
        return train(self, run, weights, images, targets)

    monkeypatch.setattr(FedLMG, "train", watched)
    overlap = {"data__partition": {"name": "label_blocks", "classes_per_client": 5}}
    known = np.array([(np.arange(10) - first) % 10 < 5 for first in (0, 3, 6)])
    labels = np.concatenate([np.repeat(np.flatnonzero(row), 3) for row in known])
    guided_by = np.repeat(np.arange(3), 15)
    for aggregation in ("specific_teacher", "multi_teacher", "fine_tune"):
        _, summary = run_small(**GUIDED, **overlap, method__aggregation=aggregation)
        assert summary["synthetic_images"] == (3 * known.sum(axis=0)).tolist()
    specific, multi, alone = (targets - np.eye(10)[labels] for targets in seen)
    assert (specific[~known[guided_by]] == 0).all()
    assert (specific[known[guided_by]] > 0).all()
    assert (multi > 0).all()
    assert specific.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert multi.sum(axis=1) == pytest.approx(1, abs=1e-5)
    assert not alone.any()


@pytest.mark.parametrize(("weight", "told"), [(0.1, 1), (0.0, 0)])
def test_who_guides_by_cross_entropy_alone_is_told_once(
    small: Small, tmp_path: Path, fresh_clients: Callable[[], None], weight: float, told: int
) -> None:
    fresh_clients()
    heard, config = Heard(), small(**{**GUIDED, "method__norm_weight": weight, "data__clients": 4})
    with open_runtime(config) as runtime:
        Experiment(config, tmp_path, runtime, heard).run()
    said = [text for text in heard.told if "cross-entropy alone" in text]
    assert said == ["without batch norm, and so guiding by cross-entropy alone: mlp"] * told


def test_classes_of_clients_that_were_left_out_are_told(run_small: Run) -> None:
    changes = {"data__partition__name": "label_blocks", "method__client_models": ["tests.fl_ray.own:NanOnNine"]}
    _, summary = run_small(**{**GUIDED, **changes})
    assert summary["classes_of_nobody"] == ["7", "8", "9"]
    assert summary["synthetic_images"] == [3] * 7 + [0] * 3


def test_a_run_cut_at_its_end_keeps_the_uploads(
    small: Small, tmp_path: Path, run_cut_at_its_end: Callable[..., None], fresh_clients: Callable[[], None]
) -> None:
    config = small(**COMMON, method__name="ensemble")
    with open_runtime(config) as runtime:
        run_cut_at_its_end(config, tmp_path / "cut", runtime)
        resumed = Experiment(config, tmp_path / "cut", runtime, resume=True).run()
        fresh_clients()
        (tmp_path / "whole").mkdir()
        whole = Experiment(config, tmp_path / "whole", runtime).run()
    assert resumed["final_accuracy"] == whole["final_accuracy"]
    for client in range(3):
        name = f"uploads/client_{client:04d}.safetensors"
        mine, other = load_file(tmp_path / "cut" / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(mine[key], other[key]) for key in other)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rounds": 2}, "rounds is 2, but method ensemble has one round"),
        ({"clients_per_round": 2}, "clients_per_round is 2"),
        ({"updates": [{"name": "clip", "norm": 1.0}]}, "leave updates out"),
        ({"method__client_models": [{"name": "mlq"}]}, "unknown name 'mlq'"),
        ({"method__client_models": [5]}, "5 is neither a model's name"),
        ({"method__client_models": ["cvae"]}, "cvae is no classifier"),
        (
            {"method__client_models": [{"name": "tests.fl_ray.own:Fixed", "channels": 3}]},
            r"Fixed can't take images of 1 x 8 x 8 \(",
        ),
        ({"method__client_models": [{"name": "tests.fl_ray.own:Fixed", "logits": 3}]}, r"of the shape \[1, 3\]"),
        ({"method__client_models": ["vgg16"]}, "^model vgg16: image_size 8 is below 32.*use small_cnn"),
        (
            {"method__name": "feddf", "model": {"name": "tests.fl_ray.own:Fixed", "channels": 3}},
            r"^model: .*Fixed can't take images of 1 x 8 x 8 \(",
        ),
        ({"method__name": "fedavg"}, "client_models is for the one-shot methods.*can't average different ones"),
        ({"method__name": "feddf", "data__public_fraction": 0.0}, "there are no public images"),
        ({"gradient_cosine_every": 1}, "an ensemble has no weights"),
        ({"runtime__training_path": "batched"}, "models of several kinds"),
        ({"method__name": "feddf", "method__server__lr": 0.0}, r"method\.server\.lr is 0\.0, but it must be positive"),
    ],
)
def test_bad_settings(run_small: Run, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError, match=message):
        run_small(**{**COMMON, "method__name": "ensemble", **changes})


def test_a_generator_without_a_diffusion_model_is_refused(run_small: Run) -> None:
    with pytest.raises(SettingError, match="no diffusion model that classifiers could guide"):
        run_small(**{**GUIDED, "with_generator": False, "generator": {"name": "noise"}})


def test_phases_within_phases_are_counted_once() -> None:
    import time

    phases = Phases()
    with phases.phase("outer"):
        time.sleep(0.02)
        with phases.phase("inner"):
            time.sleep(0.05)
    assert phases.seconds["inner"] == pytest.approx(0.05, abs=0.03)
    assert phases.seconds["outer"] < 0.045


def test_predictions_are_the_same_on_ray(small: Small, ray_session: None, run_small: Run) -> None:
    """The client's own model, wherever it is asked."""
    from fl_ray.config import RayConfig, RuntimeConfig
    from fl_ray.runtime.ray_backend import RayRuntime

    with RayRuntime(RuntimeConfig(actors="pooled", num_actors=2), RayConfig()) as runtime:
        found, summary = run_small(runtime, **COMMON, method__name="ensemble", runtime__backend="ray")
    own, expected = run_small(**COMMON, method__name="ensemble")
    assert summary["final_accuracy"] == expected["final_accuracy"]
    for client in range(3):
        mine, other = uploaded(found, client).state_dict(), uploaded(own, client).state_dict()
        assert all(torch.equal(mine[key], other[key]) for key in other)
