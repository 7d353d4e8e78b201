"""The widest structure that a budget allows: rank the channels once, then find the longest affordable prefix.

The method keeps the channels with the largest gates ("Pruning from Scratch", arXiv 1909.12579). The cost grows with every
channel that enters, so bisection over the ranked channels with the exact cost gives the exact answer for any budget.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from ..errors import BudgetError, InfeasibleBudgetError
from ..graph.groups import ChannelGroups
from .bounds import unit_bounds
from .budget import Budget, Limits, Widths
from .cost import CostModel
from .entries import entry_steps
from .limit_check import show
from .ranking import rank


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


class Gauge(Protocol):
    """A cost that needs more than the cost model: it must never fall where channels are added."""

    def evaluate(self, keep: np.ndarray) -> int | float:
        """The cost of the network that keeps these units. [num_units], bool."""
        ...


def costs_of(
    keep: np.ndarray, limits: Limits, cost_model: CostModel, gauges: Mapping[str, Gauge]
) -> dict[str, int | float]:
    """What the network that keeps these units costs, for every limit that is set. ``{cost: value}``."""
    macs, params = cost_model.evaluate(keep)
    known = {
        "macs": macs,
        "params": params,
        "weight_bytes": params * limits.run.dtype.itemsize,
    }
    return {
        name: known[name] if name in known else gauges[name].evaluate(keep)
        for name in limits.asked()
    }


class Sweep:
    """All structures that one set of gates leads to, from the floor to the widest network that the budget's widths allow.

    Building it sorts once; afterwards ``largest`` answers any budget with about 14 evaluations of the cost model.

    Args:
        groups: Channel groups of the model.
        gates: Gate of every unit. [num_units], float.
        died_at: Step at which the gate reached 0, or -1. [num_units], int.
        multiple_of: Widths are multiples of this many channels.
        preferred: As in ``Limits``.
        min_channels: Every group keeps at least this many channels.
        widths: Least and most channels of layers, as in ``Limits``.
        ignore: Patterns of layers that keep every channel.
        cost_model: Cost model of ``groups``, built here if not given.
        gauges: What measures the limits that the cost model does not know. ``{cost: gauge}``.

    Raises:
        BudgetError: Unknown patterns, or widths that contradict each other.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        gates: np.ndarray,
        died_at: np.ndarray,
        *,
        multiple_of: int = 1,
        preferred: bool = False,
        min_channels: int = 1,
        widths: Widths = (),
        ignore: tuple[str, ...] = (),
        cost_model: CostModel | None = None,
        gauges: Mapping[str, Gauge] | None = None,
    ) -> None:
        self.cost_model = CostModel(groups) if cost_model is None else cost_model
        self.gauges = {} if gauges is None else gauges
        self._rules = Limits(
            multiple_of=multiple_of,
            preferred=preferred,
            min_channels=min_channels,
            widths=widths,
            ignore=ignore,
        )
        self._step_of_unit, self._num_steps = entry_steps(
            self.cost_model,
            rank(groups, gates, died_at),
            unit_bounds(self.cost_model, self._rules),
            multiple_of,
            preferred,
        )
        self.floor: tuple[int, int] = self.cost_model.evaluate(self.keep(0))
        self.full: tuple[int, int] = self.cost_model.evaluate(self.keep(self.num_steps))

    @staticmethod
    def within(
        groups: ChannelGroups,
        gates: np.ndarray,
        died_at: np.ndarray,
        limits: Limits,
        cost_model: CostModel | None = None,
        gauges: Mapping[str, Gauge] | None = None,
    ) -> Sweep:
        """The sweep that obeys the limits' rules on widths."""
        return Sweep(
            groups,
            gates,
            died_at,
            multiple_of=limits.multiple_of,
            preferred=limits.preferred,
            min_channels=limits.min_channels,
            widths=limits.widths,
            ignore=limits.ignore,
            cost_model=cost_model,
            gauges=gauges,
        )

    @property
    def num_steps(self) -> int:
        """Number of channels (or blocks of channels) above the floor."""
        return self._num_steps

    def keep(self, steps: int) -> np.ndarray:
        """Units kept once the best ``steps`` channels (or blocks) have entered above the floor. [num_units], bool."""
        return self._step_of_unit < steps

    def costs(self, keep: np.ndarray, limits: Limits) -> dict[str, int | float]:
        """What the network that keeps these units costs, for every limit that is set. ``{cost: value}``."""
        return costs_of(keep, limits, self.cost_model, self.gauges)

    def largest(self, limits: Limits) -> np.ndarray:
        """Kept units of the largest structure within the limits. [num_units], bool.

        Raises:
            InfeasibleBudgetError: If even the floor is above a limit; prints the feasible range.
        """
        return self.keep(self.largest_steps(limits))

    def largest_steps(self, limits: Limits) -> int:
        """``largest`` as a number of steps for ``keep``."""
        if self._exceeds(0, limits):
            raise InfeasibleBudgetError(self._infeasible(limits))
        affordable, above = 0, self.num_steps + 1
        while above - affordable > 1:
            middle = (affordable + above) // 2
            if self._exceeds(middle, limits):
                above = middle
            else:
                affordable = middle
        return affordable

    def _exceeds(self, steps: int, limits: Limits) -> bool:
        return bool(limits.exceeded(self.costs(self.keep(steps), limits)))

    def _infeasible(self, limits: Limits) -> str:
        low = self.costs(self.keep(0), limits)
        high = self.costs(np.ones(self.cost_model.groups.num_units, dtype=bool), limits)
        asked = limits.asked()
        parts = [
            f"{name} must be in [{show(name, low[name])}, {show(name, high[name])}] "
            f"({low[name] / high[name] if high[name] else 1.0:.2%} to 100 %), got {show(name, asked[name])}"
            for name in limits.exceeded(low)
        ]
        return (
            f"solve: budget must be feasible: {'; '.join(parts)}; raise the limit, lower min_channels "
            f"({limits.min_channels}) or multiple_of ({limits.multiple_of}),{self._widths_cost(limits)} or make more groups prunable"
        )

    def _widths_cost(self, limits: Limits) -> str:
        """How far the floor would fall without the rules on single layers."""
        if not self._rules.widths and not self._rules.ignore:
            return ""
        plain = Sweep(
            self.cost_model.groups,
            np.zeros(self.cost_model.groups.num_units),
            np.zeros(self.cost_model.groups.num_units),
            multiple_of=self._rules.multiple_of,
            preferred=self._rules.preferred,
            min_channels=self._rules.min_channels,
            cost_model=self.cost_model,
            gauges=self.gauges,
        )
        low = plain.costs(plain.keep(0), limits)
        ends = ", ".join(
            f"{name} {show(name, low[name])}"
            for name in limits.exceeded(self.costs(self.keep(0), limits))
        )
        return f" widen widths or ignore less (without them from {ends}),"


