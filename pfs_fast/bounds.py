"""The least and the most units that every part of a group may keep, from all rules of a budget on widths."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .budget import Limits, Width
from .cost import CostModel, Part
from .errors import BudgetError
from .groups import FIXED, Layer
from .patterns import require_known


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
    if not limits.widths and not limits.ignore:
        return [
            (part.floor(limits.min_channels, limits.multiple_of), len(part.units))
            for part in cost_model.parts
        ]
    layers = {layer.name: layer for layer in cost_model.groups.layers}
    touched = [_layers_of(part, layers) for part in cost_model.parts]
    ignored = {
        name for pattern in limits.ignore for name in require_known("ignore", pattern, layers)
    }
    rules = [
        (pattern, ends, set(require_known("widths", pattern, layers)))
        for pattern, ends in limits.widths
    ]
    for pattern, ends, meant in rules:
        _require_prunable(pattern, ends, [layers[name] for name in sorted(meant)], cost_model)
    bounds = []
    for part, names in zip(cost_model.parts, touched, strict=True):
        size = len(part.units)
        floor = part.floor(limits.min_channels, limits.multiple_of)
        found = _Range(floor, size, _floor_rule(limits), "the whole width")
        for name in names:
            if name in ignored and found.least < size:
                found.least, found.least_by = size, f"ignore, which names {name!r}"
            for pattern, ends, meant in rules:
                if name in meant:
                    _narrow(found, part, layers[name], pattern, ends)
        bounds.append(_rounded(found, part, limits))
    return bounds


def _layers_of(part: Part, layers: dict[str, Layer]) -> list[str]:
    """Layers whose output channels are of the part: producers and what the channels pass through one by one."""
    names = dict.fromkeys([part.group.name, *part.group.producers, *part.group.followers])
    return [
        name
        for name in names
        if name in layers and np.isin(part.units, layers[name].out_units).any()
    ]


def _require_prunable(
    pattern: str, ends: tuple[Width, Width], meant: list[Layer], cost_model: CostModel
) -> None:
    """A rule that means only layers that are held whole must allow their whole width."""
    if any((layer.out_units != FIXED).any() for layer in meant):
        return
    reasons = dict(cost_model.groups.fixed)
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
