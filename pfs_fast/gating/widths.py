"""Which widths a running search is narrowed to: a few dead channels stay where a wider layer is the faster one."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from .. import _library
from ..budgets.deployment import TENSOR_CORE_MULTIPLE, cpu_multiple
from ..graph.groups import ChannelGroup, ChannelGroups
from . import winograd
from .gated import GatedNetwork
from .gated_layers import FrozenConv

# Below the vectors of a processor this package's convolutions pad outputs alone, and a pair of channels fewer is time saved.
FINE_MULTIPLE = 2


@dataclass(frozen=True)
class WidthRule:
    """The numbers of channels that one group may be narrowed to.

    Attributes:
        multiple: Widths are multiples of this many channels.
        least: No width is below this many channels.
    """

    multiple: int
    least: int

    def width(self, alive: int, group: ChannelGroup) -> int:
        """Units of a group that stay in the network where ``alive`` of them must."""
        step = self.multiple // math.gcd(self.multiple, group.channels_per_unit)
        least = self.least // math.gcd(self.least, group.channels_per_unit)
        return min(max(-(-alive // step) * step, least), group.size)


def preferred_multiple(device: torch.device) -> int:
    """Channels that a vector register or a tensor core takes at once."""
    return cpu_multiple() if device.type == "cpu" else TENSOR_CORE_MULTIPLE


def width_rules(
    network: GatedNetwork,
    groups: ChannelGroups,
    multiple: int,
    *,
    own_dtype: torch.dtype | None,
) -> dict[str, WidthRule]:
    """The rule of every group, by name.

    Libraries lay channels out in vectors, so their widths are multiples of ``multiple``. Where all convolutions that write or
    read a group are this package's, whose inputs need no padding, multiples of two do.

    Args:
        network: With ``fuse_convs`` done.
        groups: Its gated groups.
        multiple: Of `preferred_multiple`.
        own_dtype: dtype of the images where device and layout are those that this package's convolutions take; else None.
    """
    own: set[nn.Module] = set()
    if own_dtype is not None:
        frozen = [m for m in network.train_net.modules() if isinstance(m, FrozenConv)]
        if winograd.serves(own_dtype):
            own |= {layer.conv for layer in frozen if layer.fast}
        if own_dtype == torch.float32:
            own |= {layer.conv for layer in frozen if _is_direct(layer)}
    modules = dict(network.root.named_modules(remove_duplicate=False))
    rules = {}
    for group in groups.groups:
        names = (*group.producers, *group.followers, *group.consumers)
        # Not a module: a layer scale, which is a bare parameter.
        layers = [modules.get(name) for name in names]
        fine = None not in layers and all(
            layer in own or not isinstance(layer, _ConvNd) for layer in layers
        )
        rules[group.name] = WidthRule(min(FINE_MULTIPLE, multiple) if fine else multiple, multiple)
    return rules


def _is_direct(layer: FrozenConv) -> bool:
    """Whether ``frozen_conv`` has a kernel of its own for a layer; the library, which chooses, is asked."""
    conv = layer.conv
    return _library._C.direct_conv_pays(conv.weight.shape, layer.stride, conv.dilation, conv.groups)
