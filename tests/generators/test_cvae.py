"""The CVAE as a generator: what it learns, its sampling by hand, the settings of its two kinds of training."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from generators.base import Block, TrainingImages, block_seed
from generators.cvae import CVAEGenerator
from lightning_modules.cvae import CVAE


@pytest.fixture(scope="module")
def images() -> TrainingImages:
    """Two classes of 8x8 images: the upper or the lower half is bright."""
    labels = np.arange(60) % 2
    pixels = np.random.default_rng(0).integers(0, 80, (60, 1, 8, 8))
    pixels[labels == 0, :, :4] += 175
    pixels[labels == 1, :, 4:] += 175
    return TrainingImages(pixels.astype(np.uint8), labels, ["up", "down"])


def fitted(images: TrainingImages, folder: Path, **settings: object) -> CVAEGenerator:
    folder.mkdir()
    generator = CVAEGenerator(hidden=[32], lr=1e-2, batch_size=20, block_size=6, **settings)
    generator.fit(images, folder, lambda step, steps, loss: None)
    return generator


def test_it_learns_which_class_is_which(images: TrainingImages, tmp_path: Path) -> None:
    sampler = fitted(images, tmp_path / "made", epochs=40).load(tmp_path / "made", torch.device("cpu"))
    up, down = (sampler.sample(Block(0, label, 0)) for label in (0, 1))
    assert set(np.unique(up)) <= {0, 255}  # rounded
    assert up[:, :, :4].mean() > 200 > 50 > up[:, :, 4:].mean()
    assert down[:, :, 4:].mean() > 200 > 50 > down[:, :, :4].mean()


@pytest.mark.parametrize("binarise", [True, False])
def test_images_are_decoded_and_where_so_set_scaled_to_a_maximum_of_one_and_rounded(
    images: TrainingImages, tmp_path: Path, binarise: bool
) -> None:
    generator = fitted(images, tmp_path / "made", train_steps=30, binarise=binarise, latent=2)
    found = generator.load(tmp_path / "made", torch.device("cpu")).sample(Block(4, 1, 2))
    module = CVAE(1, 8, 2, hidden=[32], latent=2, binarise=binarise)
    module.load_state_dict(load_file(tmp_path / "made" / "weights.safetensors"))
    z = torch.randn((6, 2), generator=torch.Generator().manual_seed(block_seed(Block(4, 1, 2))))
    with torch.no_grad():
        made = module.decoder(torch.cat([z, torch.tensor([[0.0, 1.0]]).expand(6, 2)], dim=1)).view(6, 1, 8, 8)
    for image, expected in zip(found, made.numpy(), strict=True):
        wanted = 255 * np.round(expected / expected.max()) if binarise else np.round(255 * expected)
        assert (image == wanted).all()
    assert (len(np.unique(found)) > 2) is not binarise


def test_central_training_is_repeatable_and_its_length_is_as_set(images: TrainingImages, tmp_path: Path) -> None:
    told: list[int] = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        generator = CVAEGenerator(hidden=[8], epochs=3, batch_size=16)
        generator.fit(images, tmp_path / name, lambda step, steps, loss: told.append(steps))
    assert set(told) == {3 * 4}  # 60 images are four batches of 16
    one, two = (load_file(tmp_path / name / "weights.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_settings_of_the_other_training_change_no_key() -> None:
    central, federated = CVAEGenerator(), CVAEGenerator(training="federated")
    assert CVAEGenerator(rounds=3).training_settings() == central.training_settings()
    assert CVAEGenerator(training="federated", train_seed=3).training_settings() == federated.training_settings()
    assert CVAEGenerator(training="federated", rounds=3).training_settings() != federated.training_settings()
    assert central.federated() is None
    spec = federated.federated()
    assert (spec.rounds, spec.local_epochs, spec.batch_size, spec.optimizer, spec.lr) == (20, 2, 32, "adam", 1e-3)


@pytest.mark.parametrize(
    ("bad", "match"),
    [
        ({"latent": 0}, "latent is 0"),
        ({"hidden": []}, "hidden"),
        ({"hidden": [8, 0]}, "hidden"),
        ({"rounds": 0}, "rounds is 0"),
        ({"sample_fraction": 0.0}, "sample_fraction"),
        ({"epochs": 2, "train_steps": 5}, "one of them"),
        ({"training": "federated", "epochs": 5}, "federated, but epochs is 5, which .* rounds and local_epochs"),
        ({"training": "federated", "train_steps": 5}, "federated, but train_steps is 5, which .* training to central"),
    ],
)
def test_bad_settings_are_refused(bad: dict, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CVAEGenerator(**bad)
