"""How many of its channels each group deserves: by its place in the network and, in a chain of layers, by its gates.

Gates of different groups compare badly: the same gate means another loss in another place, the stream of a residual network collects
what all its blocks gain, and a channel of an early layer costs many of a late one. Measured on CIFAR-10 (``docs/ranking.md``):

- In a chain, which no sum bypasses, the mean gate of a group says how wide it should be.
- Where the next layers work at a lower resolution (before a pool), every channel must carry more: more channels.
- Where a residual sum bypasses a group, the network goes on without it. At the highest resolution such branches do little for
  their MACs: as few channels as the budget allows. Other branches, and the streams, get equal shares.
"""

from __future__ import annotations

import numpy as np

from ..graph.groups import FIXED, ChannelGroups, Layer
from .cost import CostModel

BEFORE_POOL = 2**0.5
"""Factor of a group whose channels are read at a lower resolution only."""

ELSEWHERE = 2**-0.25
"""Factor of every other group."""

BYPASSED = 1 / 64
"""Factor of a bypassed group at the highest resolution of any: a channel or two until all others are whole."""


class LayerShares:
    """Share of its channels that each part of a network should keep, up to a common factor that the budget decides.

    Args:
        cost_model: Of the groups.

    Attributes:
        factors: Of every part, whatever its gates. [parts], float64.
        by_gates: Parts whose mean gate counts: those of a chain. [parts], bool.
    """

    def __init__(self, cost_model: CostModel) -> None:
        groups = cost_model.groups.groups
        wiring = _Wiring(cost_model.groups)
        branches = wiring.bypassed_branches()
        ends = [wiring.ends_at(branch) for branch in branches]
        factors = np.array(
            [
                BEFORE_POOL if wiring.read_at(index) < wiring.made_at(index) else ELSEWHERE
                for index in range(len(groups))
            ]
        )
        chain = np.array([not group.residual for group in groups])
        for branch, end in zip(branches, ends, strict=True):
            factors[list(branch)] = BYPASSED if end == max(ends) else ELSEWHERE
            chain[list(branch)] = False
        place = {group.name: index for index, group in enumerate(groups)}
        places = [place[part.group.name] for part in cost_model.parts]
        self._units = [part.units for part in cost_model.parts]
        self.factors, self.by_gates = factors[places], chain[places]

    def __call__(self, gates: np.ndarray) -> np.ndarray:
        """Shares for the gates of a search: those of a chain on average as large as the others. [parts], float64."""
        shares = self.factors.copy()
        means = np.array([gates[units].mean() for units in self._units], dtype=np.float64)
        if means[self.by_gates].any():
            own = means[self.by_gates]
            # A group that is dead keeps what it must, and is not held there for good.
            shares[self.by_gates] *= np.maximum(own / own.mean(), BYPASSED)
        return shares


def bypassed_branches(groups: ChannelGroups) -> tuple[tuple[str, ...], ...]:
    """Names of the groups that the network can do without, branch by branch: with all of them gone, every residual sum and every
    layer that is held whole still depends on the input.

    Branches are tried in graph order: of two that meet in a sum with no identity beside them, the second stays.
    """
    return tuple(
        tuple(groups.groups[index].name for index in sorted(branch))
        for branch in _Wiring(groups).bypassed_branches()
    )


class _Wiring:
    """Which groups each layer reads and makes, layers in graph order."""

    def __init__(self, groups: ChannelGroups) -> None:
        self._residual = [group.residual for group in groups.groups]
        of_unit = np.full(groups.num_units + 1, FIXED)  # the last entry maps FIXED to itself
        for index, group in enumerate(groups.groups):
            of_unit[group.start : group.start + group.size] = index
        self._layers = [
            (layer, set(of_unit[layer.in_units].tolist()), set(of_unit[layer.out_units].tolist()))
            for layer in groups.layers
            if layer.kind != "bn"
        ]

    def made_at(self, index: int) -> int:
        """Positions of the map in which a group's channels are before layers mix them."""
        makers = [layer for layer, _, makes in self._layers if index in makes]
        depthwise = [_positions(layer) for layer in makers if layer.depthwise]
        # The largest of the others: a squeeze-excite's scales come from a map of one position.
        return min(depthwise) if depthwise else max(_positions(layer) for layer in makers)

    def read_at(self, index: int) -> int:
        """Most positions of a map that a layer makes which mixes a group's channels; ``made_at`` where none does."""
        reading = [
            _positions(layer)
            for layer, reads, _ in self._layers
            if index in reads and not layer.depthwise
        ]
        return max(reading, default=self.made_at(index))

    def ends_at(self, branch: frozenset[int]) -> int:
        """Positions of the map in which a branch leaves for a residual sum; 0 where nobody reads it."""
        leaving = [
            _positions(layer)
            for layer, reads, makes in self._layers
            if reads & branch and not makes <= branch
        ]
        return max(leaving, default=0)

    def bypassed_branches(self) -> list[frozenset[int]]:
        removed: set[int] = set()
        branches = []
        for index, residual in enumerate(self._residual):
            if not residual and index not in removed:
                dead = self._dead_without(removed | {index})
                if dead is not None:
                    branches.append(frozenset(dead - removed))
                    removed = dead
        return branches

    def _dead_without(self, removed: set[int]) -> set[int] | None:
        """Groups that no longer depend on the input once these carry nothing; None where the network would miss one of them."""
        fed = {FIXED}
        for layer, reads, makes in self._layers:
            if layer.depthwise:
                continue
            if reads <= fed:
                fed |= makes - removed
                continue
            if FIXED in makes:  # always kept, and nothing is known that stands in for it
                return None
            # A sum stays fed by what came before; anything else needs all of its producers.
            fed -= {index for index in makes if not self._residual[index]}
        dead = set(range(len(self._residual))) - fed
        return None if any(self._residual[index] for index in dead) else dead


def _positions(layer: Layer) -> int:
    """Pixels of the map that a layer computes; of a transposed convolution, of the map that it reads."""
    return layer.macs_per_pair // layer.params_per_pair
