"""Groups of channels that live and die together, and the layers they pass through.

A *unit* is the smallest set of channels that can only be kept or dropped as one: a channel of a convolution, the
channels that a residual sum adds to it, the batch norms and depthwise convolutions it passes through. A *group* is a set
of units that share their layers: its size is the width that a slim network chooses.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

FIXED = -1  # unit of a channel that is always kept


@dataclass(frozen=True)
class Layer:
    """One convolution, linear or norm module of the model, with the units of its channels.

    Attributes:
        name: Qualified module name.
        kind: ``"conv"`` (transposed ones too), ``"linear"`` or ``"bn"`` (what takes its channels one by one).
        out_units: Unit of each output channel, ``FIXED`` where it is always kept. [out_channels], int64.
        in_units: Unit of each input channel; for a batch norm the same as ``out_units``. [in_channels], int64.
        conv_groups: ``groups`` of a convolution, else 1.
        depthwise: Every convolution group has a single input channel, so ``conv_groups`` shrinks with the input.
        macs_per_pair: MACs of one image are ``macs_per_pair * out * in / conv_groups``.
        params_per_pair: Weights are ``params_per_pair * out * in / conv_groups``.
        params_per_out: Parameters of each output channel besides (bias, batch-norm affine).
    """

    name: str
    kind: str
    out_units: np.ndarray
    in_units: np.ndarray
    conv_groups: int
    depthwise: bool
    macs_per_pair: int
    params_per_pair: int
    params_per_out: int


@dataclass(frozen=True)
class ChannelGroup:
    """Units ``start .. start + size - 1``: channels whose number is chosen together.

    Attributes:
        name: Name of the first producer in graph order.
        start: First unit.
        size: Number of units.
        producers: Convolutions and linear layers whose output channels these are.
        followers: Batch norms and depthwise convolutions that the channels pass through.
        consumers: Layers that read the channels and mix them.
        residual: The channels join a residual sum.
        channels_per_unit: Largest number of channels of one producer that a unit stands for (above 1 for grouped
            convolutions, whose groups must keep the same number of channels).
    """

    name: str
    start: int
    size: int
    producers: tuple[str, ...]
    followers: tuple[str, ...]
    consumers: tuple[str, ...]
    residual: bool
    channels_per_unit: int


@dataclass(frozen=True)
class ChannelGroups:
    """All prunable groups of a model and every layer they touch.

    Attributes:
        groups: Prunable groups, in graph order; their units are numbered consecutively.
        layers: Every convolution, linear and batch-norm layer that the model calls.
        fixed: ``(producer, reason)`` for every channel axis that is held whole.
        other_macs: MACs of one image spent outside ``layers``.
        other_params: Parameters outside ``layers``.
    """

    groups: tuple[ChannelGroup, ...]
    layers: tuple[Layer, ...]
    fixed: tuple[tuple[str, str], ...]
    other_macs: int
    other_params: int

    @property
    def num_units(self) -> int:
        return sum(group.size for group in self.groups)

    def shrink(self, keep: np.ndarray) -> ChannelGroups:
        """The groups and layers of the network that keeps only these units. ``keep``: [num_units], bool."""
        new_unit = np.full(self.num_units + 1, FIXED, dtype=np.int64)
        new_unit[:-1][keep] = np.arange(np.count_nonzero(keep))

        def narrow(units: np.ndarray) -> np.ndarray:
            stays = units == FIXED
            stays[~stays] = keep[units[~stays]]
            return new_unit[units[stays]]

        groups, start = [], 0
        for group in self.groups:
            size = int(np.count_nonzero(keep[group.start : group.start + group.size]))
            groups.append(replace(group, start=start, size=size))
            start += size
        layers = []
        for layer in self.layers:
            in_units = narrow(layer.in_units)
            conv_groups = len(in_units) if layer.depthwise else layer.conv_groups
            layers.append(
                replace(
                    layer,
                    out_units=narrow(layer.out_units),
                    in_units=in_units,
                    conv_groups=conv_groups,
                )
            )
        return replace(self, groups=tuple(groups), layers=tuple(layers))

    def restrict(self, names: Iterable[str], reason: str) -> ChannelGroups:
        """Keep only the named groups prunable; the others are held whole for ``reason``."""
        names = set(names)
        unknown = names - {group.name for group in self.groups}
        if unknown:
            raise KeyError(f"no such groups: {sorted(unknown)}")
        new_unit = np.full(
            self.num_units + 1, FIXED, dtype=np.int64
        )  # the last entry maps FIXED to itself
        kept, fixed, start = [], list(self.fixed), 0
        for group in self.groups:
            if group.name in names:
                new_unit[group.start : group.start + group.size] = np.arange(
                    start, start + group.size
                )
                kept.append(replace(group, start=start))
                start += group.size
            else:
                fixed += [(producer, reason) for producer in group.producers]
        layers = tuple(
            replace(layer, out_units=new_unit[layer.out_units], in_units=new_unit[layer.in_units])
            for layer in self.layers
        )
        return replace(self, groups=tuple(kept), layers=layers, fixed=tuple(fixed))
