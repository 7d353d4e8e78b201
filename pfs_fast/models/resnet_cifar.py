"""ResNets for 32x32 images, with 1x1 convolutions on the shortcuts that change shape, as in "Pruning from Scratch"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ._blocks import check_num_classes, first_width, init_fan_out_

_BASE_WIDTH = 16


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a residual sum; only the width between the two can be pruned alone."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """CIFAR ResNet of depth 6 n + 2.

    Args:
        depth: 20, 32, 44, 56 or 110 (any 6 n + 2 works).
        num_classes: Number of classes.
        expansion: Factor on every width, the residual streams included; the stem has `round(16 * expansion)` channels.

    Raises:
        ConfigError: An argument is out of its range.
    """

    input_size = (3, 32, 32)

    def __init__(self, depth: int, num_classes: int = 10, expansion: float = 1.0) -> None:
        super().__init__()
        if not isinstance(depth, int) or depth < 8 or depth % 6 != 2:
            raise ConfigError(
                f"CifarResNet: depth must be 6 n + 2 with n >= 1, got {depth!r}; use resnet20() to resnet110()"
            )
        name = f"resnet{depth}"
        check_num_classes(name, num_classes)
        width = first_width(name, _BASE_WIDTH, expansion)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.layer1 = _stage(width, width, blocks, stride=1)
        self.layer2 = _stage(width, 2 * width, blocks, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, blocks, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh weights; the classifier starts as PyTorch's default, as in the official code."""
        init_fan_out_(self)

    def paper_gates(self) -> tuple[str, ...]:
        """Names of the convolutions whose outputs the paper gates: the first of every block."""
        return tuple(
            f"{name}.conv1"
            for name, module in self.named_modules()
            if isinstance(module, BasicBlock)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(torch.flatten(self.pool(x), 1))


def _stage(in_channels: int, out_channels: int, blocks: int, stride: int) -> nn.Sequential:
    first = BasicBlock(in_channels, out_channels, stride)
    rest = [BasicBlock(out_channels, out_channels) for _ in range(blocks - 1)]
    return nn.Sequential(first, *rest)


def resnet20(num_classes: int = 10, expansion: float = 1.0) -> CifarResNet:
    """ResNet-20 for 32x32 images: 40.82 M MACs and 0.272 M parameters at 10 classes."""
    return CifarResNet(20, num_classes, expansion)


def resnet32(num_classes: int = 10, expansion: float = 1.0) -> CifarResNet:
    """ResNet-32 for 32x32 images: 69.13 M MACs and 0.467 M parameters at 10 classes."""
    return CifarResNet(32, num_classes, expansion)


def resnet44(num_classes: int = 10, expansion: float = 1.0) -> CifarResNet:
    """ResNet-44 for 32x32 images: 97.44 M MACs and 0.661 M parameters at 10 classes."""
    return CifarResNet(44, num_classes, expansion)


def resnet56(num_classes: int = 10, expansion: float = 1.0) -> CifarResNet:
    """ResNet-56 for 32x32 images: 125.75 M MACs and 0.856 M parameters at 10 classes."""
    return CifarResNet(56, num_classes, expansion)


def resnet110(num_classes: int = 10, expansion: float = 1.0) -> CifarResNet:
    """ResNet-110 for 32x32 images: 253.15 M MACs and 1.731 M parameters at 10 classes."""
    return CifarResNet(110, num_classes, expansion)
