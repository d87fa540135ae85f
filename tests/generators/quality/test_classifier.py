"""The small classifier learns, repeats itself and leaves torch's generator alone; domain shift and CAS stand on it."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from generators.quality.cas import classification_accuracy
from generators.quality.classifier import SmallClassifier
from generators.quality.domain_shift import domain_shift


def noise(count: int, low: int, high: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(low, high, (count, 1, 8, 8), dtype=np.uint8)


def test_it_learns_and_its_features_tell_the_classes_apart() -> None:
    images, labels = np.concatenate([noise(60, 0, 90, 0), noise(60, 80, 255, 1)]), np.repeat([0, 1], 60)
    before = torch.random.get_rng_state()
    one, two = (SmallClassifier(images, labels, 2, 5, 60) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (one.predict(images) == labels).mean() > 0.95
    features = one.features(images)
    assert features.shape == (120, 64)
    assert (features == two.features(images)).all()
    assert (features != SmallClassifier(images, labels, 2, 6, 60).features(images)).any()
    assert np.sqrt((features**2).mean()) == pytest.approx(1)
    logits = one._scale * features @ one._network[-1].weight.detach().cpu().double().numpy().T
    logits += one._network[-1].bias.detach().cpu().double().numpy()
    assert (logits.argmax(axis=1) == one.predict(images)).all()


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("generators.quality.domain_shift._STEPS", 60)


def test_domain_shift_is_a_half_for_the_same_and_one_for_other_images(few_steps: None) -> None:
    same, error = domain_shift(noise(300, 0, 256, 0), noise(200, 0, 256, 1), 0)
    assert abs(same - 0.5) < 3.5 * error
    assert error == pytest.approx(np.sqrt(same * (1 - same) / 400))
    assert domain_shift(noise(60, 0, 100, 0), noise(60, 156, 256, 1), 0) == (1.0, 0.0)
    with pytest.raises(ValueError, match="has 2"):
        domain_shift(noise(5, 0, 9, 0), noise(2, 0, 9, 1), 0)


def test_memorised_images_do_not_help_it(few_steps: None) -> None:
    """Held-out images alone count: labels drawn at random can't be told, though training images could be learnt."""
    real = noise(150, 0, 256, 3)
    found, error = domain_shift(real[:75], real[75:], 1)
    assert abs(found - 0.5) < 3.5 * error


def test_cas_counts_by_class_against_a_hand_count() -> None:
    seen = {}

    def fit(images: np.ndarray, labels: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
        seen["images"], seen["labels"] = images, labels
        return lambda wanted: np.where(wanted.mean(axis=(1, 2, 3)) < 128, 0, 1)  # two classes only

    synthetic, labels = noise(6, 0, 256, 0), np.array([0, 1, 2, 0, 1, 2])
    real = np.concatenate([noise(4, 0, 50, 1), noise(2, 200, 256, 2), noise(2, 0, 50, 3)])
    accuracy, by_class = classification_accuracy(fit, synthetic, labels, real, np.array([0, 0, 0, 1, 1, 1, 2, 2]), 3)
    assert accuracy == 5 / 8
    assert by_class.tolist() == [1.0, 2 / 3, 0.0]
    assert seen["images"] is synthetic
    with pytest.raises(ValueError, match="class 1 has no synthetic images"):
        classification_accuracy(fit, synthetic, np.array([0, 2, 2, 0, 2, 2]), real, np.arange(8) % 3, 3)
    with pytest.raises(ValueError, match="class 2 has no real images"):
        classification_accuracy(fit, synthetic, labels, real, np.arange(8) % 2, 3)
