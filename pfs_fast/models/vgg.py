"""VGG for 32x32 images: convolutions with batch-norm and one linear classifier, as in "Pruning from Scratch"."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ._blocks import ConvBNAct, check_num_classes, first_width, init_fan_out_

_BASE_WIDTH = 64
# Convolutions of each stage; a 2x2 max-pool stands between two stages.
_STAGE_DEPTHS = {16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
# Width of each stage in multiples of the first width.
_STAGE_FACTORS = (1, 2, 4, 8, 8)


class VGG(nn.Module):
    """CIFAR VGG with batch-norm.

    Args:
        depth: 16 or 19.
        num_classes: Number of classes.
        expansion: Factor on every width; the first convolution has `round(64 * expansion)` channels.

    Raises:
        ConfigError: An argument is out of its range.
    """

    input_size = (3, 32, 32)

    def __init__(self, depth: int, num_classes: int = 10, expansion: float = 1.0) -> None:
        super().__init__()
        if depth not in _STAGE_DEPTHS:
            raise ConfigError(
                f"VGG: depth must be one of {tuple(_STAGE_DEPTHS)}, got {depth!r}; use vgg16() or vgg19()"
            )
        name = f"vgg{depth}"
        check_num_classes(name, num_classes)
        first = first_width(name, _BASE_WIDTH, expansion)
        layers: list[nn.Module] = []
        in_channels = 3
        for stage, (convs, factor) in enumerate(
            zip(_STAGE_DEPTHS[depth], _STAGE_FACTORS, strict=True)
        ):
            if stage > 0:
                layers.append(nn.MaxPool2d(2))
            for _ in range(convs):
                layers.append(ConvBNAct(in_channels, first * factor, 3))
                in_channels = first * factor
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh weights; batch-norm weights start at 0.5, as in the official code."""
        init_fan_out_(self, bn_weight=0.5, linear_std=0.01)

    def paper_gates(self) -> tuple[str, ...]:
        """Names of the convolutions whose outputs the paper gates: all of them."""
        return tuple(
            f"features.{i}.conv" for i, m in enumerate(self.features) if isinstance(m, ConvBNAct)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]; H, W >= 16."""
        x = self.pool(self.features(x))
        return self.classifier(torch.flatten(x, 1))


def vgg16(num_classes: int = 10, expansion: float = 1.0) -> VGG:
    """VGG-16 for 32x32 images: 313.20 M MACs and 14.724 M parameters at 10 classes."""
    return VGG(16, num_classes, expansion)


def vgg19(num_classes: int = 10, expansion: float = 1.0) -> VGG:
    """VGG-19 for 32x32 images: 398.14 M MACs and 20.035 M parameters at 10 classes."""
    return VGG(19, num_classes, expansion)
