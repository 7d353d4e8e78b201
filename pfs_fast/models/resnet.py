"""ResNet-50 for ImageNet, with separate factors for the inner widths and the block outputs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ._blocks import block_width, check_num_classes, first_width

_BASE_WIDTH = 64
# (blocks, stride of the first block, base width of the block outputs) of each stage
_STAGES = ((3, 1, 256), (4, 2, 512), (6, 2, 1024), (3, 2, 2048))


class Bottleneck(nn.Module):
    """1x1, 3x3 (which strides) and 1x1 convolutions and a residual sum."""

    def __init__(self, in_channels: int, width: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU()
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.relu3 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.relu2(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu3(out + self.downsample(x))


class ResNet50(nn.Module):
    """ResNet-50; at factors 1.0 its parameters carry the names and shapes of torchvision's `resnet50`.

    Args:
        num_classes: Number of classes.
        expansion: Factor on the two inner widths of every block; the narrowest are `round(64 * expansion)`.
        multiplier: Factor on the stem and the block outputs, each truncated to an integer.

    Raises:
        ConfigError: An argument is out of its range.
    """

    input_size = (3, 224, 224)

    def __init__(
        self, num_classes: int = 1000, expansion: float = 1.0, multiplier: float = 1.0
    ) -> None:
        super().__init__()
        check_num_classes("resnet50", num_classes)
        width = first_width("resnet50", _BASE_WIDTH, expansion)
        channels = block_width("resnet50", _BASE_WIDTH, multiplier)
        self.conv1 = nn.Conv2d(3, channels, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU()
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        stages: list[nn.Sequential] = []
        for stage, (blocks, stride, base) in enumerate(_STAGES):
            inner, out_channels = width * 2**stage, block_width("resnet50", base, multiplier)
            first = Bottleneck(channels, inner, out_channels, stride)
            rest = [Bottleneck(out_channels, inner, out_channels) for _ in range(blocks - 1)]
            stages.append(nn.Sequential(first, *rest))
            channels = out_channels
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels, num_classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draws fresh weights: Kaiming normal over the outputs, PyTorch's default for the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, (nn.BatchNorm2d, nn.Linear)):
                module.reset_parameters()

    def paper_gates(self) -> tuple[str, ...]:
        """Names of the convolutions whose outputs the paper gates: the first two of every block."""
        return tuple(
            f"{name}.{conv}"
            for name, module in self.named_modules()
            if isinstance(module, Bottleneck)
            for conv in ("conv1", "conv2")
        )

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N, num_classes] of images [N, 3, H, W]."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def resnet50(num_classes: int = 1000, expansion: float = 1.0, multiplier: float = 1.0) -> ResNet50:
    """ResNet-50 for 224x224 images: 4089.28 M MACs (average-pool inputs counted) and 25.557 M parameters."""
    return ResNet50(num_classes, expansion, multiplier)
