"""Rules that put the channels of one search into an order: a higher score enters a structure earlier.

A rule maps what a search measured to one score per unit; the budget solver does the rest, so that all rules meet the
same limits exactly.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.ranking import Ranking
from pfs_fast.graph.groups import ChannelGroups


@dataclass(frozen=True)
class Measured:
    """One search, as the rules see it.

    Attributes:
        groups: Gated groups.
        gates: Final gates. [units], float64.
        died_at: Step of death, or -1. [units], int64.
        early: Mean ``|gate * gradient|`` of the cross-entropy over the first steps. [units], float64.
        late: The same over the last steps.
    """

    groups: ChannelGroups
    gates: np.ndarray
    died_at: np.ndarray
    early: np.ndarray
    late: np.ndarray

    def marginal_macs(self) -> np.ndarray:
        """MACs that the whole network loses with one unit, as a share of the largest such number. [units], float64."""
        model = CostModel(self.groups)
        macs = np.empty(self.groups.num_units)
        for group in self.groups.groups:
            keep = np.ones(self.groups.num_units, dtype=bool)
            keep[group.start] = False  # the units of one group cost the same
            macs[group.start : group.start + group.size] = model.base[0] - model.evaluate(keep)[0]
        return macs / macs.max()

    def order_of_gates(self) -> np.ndarray:
        """Place of every unit by gate, then by time of death, as a share: 1 is best. [units], float64."""
        death = np.where(self.died_at < 0, np.iinfo(np.int64).max, self.died_at)
        death = np.where(self.gates > 0, 0, death)
        return _places(np.lexsort((-death, -self.gates)))

    def within_groups(self, score: np.ndarray) -> np.ndarray:
        """Place of every unit in its own group by a score, as a share: 1 is best. [units], float64."""
        places = np.empty_like(score, dtype=np.float64)
        for group in self.groups.groups:
            span = slice(group.start, group.start + group.size)
            places[span] = _places(np.argsort(-score[span], kind="stable"))
        return places


def _places(order: np.ndarray) -> np.ndarray:
    places = np.empty(len(order))
    places[order] = 1.0 - np.arange(len(order)) / len(order)
    return places


def _uniform(m: Measured) -> np.ndarray:
    return m.within_groups(m.order_of_gates())


def _by_shares(name: str) -> Callable[[Measured], np.ndarray]:
    """A ranking of the library that gives every group a share."""
    return lambda m: Ranking(CostModel(m.groups), name).scores(m.gates, m.died_at)[0]


def _random(draw: int) -> Callable[[Measured], np.ndarray]:
    """One width share per group, drawn at random; the solver scales them to the budget."""

    def rule(m: Measured) -> np.ndarray:
        generator = np.random.default_rng(draw)
        return _in_proportion(m, generator.uniform(0.1, 1.0, len(m.groups.groups)))

    return rule


def _in_proportion(m: Measured, weights: np.ndarray) -> np.ndarray:
    """Every group keeps a share of its channels in proportion to its weight, at most all of them."""
    rank = (1.0 - _uniform(m)) / np.repeat(weights, [g.size for g in m.groups.groups])
    return 1.0 - rank / (1.0 + rank.max())


def _shape(slope: float, ends: float, trunk: float) -> Callable[[Measured], np.ndarray]:
    """Shares that no search decides: 2^(slope * t + ends * (t^2 - 1/2) + trunk * s), with t from -1 for the first group to 1 for
    the last, and s = 0.6 for groups of several convolutions (residual streams), -0.4 for others."""

    def rule(m: Measured) -> np.ndarray:
        t = np.linspace(-1.0, 1.0, len(m.groups.groups))
        streams = np.array([len(group.producers) > 1 for group in m.groups.groups])
        return _in_proportion(m, 2 ** (slope * t + ends * (t * t - 0.5) + trunk * (streams - 0.4)))

    return rule


def _weights(weights: list[float]) -> Callable[[Measured], np.ndarray]:
    """Shares in proportion to one number for each group."""

    def rule(m: Measured) -> np.ndarray:
        if len(weights) != len(m.groups.groups) or min(weights) <= 0:
            raise ValueError(
                f"weights: must be one positive number for each of the {len(m.groups.groups)} groups, got {weights}; "
                "correct the list"
            )
        return _in_proportion(m, np.array(weights))

    return rule


def _mean_in_proportion(which: str, power: float, cost: float) -> Callable[[Measured], np.ndarray]:
    """Shares in proportion to ``(mean of the group)^power / macs^cost``."""

    def rule(m: Measured) -> np.ndarray:
        measured, macs = getattr(m, which), m.marginal_macs()
        spans = [slice(g.start, g.start + g.size) for g in m.groups.groups]
        return _in_proportion(
            m, np.array([measured[s].mean() ** power / macs[s][0] ** cost for s in spans])
        )

    return rule


def _gate_per_macs(power: float) -> Callable[[Measured], np.ndarray]:
    # Dead gates keep their order below the living ones: the place in the order stands in for the value.
    return lambda m: m.order_of_gates() * m.marginal_macs() ** -power


def _value_per_macs(power: float) -> Callable[[Measured], np.ndarray]:
    return lambda m: (m.gates + 1e-3 * m.order_of_gates()) * m.marginal_macs() ** -power


def _cost_only(power: float) -> Callable[[Measured], np.ndarray]:
    """The control: what the costs alone do, whatever the gates say."""
    return lambda m: _uniform(m) * m.marginal_macs() ** -power


def _saliency(which: str, power: float) -> Callable[[Measured], np.ndarray]:
    return lambda m: getattr(m, which) * m.marginal_macs() ** -power


def _with_floor(
    rule: Callable[[Measured], np.ndarray], share: float
) -> Callable[[Measured], np.ndarray]:
    """The best ``share`` of every group enters first."""

    def floored(m: Measured) -> np.ndarray:
        score = rule(m)
        score = score / score.max()
        return np.where(m.within_groups(score) > 1.0 - share, 1.0 + score, score)

    return floored


RULES: dict[str, Callable[[Measured], np.ndarray]] = {
    "uniform": _uniform,
    **{f"random-{draw}": _random(draw) for draw in range(5)},
    "gate": lambda m: m.order_of_gates(),  # the paper's rule
    "layerwise": _by_shares("layerwise"),
    "gate/macs^0.5": _gate_per_macs(0.5),
    "gate/macs": _gate_per_macs(1.0),
    "value": _value_per_macs(0.0),
    "value/macs^0.25": _value_per_macs(0.25),
    "value/macs^0.5": _value_per_macs(0.5),
    "floor+gate/macs^0.5": _with_floor(_gate_per_macs(0.5), 0.2),
    "cost^0.25": _cost_only(0.25),
    "cost^0.5": _cost_only(0.5),
    "cost": _cost_only(1.0),
    "early": _saliency("early", 0.0),
    "early/macs^0.25": _saliency("early", 0.25),
    "early/macs^0.5": _saliency("early", 0.5),
    "early/macs": _saliency("early", 1.0),
    "late/macs^0.5": _saliency("late", 0.5),
}


def rule_of(name: str) -> Callable[[Measured], np.ndarray]:
    """One of `RULES`; ``share:WHAT^P/macs^C``: shares of the groups in proportion to a mean to a power over MACs to another; or,
    whatever a search says, ``shape:SLOPE,ENDS,TRUNK`` or ``weights:W,W,...`` with a positive number for each group.

    Raises:
        KeyError: No such rule.
    """
    number = r"(-?[\d.]+)"
    if shape := re.fullmatch(rf"shape:{number},{number},{number}", name):
        return _shape(*(float(value) for value in shape.groups()))
    if re.fullmatch(r"weights:[\d.]+(,[\d.]+)*", name):
        return _weights([float(value) for value in name.removeprefix("weights:").split(",")])
    found = re.fullmatch(r"share:(gates|early|late)\^([\d.]+)/macs\^([\d.]+)", name)
    return _mean_in_proportion(found[1], float(found[2]), float(found[3])) if found else RULES[name]
