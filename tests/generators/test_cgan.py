"""The conditional GAN as a generator."""

from pathlib import Path

import numpy as np
import pytest
import torch

from generators.base import Block, TrainingImages
from generators.cgan import CGANGenerator


def halves(size: int = 8) -> TrainingImages:
    """Two classes: the upper or the lower half is bright, by a varying amount."""
    labels, rng = np.arange(80) % 2, np.random.default_rng(0)
    pixels = rng.integers(0, 30, (80, 1, size, size))
    bright = rng.integers(120, 220, (80, 1, 1, 1))
    for label, half in enumerate((slice(None, size // 2), slice(size // 2, None))):
        pixels[labels == label, :, half] += bright[labels == label]
    return TrainingImages(pixels.astype(np.uint8), labels, ["up", "down"])


@pytest.mark.parametrize("loss", ["hinge", "bce"])
def test_it_learns_which_class_is_which_and_that_images_vary(loss: str, tmp_path: Path) -> None:
    told: list[int] = []
    generator = CGANGenerator(width=8, noise=8, loss=loss, train_steps=500, batch_size=16, lr=2e-3, block_size=20)
    generator.fit(halves(), tmp_path, lambda step, steps, loss: told.append(step))
    assert told[-1] == 500
    sampler = generator.load(tmp_path, torch.device("cpu"))
    up, down = (sampler.sample(Block(0, label, 0)).astype(float) for label in (0, 1))
    assert up[:, :, :4].mean() - up[:, :, 4:].mean() > 60
    assert down[:, :, 4:].mean() - down[:, :, :4].mean() > 60
    real = halves()
    tones = [bright.mean(axis=(1, 2, 3)).std() for bright in (real.images[real.labels == 0, :, :4], up[:, :, :4])]
    assert tones[1] > 0.3 * tones[0]  # no collapse into one image of each class


def test_training_is_repeatable(tmp_path: Path) -> None:
    generator = CGANGenerator(width=4, train_steps=3, batch_size=4)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        generator.fit(halves(), tmp_path / name, lambda *told: None)
    one, two = ((tmp_path / name / "weights.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("size", [6, 66])
def test_images_of_other_sizes_are_refused(size: int, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{size} pixels.*8 to 64"):
        CGANGenerator().fit(halves(size), tmp_path, lambda *told: None)


@pytest.mark.parametrize("bad", [{"width": 0}, {"noise": 0}, {"train_steps": 0}, {"batch_size": 1}, {"lr": 0.0}])
def test_bad_settings_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CGANGenerator(**bad)
