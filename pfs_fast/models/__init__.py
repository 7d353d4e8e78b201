"""The networks of "Pruning from Scratch" (arXiv 1909.12579) with channel expansion, and networks by name.

Each is a plain `nn.Module` with three additions: `input_size` (channels, height and width of the paper's images),
`reset_parameters()` (fresh weights as the paper draws them) and `paper_gates()` (the convolutions whose outputs the paper
gates). MACs in the docstrings are for one image of `input_size`.
"""

from __future__ import annotations

from .mobilenet import MobileNetV1, MobileNetV2, mobilenet_v1, mobilenet_v2
from .registry import get, names
from .resnet import ResNet50, resnet50
from .resnet_cifar import CifarResNet, resnet20, resnet32, resnet44, resnet56, resnet110
from .vgg import VGG, vgg16, vgg19

__all__ = [
    "VGG",
    "CifarResNet",
    "MobileNetV1",
    "MobileNetV2",
    "ResNet50",
    "get",
    "mobilenet_v1",
    "mobilenet_v2",
    "names",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet50",
    "resnet56",
    "resnet110",
    "vgg16",
    "vgg19",
]
