"""Image classifiers as plain ``torch.nn`` networks.

Every constructor takes ``in_channels``, ``image_size`` (pixels, square) and ``num_classes``; those three come from the
data set, the rest are settings of a recipe. Inputs are float tensors of shape [N, in_channels, image_size, image_size],
outputs are logits of shape [N, num_classes].

ReLUs stand behind the pools: the largest of rectified values is the rectified largest, to the bit and in the gradient,
and a quarter of the work.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn

__all__ = ["MLP", "VGG9", "DropoutCNN", "ResNet18", "ResNet34", "SmallCNN"]


class Dropout(nn.Dropout):
    """Dropout whose mask comes of uniform numbers: on a CPU that takes half the time of torch's Bernoulli draws."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * torch.rand_like(x).ge_(self.p).mul_(1 / (1 - self.p))


class MLP(nn.Sequential):
    """Fully connected layers with ReLU between; ``hidden`` lists the widths."""

    def __init__(self, in_channels: int, image_size: int, num_classes: int, hidden: list[int] | None = None) -> None:
        widths = [in_channels * image_size**2, *(hidden if hidden is not None else [64])]
        layers: list[nn.Module] = [nn.Flatten()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], num_classes))


class SmallCNN(nn.Sequential):
    """Two 3x3 convolutions, each followed by a 2x2 pool, then one hidden layer: fast enough for two CPU cores.

    ``batch_norm`` puts one behind each convolution.
    """

    def __init__(
        self,
        in_channels: int,
        image_size: int,
        num_classes: int,
        width: int = 16,
        hidden: int = 64,
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        if image_size < 4:
            raise ValueError(f"model small_cnn: image_size {image_size} is below 4, which two 2x2 pools need; use mlp")
        layers: list[nn.Module] = []
        for before, after in ((in_channels, width), (width, 2 * width)):
            layers.append(nn.Conv2d(before, after, 3, padding=1, bias=not batch_norm))
            if batch_norm:
                layers.append(nn.BatchNorm2d(after))
            layers += [nn.MaxPool2d(2), nn.ReLU()]
        layers += [
            nn.Flatten(),
            nn.Linear(2 * width * (image_size // 4) ** 2, hidden),
            nn.ReLU(),
        ]
        if dropout > 0:
            layers.append(Dropout(dropout))
        super().__init__(*layers, nn.Linear(hidden, num_classes))


class DropoutCNN(nn.Sequential):
    """The CIFAR-10 network of pfl-research's benchmarks (after the EMNIST CNN of arXiv 2003.00295).

    Conv 3x3 to 32 and to 64 (no padding), pool, dropout 0.25, 128 hidden, dropout 0.5: 1,626,442 parameters at 3x32x32
    and 10 classes.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int) -> None:
        if image_size < 6:
            raise ValueError(f"model dropout_cnn: image_size {image_size} is below 6, which its two convolutions need")
        super().__init__(
            nn.Conv2d(in_channels, 32, 3),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3),
            nn.MaxPool2d(2),
            nn.ReLU(),
            Dropout(0.25),
            nn.Flatten(),
            nn.Linear(64 * ((image_size - 4) // 2) ** 2, 128),
            nn.ReLU(),
            Dropout(0.5),
            nn.Linear(128, num_classes),
        )


class VGG9(nn.Sequential):
    """VGG-9 of the FIMI setting: conv 32-64-128-128-256-256 (3x3, padded), a pool after each pair, FC 512-512.

    At 32x32 the flattened width is 4096, and the network has 3,491,530 parameters at 10 classes (arXiv 2310.13981 names
    VGG-9; the layer table is the common one of that size). Initial weights are He's: torch's own starve nine layers
    without norms.
    """

    def __init__(self, in_channels: int, image_size: int, num_classes: int, width: int = 32) -> None:
        if image_size < 8:
            raise ValueError(f"model vgg9: image_size {image_size} is below 8, which its three 2x2 pools need")
        pairs = [(width, 2 * width), (4 * width, 4 * width), (8 * width, 8 * width)]
        layers: list[nn.Module] = []
        before = in_channels
        for first, second in pairs:
            layers += [nn.Conv2d(before, first, 3, padding=1), nn.ReLU()]
            layers += [nn.Conv2d(first, second, 3, padding=1), nn.MaxPool2d(2), nn.ReLU()]
            before = second
        flat = before * (image_size // 8) ** 2
        layers += [nn.Flatten(), nn.Linear(flat, 16 * width), nn.ReLU(), nn.Linear(16 * width, 16 * width), nn.ReLU()]
        super().__init__(*layers, nn.Linear(16 * width, num_classes))
        for part in self.modules():
            if isinstance(part, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(part.weight, nonlinearity="relu")
                nn.init.zeros_(part.bias)


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norm and a residual (He et al., arXiv 1512.03385, figure 5 left)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        out = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class _ResNet(nn.Sequential):
    """With the stem for 32x32 images: one 3x3 convolution of stride 1 and no pool."""

    blocks: tuple[int, ...]

    def __init__(self, in_channels: int, image_size: int, num_classes: int, width: int = 64) -> None:
        stages: list[nn.Module] = [
            nn.Conv2d(in_channels, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        ]
        before = width
        for stage, count in enumerate(self.blocks):
            after = width * 2**stage
            for number in range(count):
                stages.append(_BasicBlock(before, after, 2 if stage and not number else 1))
                before = after
        super().__init__(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, num_classes))


class ResNet18(_ResNet):
    """ResNet-18 with the stem for 32x32 images: one 3x3 convolution of stride 1 and no pool.

    11,173,962 parameters at 3 channels and 10 classes. ``width`` is that of the first stage (64 in the paper).
    """

    blocks = (2, 2, 2, 2)


class ResNet34(_ResNet):
    """ResNet-34, likewise: 21,282,122 parameters at 3 channels and 10 classes."""

    blocks = (3, 4, 6, 3)
