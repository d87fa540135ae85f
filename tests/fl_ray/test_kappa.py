"""GenFL's kappas: the policies by hand, what a run makes of them, and that a run that is cut goes on the same."""

import math
from collections.abc import Callable
from pathlib import Path

import mlflow
import numpy as np
import pytest
import torch
from torch import nn

from fl_ray.config import RayConfig, RunConfig, RuntimeConfig
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.data.statistics import emd
from fl_ray.errors import SettingError
from fl_ray.experiment import Experiment
from fl_ray.methods.kappa import kappa_by_accuracy, kappa_by_decay, kappa_by_emd, kappa_by_loss
from fl_ray.model import ImageShape, WeightLayout, build_module
from fl_ray.runtime.ray_backend import RayRuntime
from fl_ray.runtime.start import open_runtime
from tests.fl_ray.test_runs import StopAfter

Run = Callable[..., tuple[Experiment, dict]]
GENFL = {"method__name": "genfl", "with_generator": True, "method__images_per_round": 30, "method__max_images": 60}
POLICIES = {
    "emd": {"method__kappa_policy": "emd", "method__label_sharing": "noisy", "method__epsilon": 0.5},
    "heldout_accuracy": {"method__kappa_policy": "heldout_accuracy", "method__class_choice": "uniform"},
    "heldout_loss": {"method__kappa_policy": "heldout_loss", "method__class_choice": "proportional"},
    "decay": {"method__kappa_policy": "decay", "method__kappa_decay": 0.5, "method__label_sharing": "presence"},
}


def test_emd_by_hand() -> None:
    """Even clients 0; disjoint ones 2 (1 - 1/n); shares weigh them; the cap holds."""
    even, disjoint = emd(np.array([[2, 2], [5, 5]])), emd(np.array([[4, 0, 0], [0, 4, 0], [0, 0, 4]]))
    assert even.tolist() == [0, 0]
    assert disjoint == pytest.approx([4 / 3] * 3)
    assert kappa_by_emd(np.array([0.3, 0.7]), even, 1.0) == 0
    assert kappa_by_emd(np.full(3, 1 / 3), disjoint, 1.0) == pytest.approx(2 / 3)
    assert kappa_by_emd(np.full(3, 1 / 3), disjoint, 0.4) == 0.4
    mixed = emd(np.array([[6, 0], [1, 3]]))  # p_g = (0.7, 0.3): |0.3| twice; |0.25 - 0.7| twice
    assert mixed == pytest.approx([0.6, 0.9])
    assert kappa_by_emd(np.array([0.6, 0.4]), mixed, 1.0) == pytest.approx(0.5 * (0.36 + 0.36))


def test_held_out_and_decay_by_hand() -> None:
    assert kappa_by_accuracy(0.6, 0.2) == pytest.approx(0.25)
    assert kappa_by_accuracy(0.0, 0.0) == 0.5
    assert kappa_by_loss(1.0, 2.0) == pytest.approx(math.exp(-2) / (math.exp(-2) + math.exp(-1)))
    assert kappa_by_loss(3.0, 3.0) == 0.5
    assert kappa_by_loss(1e6, 0.0) == 1.0
    assert [kappa_by_decay(0.8, 0.5, 0.15, t) for t in range(4)] == pytest.approx([0.8, 0.4, 0.2, 0.15])


def test_where_all_clients_seem_alike_emd_is_fedavg_to_the_bit(run_small: Run) -> None:
    """Clients that say only that they have all classes: whatever their counts, the server sees no skew."""
    even = {"data__partition__name": "iid", "data__clients": 4}
    genfl, summary = run_small(
        **GENFL, **even, method__kappa_policy="emd", method__label_sharing="presence", method__kappa2=1.0
    )
    fedavg, _ = run_small(**even)
    assert (genfl.data.counts() > 0).all()
    assert summary["kappa2"] == [0.0, 0.0, 0.0]
    assert (genfl._weights == fedavg._weights).all()


def test_emd_weighs_the_rounds_clients_by_their_samples(run_small: Run) -> None:
    experiment, summary = run_small(**GENFL, method__kappa_policy="emd", clients_per_round=6)
    counts = experiment.data.counts()
    overall, expected = counts.sum(axis=0) / counts.sum(), 0.0
    for own in counts:
        expected += own.sum() / counts.sum() * sum(abs(own[c] / own.sum() - overall[c]) for c in range(10))
    assert summary["kappa2"] == pytest.approx([expected / 2] * 3)
    assert 0.2 < expected / 2 < 0.9
    capped, found = run_small(**GENFL, method__kappa_policy="emd", clients_per_round=6, method__kappa_max=0.1)
    assert found["kappa2"] == [0.1] * 3
    static, _ = run_small(**GENFL, method__kappa2=0.1, clients_per_round=6)
    assert (capped._weights == static._weights).all()


@pytest.mark.parametrize("policy", ["heldout_accuracy", "heldout_loss"])
def test_held_out_policies_test_both_sides_on_the_public_images(run_small: Run, policy: str) -> None:
    """One round against its two ends, tested by a plain module."""
    mixed, summary = run_small(**GENFL, rounds=1, method__kappa_policy=policy)
    clients, _ = run_small(**GENFL, rounds=1, method__kappa2=0.0)
    server, _ = run_small(**GENFL, rounds=1, method__kappa2=1.0)
    config, data = mixed.config, mixed.data
    shape = ImageShape.of(data.source)
    x, y = shape.normalise(data.public_images, torch.device("cpu")), torch.from_numpy(data.public_labels)
    accuracies, losses = [], []
    for end in (clients, server):
        module = build_module(config.model, shape, config.training)
        WeightLayout(module).write(torch.from_numpy(end._weights))
        with torch.no_grad():
            logits = module(x)
        accuracies.append(float((logits.argmax(1) == y).float().mean()))
        losses.append(float(nn.functional.cross_entropy(logits, y)))
    if policy == "heldout_accuracy":
        expected = accuracies[1] / sum(accuracies)
    else:
        expected = math.exp(-losses[1]) / sum(math.exp(-loss) for loss in losses)
    (kappa2,) = summary["kappa2"]
    assert kappa2 == pytest.approx(expected, abs=1e-5)
    assert abs(kappa2 - 0.5) > 1e-3
    assert mixed._weights == pytest.approx((1 - kappa2) * clients._weights + kappa2 * server._weights, abs=1e-6)


