"""What the paper's networks share: widths under expansion, the conv-BN-activation block, the random initialisation."""

from __future__ import annotations

import math
from collections import OrderedDict

import torch
from torch import nn

from ..errors import ConfigError

_LARGEST_FACTOR = 1000  # on widths, the squares of which are weights


def check_num_classes(function: str, num_classes: int) -> int:
    """Returns `num_classes`, or raises ConfigError in the name of `function`."""
    whole = isinstance(num_classes, int) and not isinstance(num_classes, bool)
    if not whole or not 1 <= num_classes < 2**31:
        got = "more than 2**31" if whole and num_classes > 1 else repr(num_classes)
        raise ConfigError(
            f"{function}: num_classes must be an integer >= 1, got {got}; "
            "pass the number of classes of the data"
        )
    return num_classes


def _check_factor(function: str, argument: str, factor: float) -> float:
    is_number = isinstance(factor, (int, float)) and not isinstance(factor, bool)
    if not is_number or not 0 < factor <= _LARGEST_FACTOR:
        got = (
            f"more than {_LARGEST_FACTOR:,}"
            if is_number and factor > _LARGEST_FACTOR
            else repr(factor)
        )
        raise ConfigError(
            f"{function}: {argument} must be a finite number > 0, got {got}; use at most {_LARGEST_FACTOR:,}, where "
            "1.0 is the original width and 1.25 the paper's"
        )
    return float(factor)


def first_width(function: str, base: int, expansion: float) -> int:
    """Width of a network's first convolution under `expansion`, from which all expanded widths derive.

    Rounded to the nearest integer, so that a factor such as 1.25 or 20 / 16 gives the width it stands for.
    """
    width = round(base * _check_factor(function, "expansion", expansion))
    if width < 1:
        raise ConfigError(
            f"{function}: expansion must leave at least one channel of {base}, got {expansion!r}; "
            f"use at least {1 / base:g}"
        )
    return width


def block_width(function: str, base: int, multiplier: float) -> int:
    """Width of a block output under `multiplier`: truncated, as the official code of the paper does."""
    width = int(_check_factor(function, "multiplier", multiplier) * base)
    if width < 1:
        raise ConfigError(
            f"{function}: multiplier must leave at least one channel of {base}, got {multiplier!r}; "
            f"use at least {1 / base:g}"
        )
    return width


class ConvBNAct(nn.Sequential):
    """Convolution without bias, batch-norm, activation; spatial size kept at stride 1."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        act: type[nn.Module] = nn.ReLU,
    ) -> None:
        conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            kernel_size // 2,
            groups=groups,
            bias=False,
        )
        # Activations work out of place throughout: hooks and traced graphs then see every BN output unchanged.
        layers = OrderedDict(conv=conv, bn=nn.BatchNorm2d(out_channels), act=act())
        super().__init__(layers)


@torch.no_grad()
def init_fan_out_(
    model: nn.Module, *, bn_weight: float = 1.0, linear_std: float | None = None
) -> None:
    """Initialises `model` in place as the paper's networks are: the state that their search starts from.

    Convolutions draw from N(0, 2 / (k * k * out_channels)); the out_channels of a depthwise convolution count in full.
    Batch-norm: weight `bn_weight`, bias 0, running statistics 0 and 1. Linear: N(0, `linear_std`^2) and bias 0, or PyTorch's
    default where `linear_std` is None. Draws from PyTorch's global generator.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
            module.weight.normal_(0.0, math.sqrt(2.0 / fan_out))
        elif isinstance(module, nn.BatchNorm2d):
            module.reset_parameters()
            module.weight.fill_(bn_weight)
        elif isinstance(module, nn.Linear):
            if linear_std is None:
                module.reset_parameters()
            else:
                module.weight.normal_(0.0, linear_std)
                module.bias.zero_()
