"""Classifiers of FedLMG's clients (arXiv 2311.08870) at the data's size: torchvision's networks without weights.

Torchvision's networks halve an image five times, which leaves one pixel of 32. As is usual for small images, the first
halvings are left out below 128 pixels: what is left is an eighth, so that images of 16 pixels and more will do.
``TorchvisionClassifier`` leaves them as they are, so that weights trained on ImageNet fit.
Constructor arguments are as in ``lightning_modules.networks``.
"""

from __future__ import annotations

from torch import Tensor, nn
from torchvision import models
from torchvision.models import vgg
from torchvision.models.vision_transformer import VisionTransformer

__all__ = ["VGG16", "MobileNetV2", "MobileNetV3Small", "ShuffleNetV2", "SmallViT", "TorchvisionClassifier"]

_SMALL = 128  # pixels below which the first halvings are left out
_LEFT_OUT = 2
_LEAST = 16
_SEVERAL_HEADS = ("googlenet", "inception_v3")


def _check(image_size: int, least: int = _LEAST) -> None:
    if image_size < least:
        raise ValueError(f"image_size {image_size} is below {least}, which its pools need; use small_cnn")


def _adapted(network: nn.Module, in_channels: int, image_size: int) -> nn.Module:
    """For other channels, and with the first strided convolutions at stride 1 where images are small."""
    convolutions = [(name, part) for name, part in network.named_modules() if isinstance(part, nn.Conv2d)]
    name, stem = convolutions[0]
    if in_channels != stem.in_channels:
        changed = nn.Conv2d(
            in_channels, stem.out_channels, stem.kernel_size, stem.stride, stem.padding, bias=stem.bias is not None
        )
        _initialise(changed)
        network.set_submodule(name, changed)
        convolutions[0] = (name, changed)
    if image_size < _SMALL:
        for _, part in [pair for pair in convolutions if pair[1].stride == (2, 2)][:_LEFT_OUT]:
            part.stride = (1, 1)
        for part in network.modules():
            if isinstance(part, nn.BatchNorm2d):  # MobileNetV3's 0.01 is for the long training on ImageNet
                part.momentum = 0.1
    return network


def _initialise(convolution: nn.Conv2d) -> None:
    """As torchvision's networks do; torch's own default starves a deep stack without norms."""
    nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
    if convolution.bias is not None:
        nn.init.zeros_(convolution.bias)


_SHUFFLENET_CHANNELS = {
    0.5: [24, 48, 96, 192, 1024],
    1.0: [24, 116, 232, 464, 1024],
    1.5: [24, 176, 352, 704, 1024],
    2.0: [24, 244, 488, 976, 2048],
}


class _Wrapped(nn.Module):
    """A network under a name of its own, so that its parameters' names do not depend on torchvision's class."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)


class MobileNetV2(_Wrapped):
    """MobileNetV2 (arXiv 1801.04381); ``width`` multiplies its channels. Dropout as torchvision's, 0.2 by default."""

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, width: float = 1.0, dropout: float = 0.2
    ) -> None:
        _check(image_size)
        made = models.mobilenet_v2(num_classes=num_classes, width_mult=width, dropout=dropout)
        super().__init__(_adapted(made, in_channels, image_size))


class MobileNetV3Small(_Wrapped):
    """MobileNetV3-small (arXiv 1905.02244); ``width`` multiplies its channels."""

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, width: float = 1.0, dropout: float = 0.2
    ) -> None:
        _check(image_size)
        made = models.mobilenet_v3_small(num_classes=num_classes, width_mult=width, dropout=dropout)
        super().__init__(_adapted(made, in_channels, image_size))


class ShuffleNetV2(_Wrapped):
    """ShuffleNetV2 (arXiv 1807.11164); ``width`` is one of torchvision's: 0.5, 1.0, 1.5 or 2.0."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int, width: float = 1.0) -> None:
        _check(image_size)
        if width not in _SHUFFLENET_CHANNELS:
            raise ValueError(
                f"model shufflenet_v2: width is {width}, but it must be one of {sorted(_SHUFFLENET_CHANNELS)}"
            )
        made = models.ShuffleNetV2([4, 8, 4], _SHUFFLENET_CHANNELS[width], num_classes)
        made = _adapted(made, in_channels, _SMALL)
        if image_size < _SMALL:  # its halvings behind the stem come in pairs of branches: the stem and its pool go
            made.conv1[0].stride = (1, 1)
            made.maxpool = nn.Identity()
        super().__init__(made)


class VGG16(nn.Sequential):
    """VGG-16 (arXiv 1409.1556) without batch norm, so that FedLMG has cross-entropy alone to guide by.

    The three wide layers of the original belong to 224 pixels; here one hidden layer follows the pooled features, as is
    usual for small images. ``width`` is that of the first stage.
    """

    def __init__(
        self, in_channels: int, image_size: int, num_classes: int, width: int = 64, dropout: float = 0.5
    ) -> None:
        _check(image_size, 32)
        plan = [each if each == "M" else each * width // 64 for each in vgg.cfgs["D"]]
        features = _adapted(vgg.make_layers(plan), in_channels, _SMALL)
        for part in features:
            if isinstance(part, nn.Conv2d):
                _initialise(part)
        super().__init__(
            features,
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8 * width, 8 * width),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(8 * width, num_classes),
        )


class TorchvisionClassifier(_Wrapped):
    """Any of torchvision's classifiers as it is, for RGB images of the size that it was made for (mostly 224 pixels).

    ``network`` is a name of ``torchvision.models.list_models(module=torchvision.models)``, as ``resnet18``; weights
    come from a file (``model.start``), nothing is downloaded.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, network: str = "resnet18") -> None:
        if network not in models.list_models(module=models):
            raise ValueError(f"model torchvision: network is {network}, which is no classifier of torchvision.models")
        if network in _SEVERAL_HEADS:
            raise ValueError(
                f"model torchvision: network is {network}, which has several heads in training; take another"
            )
        if in_channels != 3:
            raise ValueError(
                f"model torchvision: images have {in_channels} channels, but {network} takes 3; use resnet18"
            )
        super().__init__(models.get_model(network, num_classes=num_classes))


class SmallViT(_Wrapped):
    """A vision transformer (arXiv 2010.11929) of a size for small images; no batch norm.

    ``patch`` pixels must divide the image's; ``width`` must be a multiple of ``heads``.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        patch: int = 4,
        width: int = 64,
        layers: int = 4,
        heads: int = 4,
    ) -> None:
        if image_size % patch or width % heads:
            raise ValueError(
                f"model small_vit: patch ({patch}) must divide image_size ({image_size}), and heads ({heads}) must "
                f"divide width ({width})"
            )
        made = VisionTransformer(image_size, patch, layers, heads, width, 2 * width, num_classes=num_classes)
        super().__init__(_adapted(made, in_channels, _SMALL))