def test_the_test_images_decide_nothing(run_small: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = GENFL | POLICIES["heldout_loss"]
    one, found = run_small(**settings)

    def spoilt(*arguments: object) -> FederatedData:
        data = prepare(*arguments)
        data.test_labels = (data.test_labels + 1) % 10
        return data

    monkeypatch.setattr("fl_ray.experiment.prepare", spoilt)
    other, again = run_small(**settings)
    assert again["final_accuracy"] != found["final_accuracy"]
    assert (one._weights == other._weights).all()
    assert again["kappa2"] == found["kappa2"]


def test_decay_falls_and_is_shown_and_tracked(run_small: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    store = f"sqlite:///{tmp_path / 'store.db'}"
    settings = GENFL | POLICIES["decay"] | {"method__kappa2": 0.8, "method__kappa_floor": 0.3}
    experiment, summary = run_small(**settings, tracking__enabled=True, tracking__uri=store, name="falling")
    assert summary["kappa2"] == pytest.approx([0.8, 0.4, 0.3])
    page = (experiment.folder / "report.html").read_text()
    assert "<h2>Kappa</h2>" in page
    assert "0.3 to 0.8, 0.3 in the last round" in page
    assert ", ".join(map(str, summary["synthetic_images"])) in page
    client = mlflow.MlflowClient(store)
    (found,) = client.search_runs([client.get_experiment_by_name("falling").experiment_id])
    tracked = client.get_metric_history(found.info.run_id, "kappa2")
    assert [(metric.step, metric.value) for metric in tracked] == [(t + 1, k) for t, k in enumerate(summary["kappa2"])]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(
    run_small: Run, small: Callable[..., RunConfig], tmp_path: Path, policy: str
) -> None:
    settings = GENFL | POLICIES[policy] | {"rounds": 5, "checkpoint__every": 2}
    whole, summary = run_small(**settings)
    folder = tmp_path / "cut"
    folder.mkdir()
    config = small(**settings)
    with open_runtime(config) as runtime:
        with pytest.raises(KeyboardInterrupt):
            Experiment(config, folder, runtime, StopAfter(3)).run()
        resumed = Experiment(config, folder, runtime, resume=True)
        again = resumed.run()
    assert (resumed._weights == whole._weights).all()
    assert len(set(summary["kappa2"])) > 1
    assert ("label_sharing" in summary) is (policy != "heldout_accuracy")  # whose images are of all classes alike
    assert again.get("label_sharing") == summary.get("label_sharing")
    for name in ("kappa2", "synthetic_images", "bytes_up", "final_accuracy"):
        assert again[name] == summary[name], name


@pytest.mark.parametrize("policy", ["emd", "heldout_loss"])
def test_ray_equals_in_process_to_the_bit(run_small: Run, ray_session: None, policy: str) -> None:
    settings = {**GENFL, **POLICIES[policy], "data__clients": 4}
    local, expected = run_small(**settings)
    with RayRuntime(RuntimeConfig(actors="pooled", num_actors=2), RayConfig()) as runtime:
        found, summary = run_small(runtime, **settings, runtime__backend="ray")
    assert (local._weights == found._weights).all()
    assert summary["kappa2"] == expected["kappa2"]


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"method__kappa_policy": "emd", "method__kappa_max": 0.0}, "kappa_max is 0"),
        ({"method__kappa_policy": "decay", "method__kappa_decay": 1.5}, "kappa_decay is 1.5"),
        ({"method__kappa_policy": "decay", "method__kappa_floor": 0.6}, r"kappa_floor is 0.6.*\[0, 0.5\]"),
        ({"method__label_sharing": "noisy", "method__epsilon": 0.0}, "epsilon is 0"),
        ({"method__kappa1": 0.7}, r"kappa1 \+ kappa2 is 1.2.*; set kappa1 to 0.5 or to null"),
    ],
)
def test_bad_settings_are_refused(run_small: Run, settings: dict, match: str) -> None:
    with pytest.raises(SettingError, match=match):
        run_small(**GENFL, **settings)


def test_held_out_policies_need_public_images(run_small: Run) -> None:
    settings = {"method__name": "genfl", "generator": {"name": "tests.generators.own:UntaughtGenerator"}}
    with pytest.raises(SettingError, match=r"kappa_policy is heldout_loss.*public_fraction is 0"):
        run_small(**settings, data__public_fraction=0.0, method__kappa_policy="heldout_loss")


def test_held_out_policies_do_not_test_on_what_the_augmented_model_trains_on(run_small: Run) -> None:
    given_out = {"name": "real", "part": "public", "block_size": 2}
    settings = {
        "method__name": "genfl",
        "generator": given_out,
        "method__max_images": 10,
        "method__images_per_round": 5,
    }
    settings |= {"method__class_choice": "uniform", "data__public_fraction": 0.2, "rounds": 1}
    with pytest.raises(
        SettingError, match=r"kappa_policy is heldout_loss.*generator.part is public.*take part reserve"
    ):
        run_small(**settings, method__kappa_policy="heldout_loss")
    run_small(**settings)
