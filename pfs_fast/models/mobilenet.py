"""MobileNet V1 and V2 for ImageNet, with the channel expansion of "Pruning from Scratch"."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from ._blocks import ConvBNAct, block_width, check_num_classes, first_width, init_fan_out_

_BASE_WIDTH = 32

# V1: (width in multiples of the first width, stride) of each depthwise-separable block
_V1_BLOCKS = ((2, 1), (4, 2), (4, 1), (8, 2), (8, 1), (16, 2)) + ((16, 1),) * 5 + ((32, 2), (32, 1))

# V2: (base hidden width of each block, base width of the block outputs, stride of the first block) of each stage. The hidden
# width is six times the block's input, but the expansion factor scales the two apart, so it is spelled out.
_V2_STAGES = (
    ((32,), 16, 1),
    ((96, 144), 24, 2),
    ((144, 192, 192), 32, 2),
    ((192, 384, 384, 384), 64, 2),
    ((384, 576, 576), 96, 1),
    ((576, 960, 960), 160, 2),
    ((960,), 320, 1),
)
_V2_HEAD = 1280


class DepthwiseSeparable(nn.Sequential):
    """3x3 depthwise and 1x1 pointwise convolution, each with batch-norm and ReLU."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        depthwise = ConvBNAct(in_channels, in_channels, 3, stride=stride, groups=in_channels)
        pointwise = ConvBNAct(in_channels, out_channels, 1)
        super().__init__(OrderedDict(depthwise=depthwise, pointwise=pointwise))


class MobileNetV1(nn.Module):
    """MobileNet V1.

    The official code also takes a multiplier for this network and ignores it; here there is none.

    Args:
        num_classes: Number of classes.
        expansion: Factor on every width; the stem has `round(32 * expansion)` channels.

    Raises:
        ConfigError: An argument is out of its range.
    """

    input_size = (3, 224, 224)

    def __init__(self, num_classes: int = 1000, expansion: float = 1.0) -> None:
        super().__init__()
        check_num_classes("mobilenet_v1", num_classes)
        first = first_width("mobilenet_v1", _BASE_WIDTH, expansion)
        self.stem = ConvBNAct(3, first, 3, stride=2)
        blocks: list[nn.Module] = []
        in_channels = first
        for factor, stride in _V1_BLOCKS:
            blocks.append(DepthwiseSeparable(in_channels, first * factor, stride))
            in_channels = first * factor
        self.blocks = nn.Sequential(*blocks)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(in_channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh weights."""
        init_fan_out_(self, linear_std=0.01)

    def paper_gates(self) -> tuple[str, ...]:
        """Names of the convolutions whose outputs the paper gates: the stem and every pointwise one."""
        return ("stem.conv", *(f"blocks.{i}.pointwise.conv" for i in range(len(self.blocks))))

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.pool(self.blocks(self.stem(x)))
        return self.classifier(torch.flatten(x, 1))


class InvertedResidual(nn.Module):
    """1x1 expansion, 3x3 depthwise and linear 1x1 projection, with a residual sum where `residual`.

    Whether a block expands and whether it adds its input is said by the caller, never inferred from widths that happen to be
    equal: the official code infers it and loses the expansion of a block pruned to its input width.
    """

    def __init__(
        self,
        in_channels: int,
        hidden: int,
        out_channels: int,
        stride: int,
        *,
        expands: bool,
        residual: bool,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.expand: nn.Module = nn.Identity()
        if expands:
            self.expand = ConvBNAct(in_channels, hidden, 1, act=nn.ReLU6)
        self.depthwise = ConvBNAct(hidden, hidden, 3, stride=stride, groups=hidden, act=nn.ReLU6)
        self.project = nn.Conv2d(hidden, out_channels, 1, bias=False)
        self.project_bn = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.project_bn(self.project(self.depthwise(self.expand(x))))
        return x + out if self.residual else out


class MobileNetV2(nn.Module):
    """MobileNet V2.

    Args:
        num_classes: Number of classes.
        expansion: Factor on the stem, the hidden widths of all blocks and the last 1x1 convolution. The stem has
            `c = round(32 * expansion)` channels, a base width `w` becomes `floor(w * c / 32)`.
        multiplier: Factor on the block outputs, each truncated to an integer.

    Raises:
        ConfigError: An argument is out of its range.
    """

    input_size = (3, 224, 224)

    def __init__(
        self, num_classes: int = 1000, expansion: float = 1.0, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        check_num_classes("mobilenet_v2", num_classes)
        first = first_width("mobilenet_v2", _BASE_WIDTH, expansion)
        self.stem = ConvBNAct(3, first, 3, stride=2, act=nn.ReLU6)
        blocks: list[nn.Module] = []
        in_channels = first
        for hidden_widths, base, first_stride in _V2_STAGES:
            out_channels = block_width("mobilenet_v2", base, multiplier)
            for i, hidden in enumerate(hidden_widths):
                block = InvertedResidual(
                    in_channels,
                    hidden * first // _BASE_WIDTH,
                    out_channels,
                    first_stride if i == 0 else 1,
                    expands=bool(blocks),
                    residual=i > 0,
                )
                blocks.append(block)
                in_channels = out_channels
        self.blocks = nn.Sequential(*blocks)
        last = _V2_HEAD * first // _BASE_WIDTH
        self.head = ConvBNAct(in_channels, last, 1, act=nn.ReLU6)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(last, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh weights."""
        init_fan_out_(self, linear_std=0.01)

    def paper_gates(self) -> tuple[str, ...]:
        """Names of the convolutions whose outputs the paper gates: stem, expansions, last 1x1.

        The first block has no expansion of its own; its hidden width is the stem's.
        """
        expansions = (f"blocks.{i}.expand.conv" for i in range(1, len(self.blocks)))
        return ("stem.conv", *expansions, "head.conv")

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.pool(self.head(self.blocks(self.stem(x))))
        return self.classifier(torch.flatten(x, 1))


def mobilenet_v1(num_classes: int = 1000, expansion: float = 1.0) -> MobileNetV1:
    """MobileNet V1 for 224x224 images: 568.79 M MACs (average-pool inputs counted) and 4.232 M parameters."""
    return MobileNetV1(num_classes, expansion)


def mobilenet_v2(
    num_classes: int = 1000, expansion: float = 1.0, multiplier: float = 1.0
) -> MobileNetV2:
    """MobileNet V2 for 224x224 images: 300.84 M MACs (average-pool inputs counted) and 3.505 M parameters."""
    return MobileNetV2(num_classes, expansion, multiplier)
