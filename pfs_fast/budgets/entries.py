"""The steps in which channels enter a structure as its budget grows: one by one, or in blocks that hardware runs fast."""

from __future__ import annotations

import numpy as np

from .cost import CostModel, Part

FLOOR = -1
"""Step of a unit that every structure keeps."""

FINEST_SHARE = 0.03
"""Share of the dense network's MACs that a step with a preferred multiple may cost at most, where one unit costs less."""

_MANY = 2**30  # more units than a network has


def entry_steps(
    cost_model: CostModel,
    order: np.ndarray,
    bounds: list[tuple[int, int]],
    multiple_of: int,
    preferred: bool,
) -> tuple[np.ndarray, int]:
    """Number every unit by the step at which it enters.

    With a strict multiple the units of a part enter in blocks, each block at the place of its worst member.

    With a preferred multiple M every part first grows to M / 4 channels, then to M / 2, then to M, the best units of the network
    first; whole blocks of M follow. A block that would cost more than `FINEST_SHARE` of the MACs enters in several consecutive
    steps, so that a budget is met closely: at most one part then has a width between two multiples of M.

    Args:
        cost_model: Of the groups.
        order: Units, best first. [num_units], int64.
        bounds: Least and most units of every part.
        multiple_of: Channels of a block.
        preferred: The multiple may be dropped where the budget could not be met otherwise.

    Returns:
        Step of every unit: `FLOOR`, 0, 1, ..., or ``num_steps`` for a unit that no structure keeps [num_units], int64; and
        ``num_steps``.
    """
    num_units = len(order)
    position = np.empty_like(order)
    position[order] = np.arange(num_units)
    part_of_unit = np.empty_like(order)
    for index, part in enumerate(cost_model.parts):
        part_of_unit[part.units] = index
    by_part = order[np.argsort(part_of_unit[order], kind="stable")]  # each part best first
    never = np.iinfo(np.int64).max
    keys = np.full(num_units, never)
    finest = _finest_steps(cost_model) if preferred else None
    start = 0
    for index, (part, (least, most)) in enumerate(zip(cost_model.parts, bounds, strict=True)):
        units = by_part[start : start + len(part.units)]
        start += len(units)
        keys[units[:least]] = FLOOR
        places = position[units]
        if finest is None:
            step = part.step(multiple_of)
            blocks = (most - least) // step * step
            keys[units[least : least + blocks]] = np.repeat(
                places[least + step - 1 : least + blocks : step], step
            )
        else:
            found = _preferred_keys(part, places[:most], multiple_of, int(finest[index]))
            keys[units[least:most]] = found[least:]
    entering = (keys != FLOOR) & (keys != never)
    found, steps = np.unique(keys[entering], return_inverse=True)
    result = np.where(keys == FLOOR, FLOOR, len(found))
    result[entering] = steps.reshape(-1)
    return result, len(found)


def _finest_steps(cost_model: CostModel) -> np.ndarray:
    """Units of every part that together cost at most `FINEST_SHARE` of the MACs, at least one. [parts], int64."""
    whole = cost_model.base[0]
    lost = np.maximum(cost_model.macs_per_unit, 1)
    return np.maximum((FINEST_SHARE * whole / lost).astype(np.int64), 1)


def _preferred_keys(part: Part, places: np.ndarray, multiple_of: int, finest: int) -> np.ndarray:
    """Sort keys of a part's units by ``(level, place of the block's worst member, step in the block)``.

    Args:
        part: The part.
        places: Place of each unit in the order of the whole network, ascending. [most], int64.
        multiple_of: Channels of a whole block.
        finest: Most units of one step.
    """
    most = len(places)
    levels = [part.step(max(1, multiple_of // parts)) for parts in (4, 2, 1)]
    starts, whole = np.array([0, *levels]), levels[-1]
    sizes = np.array([*np.diff(starts), whole])
    steps = np.array([_divisor(size, finest) for size in sizes.tolist()])
    # Below a whole block each step finds its own place; a whole block has one place for all of its steps.
    blocks = np.array([*steps[:-1], whole])
    index = np.arange(most)
    level = np.searchsorted(levels, index, side="right")
    inside = index - starts[level]
    ends = starts[level] + (inside // blocks[level] + 1) * blocks[level] - 1
    worst = places[np.minimum(ends, most - 1)]
    step = inside % blocks[level] // steps[level]
    return (level * _MANY + worst) * _MANY + step


def _divisor(size: int, most: int) -> int:
    """The largest divisor of ``size`` up to ``most``."""
    return next(d for d in range(max(1, min(size, most)), 0, -1) if size % d == 0)
