"""DENSE: its losses by hand, a generator that finds what the ensemble knows, a student that learns it without data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from fl_ray.methods.dense import DenseSettings, ImageMaker, divergence, maker_loss
from generators.guidance.losses import ClassifierGuide


class Fixed(nn.Module):
    """The same logits for every image, plus a little of its brightness."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, x: Tensor) -> Tensor:
        return self.logits + 0 * x.mean(dim=(1, 2, 3))[:, None]


def settings(**changes: Any) -> DenseSettings:
    base = {"turns": 1, "generator_steps": 1, "student_steps": 1, "latent": 4, "generator_lr": 1e-3}
    base |= {"norm_weight": 0.0, "adversarial_weight": 0.5}
    return DenseSettings(**{**base, **changes})


def guide(*logits: float) -> ClassifierGuide:
    return ClassifierGuide(Fixed(*logits), 0.0, 4, 1, [0.5], [0.5], "batch")


def test_the_generators_loss_by_hand() -> None:
    images, labels = torch.rand(2, 1, 4, 4), torch.tensor([0, 1])
    guides = [guide(2.0, 0.0), guide(0.0, 1.0)]  # their mean: 1, 0.5
    mean = torch.tensor([[1.0, 0.5]]).expand(2, -1)
    crossed = functional.cross_entropy(mean, labels)
    agrees = maker_loss(images, labels, guides, Fixed(3.0, 0.0), settings())
    torch.testing.assert_close(agrees, crossed)
    differs = maker_loss(images, labels, guides, Fixed(0.0, 3.0), settings())
    odds, other = mean[0].softmax(dim=0), torch.tensor([0.0, 3.0]).softmax(dim=0)
    apart = (odds * (odds / other).log()).sum()
    torch.testing.assert_close(differs, crossed - 0.5 * apart)
    torch.testing.assert_close(divergence(mean, torch.tensor([[0.0, 3.0]]).expand(2, -1)), apart.expand(2))


def test_the_norms_distance_is_that_of_the_batch_and_of_all_clients() -> None:
    classifier = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(16, 2)).eval()
    own = ClassifierGuide(classifier, 1.0, 4, 1, [0.5], [0.5], "batch")
    images, labels = torch.rand(3, 1, 4, 4), torch.tensor([0, 1, 1])
    x = (images - 0.5) / 0.5
    distance = (x.var(correction=0) - 1).abs() + x.mean().abs()
    got = maker_loss(images, labels, [own], classifier, settings(norm_weight=2.0, adversarial_weight=0.0))
    torch.testing.assert_close(got, functional.cross_entropy(classifier(x), labels) + 2 * distance)


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32), (1, 28), (1, 9)])
def test_images_have_the_data_s_size(channels: int, size: int) -> None:
    made = ImageMaker(10, channels, size)(torch.randn(2, 10))
    assert made.shape == (2, channels, size, size)
    assert 0 <= made.min() <= made.max() <= 1


def test_a_student_learns_from_clients_without_any_image(run_small: Callable[..., Any]) -> None:
    common = {"rounds": 1, "clients_per_round": None, "data__clients": 3, "data__partition": {"name": "iid"}}
    own = {"name": "small_cnn", "width": 4, "hidden": 32, "batch_norm": True}
    common |= {"training__local_epochs": 40, "method__client_models": [own]}
    _, teachers = run_small(**common, method__name="ensemble")
    _, student = run_small(
        **common, method__name="dense", method__turns=15, method__server__batch_size=32, method__server__lr=0.05
    )
    assert teachers["final_accuracy"] > 0.8
    assert student["final_accuracy"] > 0.2  # a tenth by chance
    assert student["samples_trained"] - teachers["samples_trained"] == 15 * 20 * 32
    assert np.isfinite(student["final_loss"])
