"""The widest structure that a budget allows: rank the channels once, then find the longest affordable prefix.

The method keeps the channels with the largest gates ("Pruning from Scratch", arXiv 1909.12579). The cost grows with every
channel that enters, so bisection over the ranked channels with the exact cost gives the exact answer for any budget.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .budget import Budget, Limits
from .cost import CostModel
from .errors import InfeasibleBudgetError, StructureError
from .groups import ChannelGroups

_ALWAYS = -1  # entry step of units that every structure keeps


class ParetoPoint(NamedTuple):
    """One point of the whole-budget curve.

    Attributes:
        fraction: Share of the reference's MACs that was allowed.
        macs: MACs of the structure.
        params: Parameters of the structure.
        keep: Kept units. [num_units], bool.
    """

    fraction: float
    macs: int
    params: int
    keep: np.ndarray


def rank(groups: ChannelGroups, gates: np.ndarray, died_at: np.ndarray) -> np.ndarray:
    """Units in the order in which they enter a structure, best first.

    Larger gates first. Gates at exactly 0 tie: those that died later come first (never died: latest of all), then lower
    indices.

    Args:
        groups: Channel groups of the model.
        gates: Gate of every unit, in [0, inf). [num_units], float.
        died_at: Step at which the gate reached 0, -1 where it never did. [num_units], int.

    Returns:
        np.ndarray: A permutation of the units. [num_units], int64.

    Raises:
        StructureError: For a wrong shape, or gates that are negative or not finite.
    """
    gates, died_at = np.asarray(gates), np.asarray(died_at)
    for name, values in (("gates", gates), ("died_at", died_at)):
        if values.shape != (groups.num_units,):
            raise StructureError(
                f"solve: {name} must have shape [{groups.num_units}], got {list(values.shape)}; pass one for each unit"
            )
    bad = ~(np.isfinite(gates) & (gates >= 0))
    if bad.any():
        unit = int(np.flatnonzero(bad)[0])
        raise StructureError(
            f"solve: gates must be finite and at least 0, got {gates[unit]} for unit {unit}"
        )
    latest = np.iinfo(np.int64).max
    death = np.where(died_at < 0, latest, died_at.astype(np.int64))
    death[gates > 0] = 0  # only the dead tie by their step
    return np.lexsort((-death, -gates.astype(np.float64)))  # stable, so the index decides last


class Sweep:
    """All structures that one set of gates leads to, from the floor to the whole network.

    Building it sorts once; afterwards ``largest`` answers any budget with about 14 evaluations of the cost model.

    Args:
        groups: Channel groups of the model.
        gates: Gate of every unit. [num_units], float.
        died_at: Step at which the gate reached 0, or -1. [num_units], int.
        multiple_of: Widths are multiples of this many channels.
        min_channels: Every group keeps at least this many channels.
        cost_model: Cost model of ``groups``, built here if not given.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        gates: np.ndarray,
        died_at: np.ndarray,
        *,
        multiple_of: int = 1,
        min_channels: int = 1,
        cost_model: CostModel | None = None,
    ) -> None:
        self.cost_model = CostModel(groups) if cost_model is None else cost_model
        order = rank(groups, gates, died_at)
        position = np.empty_like(order)
        position[order] = np.arange(groups.num_units)
        # worst[unit]: position of the worst member of the block that the unit enters with; blocks are ordered by it.
        worst = np.full(groups.num_units, groups.num_units, dtype=np.int64)  # never, until found
        is_step = np.zeros(groups.num_units, dtype=bool)
        part_of_unit = np.empty_like(order)
        for index, part in enumerate(self.cost_model.parts):
            part_of_unit[part.units] = index
        by_part = order[np.argsort(part_of_unit[order], kind="stable")]  # each part best first
        start = 0
        for part in self.cost_model.parts:
            units = by_part[start : start + len(part.units)]
            start += len(units)
            always, step = part.floor(min_channels, multiple_of), part.step(multiple_of)
            worst[units[:always]] = _ALWAYS
            blocks = units[always : always + (len(units) - always) // step * step]
            enters = position[blocks[step - 1 :: step]]
            worst[blocks] = np.repeat(enters, step)
            is_step[enters] = True
        self._worst = worst
        self._steps = np.flatnonzero(is_step)
        self.floor: tuple[int, int] = self.cost_model.evaluate(self.keep(0))
        self.full: tuple[int, int] = self.cost_model.evaluate(self.keep(self.num_steps))

    @property
    def num_steps(self) -> int:
        """Number of channels (or blocks of channels) above the floor."""
        return len(self._steps)

    def keep(self, steps: int) -> np.ndarray:
        """Units kept once the best ``steps`` channels (or blocks) have entered above the floor. [num_units], bool."""
        return self._worst <= (self._steps[steps - 1] if steps else _ALWAYS)

    def largest(self, limits: Limits) -> np.ndarray:
        """Kept units of the largest structure within the limits. [num_units], bool.

        Raises:
            InfeasibleBudgetError: If even the floor is above a limit; prints the feasible range.
        """
        if not limits.allow(self.floor):
            raise InfeasibleBudgetError(self._infeasible(limits))
        affordable, above = 0, self.num_steps + 1
        while above - affordable > 1:
            middle = (affordable + above) // 2
            if limits.allow(self.cost_model.evaluate(self.keep(middle))):
                affordable = middle
            else:
                above = middle
        return self.keep(affordable)

    def _infeasible(self, limits: Limits) -> str:
        parts = []
        for name, limit, low, base in zip(
            ("macs", "params"),
            (limits.macs, limits.params),
            self.floor,
            self.cost_model.base,
            strict=True,
        ):
            if limit is not None:
                share = low / base if base else 1.0
                parts.append(
                    f"{name} must be in [{low:,}, {base:,}] ({share:.2%} to 100 %), got {limit:,}"
                )
        return (
            f"solve: budget must be feasible: {'; '.join(parts)}; raise the limit, lower min_channels "
            f"({limits.min_channels}) or multiple_of ({limits.multiple_of}), or make more groups prunable"
        )


def solve(
    groups: ChannelGroups,
    gates: np.ndarray,
    died_at: np.ndarray,
    limits: Limits,
    cost_model: CostModel | None = None,
) -> np.ndarray:
    """The largest structure within the limits: never above any, and one more channel would be above.

    The best ``min_channels`` channels of every group always stay; the others enter in the order of ``rank``, with
    ``multiple_of`` in blocks that enter with their worst member. A group narrower than ``multiple_of`` stays whole. For the same gates a larger budget keeps a superset.

    Args:
        groups: Channel groups of the model.
        gates: Gate of every unit. [num_units], float.
        died_at: Step at which the gate reached 0, or -1. [num_units], int.
        limits: Absolute limits.
        cost_model: Cost model of ``groups``, built here if not given.

    Returns:
        np.ndarray: True for kept units. [num_units], bool.

    Raises:
        InfeasibleBudgetError: If the smallest structure is above a limit.
        StructureError: For gates of a wrong shape or that are not finite.

    Warns:
        UserWarning: For groups whose gates are all 0: what they keep is decided by order of death alone.
    """
    sweep = Sweep(
        groups,
        gates,
        died_at,
        multiple_of=limits.multiple_of,
        min_channels=limits.min_channels,
        cost_model=cost_model,
    )
    keep = sweep.largest(limits)
    for group in groups.groups:
        if not np.asarray(gates)[group.start : group.start + group.size].any():
            kept = int(np.count_nonzero(keep[group.start : group.start + group.size]))
            warnings.warn(
                f"solve: all {group.size} gates of group {group.name} are 0; it keeps {kept}, those that died last",
                UserWarning,
                stacklevel=2,
            )
    return keep


def pareto(
    groups: ChannelGroups,
    gates: np.ndarray,
    died_at: np.ndarray,
    fractions: Sequence[float] | None = None,
    *,
    reference: tuple[int, int] | None = None,
    multiple_of: int = 1,
    min_channels: int = 1,
    cost_model: CostModel | None = None,
) -> list[ParetoPoint]:
    """The whole-budget curve of one search.

    Args:
        groups: Channel groups of the model.
        gates: Gate of every unit. [num_units], float.
        died_at: Step at which the gate reached 0, or -1. [num_units], int.
        fractions: Shares of the reference's MACs, in (0, 1]. Default: the feasible ones of 0.05, 0.10, ... 1.
        reference: ``(macs, params)`` that shares refer to. Default: the whole network.
        multiple_of: Widths are multiples of this many channels.
        min_channels: Every group keeps at least this many channels.
        cost_model: Cost model of ``groups``, built here if not given.

    Returns:
        list[ParetoPoint]: One point for each fraction, kept units nested.

    Raises:
        InfeasibleBudgetError: If a fraction that was asked for is below the floor.
    """
    sweep = Sweep(
        groups,
        gates,
        died_at,
        multiple_of=multiple_of,
        min_channels=min_channels,
        cost_model=cost_model,
    )
    reference = sweep.cost_model.base if reference is None else reference
    skip_infeasible = fractions is None
    points = []
    for fraction in [step / 20 for step in range(1, 21)] if fractions is None else fractions:
        limits = Budget(
            macs=float(fraction), multiple_of=multiple_of, min_channels=min_channels
        ).resolve(reference)
        if skip_infeasible and not limits.allow(sweep.floor):
            continue
        keep = sweep.largest(limits)
        points.append(ParetoPoint(float(fraction), *sweep.cost_model.evaluate(keep), keep))
    return points
