"""Parameter counts that the papers state, output shapes, and what small images are told."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from lightning_modules.backbones import (
    VGG16,
    MobileNetV2,
    MobileNetV3Small,
    ShuffleNetV2,
    SmallViT,
    TorchvisionClassifier,
)
from lightning_modules.classifier import Classifier, OptimizerSettings
from lightning_modules.exquisite import ExquisiteNetV1, Pointwise
from lightning_modules.networks import MLP, VGG9, Dropout, ResNet18, ResNet34, SmallCNN


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


@pytest.mark.parametrize("training", [True, False])
def test_exquisite_net_is_that_of_delft(training: bool) -> None:
    """Layer by layer by torch's functions: both halves of a block have what came into the block added."""
    torch.manual_seed(0)
    network = ExquisiteNetV1(1, 28, 10, dropout=0.0).double()
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.running_mean, -0.2, 0.2)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    network.train(training)
    state, at = {name: value.clone() for name, value in network.state_dict().items()}, iter(network.state_dict())
    images = torch.rand(6, 1, 28, 28, dtype=torch.float64)

    def take() -> torch.Tensor:
        return state[next(at)]

    def norm(x: torch.Tensor) -> torch.Tensor:
        weight, bias, mean, var = (take() for _ in range(4))
        assert next(at).endswith("num_batches_tracked")
        return functional.batch_norm(x, mean, var, weight, bias, training)

    def half(x: torch.Tensor) -> torch.Tensor:
        x = functional.relu(norm(functional.conv2d(x, take())))
        x = functional.hardswish(functional.conv2d(x, take(), take(), padding=1, groups=x.shape[1]))
        gate = functional.linear(functional.relu(functional.linear(x.mean(dim=(2, 3)), take())), take())
        return x * gate.sigmoid()[:, :, None, None]

    x = images
    for _ in range(5):
        came = norm(functional.conv2d(functional.max_pool2d(x, 2, ceil_mode=True), take()))
        x = half(came) + came
        x = half(x) + came
    x = functional.hardswish(functional.conv2d(x, take(), take())).mean(dim=(2, 3))
    expected = functional.linear(x, take(), take())
    assert torch.allclose(network(images), expected, atol=1e-12)
    assert next(at, None) is None


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_layer_is_a_convolution(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = Pointwise(3, 5, bias).double(), torch.randn(4, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    found, expected = layer(x), nn.functional.conv2d(x, layer.weight, layer.bias)
    assert torch.allclose(found, expected, atol=1e-12)
    wanted = [layer.weight, x]
    for own, other in zip(*(torch.autograd.grad(out.square().sum(), wanted) for out in (found, expected)), strict=True):
        assert torch.allclose(own, other, atol=1e-11)


@pytest.mark.parametrize(("kind", "size"), [(SmallCNN, 3), (VGG9, 7), (ExquisiteNetV1, 1)])
def test_too_small_images_are_refused(kind: type[nn.Module], size: int) -> None:
    with pytest.raises(ValueError, match="image_size"):
        kind(1, size, 10)


@pytest.mark.parametrize(
    "network",
    [
        MobileNetV2(1, 16, 2, width=0.25),
        MobileNetV3Small(1, 16, 2, width=0.25),
        ShuffleNetV2(1, 16, 2, width=0.5),
        VGG16(1, 32, 2, width=8),
        SmallViT(1, 16, 2),
        ResNet34(1, 16, 2, width=4),
        SmallCNN(1, 16, 2, batch_norm=True),
    ],
)
def test_a_client_s_classifier_carries_a_signal(network: nn.Module) -> None:
    """Different images get different logits after a few steps, and the first layer has a gradient: torch's default
    initial weights starve a deep stack without norms.
    """
    torch.manual_seed(0)
    size = 32 if isinstance(network, VGG16) else 16
    x, y = torch.randn(8, 1, size, size), torch.arange(8) % 2
    optimiser = torch.optim.SGD(network.parameters(), 0.02)
    for _ in range(3):
        optimiser.zero_grad()
        logits = network(x)
        torch.nn.functional.cross_entropy(logits, y).backward()
        optimiser.step()
    first = next(part for part in network.modules() if isinstance(part, nn.Conv2d))
    assert logits.std(dim=0).min() > 1e-4
    assert first.weight.grad.norm() > 1e-4


def test_bad_sizes_of_backbones() -> None:
    with pytest.raises(ValueError, match=r"width is 0\.7"):
        ShuffleNetV2(1, 32, 10, width=0.7)
    with pytest.raises(ValueError, match="image_size 8 is below 16"):
        MobileNetV2(1, 8, 10)
    with pytest.raises(ValueError, match=r"patch \(5\) must divide image_size \(32\)"):
        SmallViT(1, 32, 10, patch=5)
    with pytest.raises(ValueError, match="network is resnet19, which is no classifier"):
        TorchvisionClassifier(3, 224, 10, network="resnet19")
    with pytest.raises(ValueError, match="images have 1 channels, but resnet18 takes 3"):
        TorchvisionClassifier(1, 224, 10)
    with pytest.raises(ValueError, match="network is googlenet, which has several heads in training"):
        TorchvisionClassifier(3, 224, 10, network="googlenet")


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


def test_pools_before_relus_change_nothing() -> None:
    """The outputs and gradients of the network as it is written elsewhere, to the bit."""
    ours = SmallCNN(3, 8, 5, width=4, hidden=8)
    layers = list(ours)
    for place in (1, 4):
        assert isinstance(layers[place], nn.MaxPool2d)
        layers[place], layers[place + 1] = layers[place + 1], layers[place]
    usual = nn.Sequential(*layers)
    x = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    gradients = []
    for network in (ours, usual):
        network.zero_grad()
        network(x).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in network.parameters()])
    assert torch.equal(ours(x), usual(x))
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_dropout_keeps_the_mean_and_does_nothing_in_eval_mode() -> None:
    x, layer = torch.ones(200_000), Dropout(0.25)
    torch.manual_seed(0)
    out = layer(x)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(float((out == 0).float().mean()) - 0.25) < 0.005
    assert torch.equal(layer.eval()(x), x)
