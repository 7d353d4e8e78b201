"""MACs and parameters, predicted exactly for any set of kept channels."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import ModelError, StructureError
from ..graph.counting import Cost, LayerCost, count
from ..graph.groups import FIXED, ChannelGroup, ChannelGroups
from ..graph.sides import Axes

__all__ = ["Cost", "CostModel", "LayerCost", "Part", "count"]


@dataclass(frozen=True)
class Part:
    """Units of one group that pass through the same layers; most groups are one part.

    A sum over a concatenation makes a group of several parts, each of which must keep channels of its own.

    Attributes:
        group: The group.
        units: Units of the part, ascending. [size], int64.
    """

    group: ChannelGroup
    units: np.ndarray

    def step(self, multiple_of: int) -> int:
        """Units that enter together so that the number of channels is a multiple of ``multiple_of``."""
        return multiple_of // math.gcd(multiple_of, self.group.channels_per_unit)

    def floor(self, min_channels: int, multiple_of: int) -> int:
        """Smallest number of units: ``min_channels`` rounded up to whole steps, or all where there are not enough."""
        step = self.step(multiple_of)
        units = -(-min_channels // self.group.channels_per_unit)
        units = -(-units // step) * step
        return units if units <= len(self.units) else len(self.units)


class CostModel:
    """Exact MACs and parameters of one image for any set of kept units.

    Every layer costs ``a * out * in + b * out + c``. The kept channels of all layer sides are counted at once: units
    that no layer tells apart form a class, so a side is a small integer combination of the kept units per class.

    Args:
        groups: Channel groups of the model.

    Attributes:
        base: ``(macs, params)`` of the whole network, MACs of one image.
        parts: Units of every group by the layers they pass through.
    """

    def __init__(self, groups: ChannelGroups) -> None:
        self.groups = groups
        sides: dict[bytes, np.ndarray] = {}
        indices = np.zeros((len(groups.layers), 2), dtype=np.int64)  # [layer, (out, in)] -> side
        order: dict[bytes, int] = {}
        for row, layer in enumerate(groups.layers):
            for column, units in enumerate((layer.out_units, layer.in_units)):
                units = np.asarray(units, dtype=np.int64)
                if units.size and (units.min() < FIXED or units.max() >= groups.num_units):
                    raise StructureError(
                        f"CostModel: units of layer {layer.name} must be in -1..{groups.num_units - 1}, "
                        f"got {units.min()}..{units.max()}; analyse the model again"
                    )
                key = np.sort(units).tobytes()
                indices[row, column] = order.setdefault(key, len(order))
                sides[key] = units
        self._class_of_unit, representatives = _unit_classes(groups.num_units, sides.values())
        self._num_classes = len(representatives)
        self._weights = np.zeros((len(sides), self._num_classes), dtype=np.int64)
        self._fixed = np.zeros(len(sides), dtype=np.int64)
        for row, units in enumerate(sides.values()):
            per_unit = np.bincount(units[units != FIXED], minlength=groups.num_units)
            self._weights[row] = per_unit[representatives]
            self._fixed[row] = np.count_nonzero(units == FIXED)
        self._out, self._in = indices[:, 0], indices[:, 1]
        self.parts: tuple[Part, ...] = tuple(
            Part(group, group.start + np.flatnonzero(members == class_))
            for group in groups.groups
            for members in [self._class_of_unit[group.start : group.start + group.size]]
            for class_ in np.unique(members)
        )

        layers = groups.layers
        # A depthwise convolution keeps one input channel per group whatever the width: cost linear in out.
        depthwise = np.array([layer.depthwise for layer in layers], dtype=bool)
        self._divisor = np.array([layer.conv_groups for layer in layers], dtype=np.int64)
        self._divisor[depthwise] = 1
        self._depthwise = depthwise
        self._macs = np.array([layer.macs_per_pair for layer in layers], dtype=np.int64)
        self._params = np.array([layer.params_per_pair for layer in layers], dtype=np.int64)
        self._params_per_out = np.array([layer.params_per_out for layer in layers], dtype=np.int64)
        full = self._exact_full_cost()
        if max(full) >= 2**62:
            raise ModelError(
                f"CostModel: cost must fit 62 bits, got {max(full):,}; use a smaller example input"
            )
        self.base: tuple[int, int] = full

    @cached_property
    def axes(self) -> Axes:
        """Output and input channels of every layer, (out, in) of the first, of the second, ..."""
        return Axes([units for la in self.groups.layers for units in (la.out_units, la.in_units)])

    @cached_property
    def macs_per_unit(self) -> np.ndarray:
        """MACs of one image that the whole network loses with one unit of each part. [parts], int64."""
        keep = np.ones(self.groups.num_units, dtype=bool)
        lost = np.empty(len(self.parts), dtype=np.int64)
        for index, part in enumerate(self.parts):
            keep[part.units[0]] = False
            lost[index] = self.base[0] - self.evaluate(keep)[0]
            keep[part.units[0]] = True
        return lost

    def evaluate(self, keep: np.ndarray) -> tuple[int, int]:
        """Cost of the network that keeps these units.

        Args:
            keep: True for kept units. [num_units], bool.

        Returns:
            tuple[int, int]: MACs of one image, and parameters.
        """
        # Dense bincount: its cost does not depend on how many units are kept.
        per_class = np.bincount(
            self._class_of_unit, weights=keep, minlength=self._num_classes
        ).astype(np.int64)
        width = self._weights @ per_class + self._fixed
        out, inputs = width[self._out], width[self._in]
        inputs[self._depthwise] = 1
        pairs = out * inputs // self._divisor
        macs = int(self._macs @ pairs) + self.groups.other_macs
        params = int(self._params @ pairs + self._params_per_out @ out) + self.groups.other_params
        return macs, params

    def floor(self, min_channels: int = 1, multiple_of: int = 1) -> tuple[int, int]:
        """Smallest cost that any budget can reach: every group at its smallest width."""
        keep = np.zeros(self.groups.num_units, dtype=bool)
        for part in self.parts:
            keep[part.units[: part.floor(min_channels, multiple_of)]] = True
        return self.evaluate(keep)

    def _exact_full_cost(self) -> tuple[int, int]:
        """Cost of the whole network in Python integers, which cannot overflow."""
        macs, params = self.groups.other_macs, self.groups.other_params
        for layer in self.groups.layers:
            out, inputs = len(layer.out_units), len(layer.in_units)
            if inputs % layer.conv_groups:
                raise StructureError(
                    f"CostModel: input channels of layer {layer.name} must be a multiple of its {layer.conv_groups} "
                    f"groups, got {inputs}"
                )
            pairs = out * (inputs // layer.conv_groups)
            macs += layer.macs_per_pair * pairs
            params += layer.params_per_pair * pairs + layer.params_per_out * out
        return int(macs), int(params)


def _unit_classes(num_units: int, sides: Iterable[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Classes of units that occur equally often in every side: class of each unit, and one unit of each class."""
    class_of_unit = np.zeros(num_units, dtype=np.int64)
    next_class = 1
    for units in sides:
        touched, times = np.unique(units[units != FIXED], return_counts=True)
        if touched.size:
            pairs = np.stack([class_of_unit[touched], times])
            _, new_class = np.unique(pairs, axis=1, return_inverse=True)
            new_class = new_class.reshape(-1)
            class_of_unit[touched] = next_class + new_class
            next_class += int(new_class.max()) + 1
    _, representatives, class_of_unit = np.unique(
        class_of_unit, return_index=True, return_inverse=True
    )
    return class_of_unit.reshape(-1).astype(np.int64), representatives
