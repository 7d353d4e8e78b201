"""The least and the most units that every part of a group may keep, from all rules of a budget on widths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction

import numpy as np

from ..errors import BudgetError, ModelError
from ..graph.groups import FIXED, ChannelGroups, Layer
from ..graph.patterns import require_known
from .budget import Limits, Width
from .cost import CostModel, Part


@dataclass
class _Range:
    """Units that a part may keep, and the rule that drew each end."""

    least: int
    most: int
    least_by: str
    most_by: str


def unit_bounds(cost_model: CostModel, limits: Limits) -> list[tuple[int, int]]:
    """Least and most units of every part of ``cost_model``, multiples of its step wherever that is possible.

    Args:
        cost_model: Of the groups.
        limits: Of which ``min_channels``, ``multiple_of``, ``widths`` and ``ignore`` matter here.

    Raises:
        BudgetError: A pattern that means no layer, or rules that contradict each other; names both, and the range.
    """
    if limits.preferred:  # no width is out of reach
        limits = replace(limits, multiple_of=1, preferred=False)
    if not limits.widths and not limits.ignore:
        return [
            (part.floor(limits.min_channels, limits.multiple_of), len(part.units))
            for part in cost_model.parts
        ]
    groups = cost_model.groups
    layers = {layer.name: layer for layer in groups.layers}
    parts_of = _Parts(cost_model)
    found = [
        _Range(
            part.floor(limits.min_channels, limits.multiple_of),
            len(part.units),
            _floor_rule(limits),
            "the whole width",
        )
        for part in cost_model.parts
    ]
    for pattern in limits.ignore:
        for name in require_known("ignore", pattern, layers):
            for index in parts_of.layer(layers[name]):
                found[index].least = len(cost_model.parts[index].units)
                found[index].least_by = f"ignore, which names {name!r}"
    for pattern, ends in limits.widths:
        meant = [layers[name] for name in require_known("widths", pattern, layers)]
        _require_prunable(pattern, ends, meant, dict(groups.fixed))
        for layer in meant:
            for index in parts_of.layer(layer):
                _narrow(found[index], cost_model.parts[index], layer, pattern, ends)
    return [
        _rounded(range_, part, limits) for range_, part in zip(found, cost_model.parts, strict=True)
    ]


class _Parts:
    """Which parts the output channels of a layer belong to."""

    def __init__(self, cost_model: CostModel) -> None:
        self._part_of_unit = np.zeros(cost_model.groups.num_units, dtype=np.int64)
        for index, part in enumerate(cost_model.parts):
            self._part_of_unit[part.units] = index

    def layer(self, layer: Layer) -> list[int]:
        units = layer.out_units[layer.out_units != FIXED]
        return np.unique(self._part_of_unit[units]).tolist()


def without_ignored(groups: ChannelGroups, ignore: tuple[str, ...]) -> ChannelGroups:
    """The groups in which no ignored layer makes or passes on a channel; the others are held whole.

    Raises:
        BudgetError: A pattern that means no layer.
        ModelError: No group is left; the message lists why.
    """
    if not ignore:
        return groups
    layers = {layer.name: layer for layer in groups.layers}
    ignored = np.zeros(groups.num_units, dtype=bool)
    for pattern in ignore:
        for name in require_known("ignore", pattern, layers):
            units = layers[name].out_units
            ignored[units[units != FIXED]] = True
    names = [g.name for g in groups.groups if not ignored[g.start : g.start + g.size].any()]
    left = groups.restrict(names, "the budget ignores it")
    if not left.groups:
        lines = "\n".join(f"  {name}: {why}" for name, why in left.fixed)
        raise ModelError(
            f"search: model must have a channel group that the budget does not ignore, got none; each is held whole because:"
            f"\n{lines}\nignore fewer layers than {', '.join(map(repr, ignore))}"
        )
    return left


def _require_prunable(
    pattern: str, ends: tuple[Width, Width], meant: list[Layer], reasons: dict[str, str]
) -> None:
    """A rule that means only layers that are held whole must allow their whole width."""
    if any((layer.out_units != FIXED).any() for layer in meant):
        return
    for layer in meant:
        whole = len(layer.out_units)
        most = _channels(ends[1], whole, math.floor)
        if most is not None and most < whole:
            why = reasons.get(layer.name, "its channels are not prunable")
            raise BudgetError(
                f"Budget: widths[{pattern!r}] ({_shown(ends)}) must mean a layer that can be narrowed, got {layer.name!r} "
                f"with {whole} channels, held whole: {why}; leave it out, or allow {whole}"
            )


def _narrow(
    found: _Range, part: Part, layer: Layer, pattern: str, ends: tuple[Width, Width]
) -> None:
    """Cut a range by a rule on the output channels of one layer."""
    prunable = layer.out_units[layer.out_units != FIXED]
    whole, own = len(layer.out_units), int(np.isin(prunable, part.units).sum())
    per_unit = own // len(part.units)
    least, most = _channels(ends[0], whole, math.ceil), _channels(ends[1], whole, math.floor)
    rule = f"widths[{pattern!r}] ({_shown(ends)})"
    if least is not None and least > whole:
        raise BudgetError(
            f"Budget: {rule} must be feasible: layer {layer.name!r} has {whole} channels, so its least must be in [1, {whole}], "
            f"got {least}; lower it"
        )
    # Channels of the layer outside the part keep their share of the bound: the sum over the parts is within it.
    fixed = whole - len(prunable)
    if least is not None:
        units = math.ceil(Fraction(max(0, least - fixed) * own, len(prunable)) / per_unit)
        if units > found.least:
            found.least, found.least_by = units, rule
    if most is not None:
        units = math.floor(Fraction(max(0, most - fixed) * own, len(prunable)) / per_unit)
        if units < found.most:
            found.most, found.most_by = units, rule


def _rounded(found: _Range, part: Part, limits: Limits) -> tuple[int, int]:
    """The range in whole steps. A part that is narrower than a step stays whole."""
    size, step = len(part.units), part.step(limits.multiple_of)
    least, most = -(-found.least // step) * step, found.most
    if least > size:
        least = size
    if most < size:
        most = most // step * step
    if least > most or most < 1:
        multiple = f" in multiples of {limits.multiple_of}" if limits.multiple_of > 1 else ""
        per_unit = part.group.channels_per_unit
        raise BudgetError(
            f"Budget: limits on the width of group {part.group.name!r} must not contradict each other, got at least "
            f"{least * per_unit} channels by {found.least_by} and at most {found.most * per_unit} by {found.most_by}{multiple}; "
            f"its width can be {max(1, found.least) * per_unit} to {size * per_unit}, change one of the two"
        )
    return least, most


def _channels(end: Width, whole: int, rounded: Callable[[Fraction], int]) -> int | None:
    return rounded(Fraction(repr(end)) * whole) if isinstance(end, float) else end


def _shown(ends: tuple[Width, Width]) -> str:
    return ", ".join("None" if end is None else f"{end:g}" for end in ends)


def _floor_rule(limits: Limits) -> str:
    if limits.multiple_of > 1:
        return f"multiple_of={limits.multiple_of} and min_channels={limits.min_channels}"
    return f"min_channels={limits.min_channels}"
