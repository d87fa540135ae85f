"""What clients share of their labels: exact counts, presence and nothing else, or counts under Laplace noise."""

from collections.abc import Callable

import numpy as np
import pytest

from fl_ray.config import Component, DataConfig
from fl_ray.data.label_sharing import SharedLabels, add_laplace
from fl_ray.data.parts import FederatedData, prepare
from fl_ray.experiment import Experiment
from fl_ray.randomness import numpy_generator

Run = Callable[..., tuple[Experiment, dict]]
EVERYBODY = np.arange(8)


@pytest.fixture(scope="module")
def data() -> FederatedData:
    skewed = Component("dirichlet", {"alpha": 0.2, "min_samples": 5})
    return prepare(DataConfig(clients=8, public_fraction=0.2, partition=skewed), seed=0)


def shared(data: FederatedData, level: str, epsilon: float = 1.0, seed: int = 0) -> SharedLabels:
    return SharedLabels(data, level, epsilon, seed)


def test_bytes_by_level(data: FederatedData) -> None:
    assert [shared(data, level).bytes_per_client for level in ("counts", "presence", "noisy")] == [80, 2, 80]


def test_counts_are_the_counts(data: FederatedData) -> None:
    by_hand = [[int((data.labels[data.partition.of(client)] == c).sum()) for c in range(10)] for client in EVERYBODY]
    assert shared(data, "counts").of(EVERYBODY).tolist() == by_hand
    assert shared(data, "counts").overall.tolist() == [sum(column) for column in zip(*by_hand, strict=True)]


def test_presence_tells_no_amount(data: FederatedData) -> None:
    """By hand; and a client that has each of its samples ten times tells the same."""
    found = shared(data, "presence").of(EVERYBODY)
    for client in EVERYBODY:
        own = set(data.labels[data.partition.of(client)].tolist())
        assert found[client].tolist() == [int(label in own) for label in range(10)]
    assert 0 < found.sum() < found.size
    others = shared(data, "presence").overall
    alike = found / found.sum(axis=1, keepdims=True)
    by_hand = np.abs(alike - others / others.sum()).sum(axis=1)
    assert shared(data, "presence").distances(EVERYBODY) == pytest.approx(by_hand)


def test_presence_spreads_sizes_over_the_classes_that_are_there(data: FederatedData) -> None:
    """So the sums that classes are chosen by are in samples, and differ from those of counts."""
    expected = np.zeros(10)
    for client in (2, 5):
        own = data.labels[data.partition.of(client)].tolist()
        for label in set(own):
            expected[label] += len(own) / len(set(own))
    found = shared(data, "presence").total(np.array([5, 2]))
    assert found == pytest.approx(expected, abs=0.5 + 1e-9)
    assert found.sum() == pytest.approx(data.counts(np.array([5, 2])).sum(), abs=5)
    assert (found != shared(data, "counts").total(np.array([5, 2]))).any()


def test_laplace_noise_has_its_mean_and_scale() -> None:
    """Of 2/epsilon = 5: mean 0, mean size 5, standard deviation 5 sqrt(2), and a tail of exp(-3) beyond 15."""
    counts = np.full(10, 1000)
    draws = [add_laplace(counts, 0.4, numpy_generator(0, "label_sharing", client)) - 1000 for client in range(4000)]
    noise = np.stack(draws).astype(float)
    assert noise.mean() == pytest.approx(0, abs=0.15)
    assert np.abs(noise).mean() == pytest.approx(5, rel=0.02)
    assert noise.std() == pytest.approx(5 * 2**0.5, rel=0.02)
    assert (np.abs(noise) > 15.5).mean() == pytest.approx(np.exp(-15.5 / 5), rel=0.1)
    classes = np.corrcoef(noise, rowvar=False) - np.eye(10)
    assert np.abs(classes).max() < 0.06  # each count has noise of its own


def test_noise_is_clipped_and_drawn_once(data: FederatedData) -> None:
    noisy = shared(data, "noisy", epsilon=0.1)
    first = noisy.of(EVERYBODY)
    assert first.min() == 0
    assert (first != data.counts()).any()
    assert (noisy.of(np.array([5, 2])) == first[[5, 2]]).all()  # whoever is asked for with it, and however often
    assert (shared(data, "noisy", 0.1, seed=1).of(EVERYBODY) != first).any()
    # Sums are clipped when they are taken: an absent class adds noise of mean zero, not half its scale.
    keys = [numpy_generator(0, "label_sharing/0.1", client) for client in EVERYBODY]
    raw = np.stack([add_laplace(row, 0.1, rng) for row, rng in zip(data.counts(), keys, strict=True)])
    assert raw.min() < 0
    assert (noisy.overall == np.maximum(0, raw.sum(axis=0))).all()
    assert (noisy.total(np.array([5, 2])) == np.maximum(0, raw[[5, 2]].sum(axis=0))).all()
    near = shared(data, "noisy", epsilon=1e6).of(EVERYBODY)
    assert (near == data.counts()).all()


def test_answers_of_two_budgets_do_not_tell_the_counts(data: FederatedData) -> None:
    """Of the same draws at scales 2/e and 20/e, the counts would be (10 a - b) / 9."""
    once, more = (shared(data, "noisy", epsilon)._told(EVERYBODY) for epsilon in (1.0, 0.1))
    assert (np.rint((10 * once - more) / 9) == data.counts()).mean() < 0.25


def test_a_run_uses_and_reports_what_was_shared(run_small: Run) -> None:
    settings = {"method__name": "genfl", "with_generator": True, "method__images_per_round": 30, "rounds": 1}
    settings |= {"clients_per_round": 6, "method__kappa_policy": "emd"}
    _, plain = run_small()
    exact, told = run_small(**settings)
    noisy, private = run_small(**settings, method__label_sharing="noisy", method__epsilon=0.05)
    _, present = run_small(**settings, method__label_sharing="presence")
    assert told["label_sharing"] == {"level": "counts", "bytes_per_client": 80, "epsilon_spent": None}
    hides = {"hides": "one sample replaced by another; not the size"}
    assert private["label_sharing"] == {"level": "noisy", "bytes_per_client": 80, "epsilon_spent": 0.05} | hides
    assert told["bytes_up"] - present["bytes_up"] == 6 * (80 - 2)
    assert len({str(summary["synthetic_images"]) for summary in (told, private, present)}) == 3
    assert len({summary["kappa2"][0] for summary in (told, private, present)}) == 3
    assert "epsilon 0.05" in (noisy.folder / "report.html").read_text()
    assert "no guarantee of privacy" in (exact.folder / "report.html").read_text()
    assert "label_sharing" not in plain
    _, unasked = run_small(**settings | {"method__kappa_policy": "static"}, method__class_choice="uniform")
    assert "label_sharing" not in unasked
    assert told["bytes_up"] - unasked["bytes_up"] == 6 * 80