def solve(
    groups: ChannelGroups,
    gates: np.ndarray,
    died_at: np.ndarray,
    limits: Limits,
    cost_model: CostModel | None = None,
    gauges: Mapping[str, Gauge] | None = None,
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
        gauges: What measures the limits that the cost model does not know, as in ``Sweep``.

    Returns:
        np.ndarray: True for kept units. [num_units], bool.

    Raises:
        InfeasibleBudgetError: If the smallest structure is above a limit.
        StructureError: For gates of a wrong shape or that are not finite.

    Warns:
        UserWarning: For groups whose gates are all 0: what they keep is decided by order of death alone.
    """
    sweep = Sweep.within(groups, gates, died_at, limits, cost_model, gauges)
    keep = sweep.largest(limits)
    warn_of_dead_groups(groups, gates, keep)
    return keep


def warn_of_dead_groups(groups: ChannelGroups, gates: np.ndarray, keep: np.ndarray) -> None:
    """Say which groups have no gate above 0: what they keep is decided by order of death alone."""
    for group in groups.groups:
        if not np.asarray(gates)[group.start : group.start + group.size].any():
            kept = int(np.count_nonzero(keep[group.start : group.start + group.size]))
            warnings.warn(
                f"solve: all {group.size} gates of group {group.name} are 0; it keeps {kept}, those that died last",
                UserWarning,
                stacklevel=3,
            )


def pareto(
    groups: ChannelGroups,
    gates: np.ndarray,
    died_at: np.ndarray,
    fractions: Sequence[float] | None = None,
    *,
    reference: tuple[int, int] | None = None,
    multiple_of: int | str = "auto",
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
        multiple_of: As in ``Budget``.
        min_channels: Every group keeps at least this many channels.
        cost_model: Cost model of ``groups``, built here if not given.

    Returns:
        list[ParetoPoint]: One point for each fraction, kept units nested.

    Raises:
        BudgetError: For fractions that are no shares, or another option outside its range.
        InfeasibleBudgetError: If a fraction that was asked for is below the floor.
    """
    shares = [step / 20 for step in range(1, 21)] if fractions is None else _shares(fractions)
    cost_model = CostModel(groups) if cost_model is None else cost_model
    reference = cost_model.base if reference is None else reference

    def limits_at(fraction: float) -> Limits:
        return Budget(macs=fraction, multiple_of=multiple_of, min_channels=min_channels).resolve(
            reference
        )

    sweep = Sweep.within(groups, gates, died_at, limits_at(1.0), cost_model)
    skip_infeasible = fractions is None
    points = []
    for fraction in shares:
        limits = limits_at(fraction)
        if skip_infeasible and not limits.allow(sweep.floor):
            continue
        keep = sweep.largest(limits)
        points.append(ParetoPoint(fraction, *cost_model.evaluate(keep), keep))
    return points


def _shares(fractions: Sequence[float]) -> list[float]:
    found: list[float] = []
    text = isinstance(fractions, str)
    try:
        found = [] if text else [math.nan if isinstance(f, str) else float(f) for f in fractions]
        good = not text and all(0 < share <= 1 for share in found)
    except (TypeError, ValueError, OverflowError):  # no sequence, or of something else than numbers
        good = False
    if not good:
        raise BudgetError(
            f"pareto: fractions must be shares in (0, 1], got {str(fractions)[:60]!r}; write e.g. [0.3, 0.5]"
        )
    return found
