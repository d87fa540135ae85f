"""Parameter counts that the papers state, output shapes, and what small images are told."""

import pytest
import torch
from torch import nn

from lightning_modules.classifier import Classifier, OptimizerSettings
from lightning_modules.exquisite import ExquisiteNetV1
from lightning_modules.networks import MLP, VGG9, ResNet18, SmallCNN


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (VGG9(3, 32, 10), 3_491_530),
        (VGG9(3, 32, 43), 3_508_459),
        (ExquisiteNetV1(1, 28, 10), 927_254),
        (ResNet18(3, 32, 10), 11_173_962),
        (MLP(1, 8, 10, [64]), 64 * 64 + 64 + 64 * 10 + 10),
        (SmallCNN(1, 8, 10, width=4, hidden=8), (9 * 4 + 4) + (4 * 9 * 8 + 8) + (8 * 4 * 8 + 8) + (8 * 10 + 10)),
    ],
)
def test_parameter_count(network: nn.Module, expected: int) -> None:
    assert count(network) == expected


@pytest.mark.parametrize("kind", [MLP, SmallCNN, VGG9, ResNet18, ExquisiteNetV1])
@pytest.mark.parametrize(("channels", "size"), [(1, 8), (3, 32)])
def test_output_shape(kind: type[nn.Module], channels: int, size: int) -> None:
    assert kind(channels, size, 7).eval()(torch.zeros(2, channels, size, size)).shape == (2, 7)


@pytest.mark.parametrize(("kind", "size"), [(SmallCNN, 3), (VGG9, 7), (ExquisiteNetV1, 1)])
def test_too_small_images_are_refused(kind: type[nn.Module], size: int) -> None:
    with pytest.raises(ValueError, match="image_size"):
        kind(1, size, 10)


@pytest.mark.parametrize(("name", "kind"), [("sgd", "SGD"), ("adam", "Adam"), ("adamw", "AdamW")])
def test_classifier_makes_the_optimizer_that_it_is_told(name: str, kind: str) -> None:
    module = Classifier(MLP(1, 4, 3), OptimizerSettings(name, lr=0.25, momentum=0.5, weight_decay=0.125))
    optimizer = module.configure_optimizers()
    assert type(optimizer).__name__ == kind
    assert optimizer.param_groups[0]["lr"] == 0.25
    assert optimizer.param_groups[0]["weight_decay"] == 0.125


def test_classifier_loss_is_the_mean_cross_entropy() -> None:
    module = Classifier(MLP(1, 4, 3))
    x, y = torch.randn(5, 1, 4, 4), torch.tensor([0, 1, 2, 1, 0])
    expected = -torch.log_softmax(module(x), dim=1)[torch.arange(5), y].mean()
    assert torch.allclose(module.training_step((x, y), 0), expected)
