"""How many of its channels each group deserves, by its place in the network and by what its channels cost.

Gates of different groups compare badly: the same gate means another loss in another place, the stream of a residual network collects
what all its blocks gain, and a channel of an early layer costs many of a late one. Measured on CIFAR-10 (``docs/ranking.md``):

- In a chain, which no sum bypasses, a group's share grows with the resolution of its map and falls with the MACs of the layers that
  make and read it. What is made of the image itself has few inputs to make much of: as wide as the others on average.
- Where the next layers work at a lower resolution (before a pool), every channel must carry more: more channels.
- Where a residual sum bypasses a group, the network goes on without it. At the highest resolution such branches do little for
  their MACs: as few channels as the budget allows. Other branches, and the streams, get equal shares.
"""

from __future__ import annotations

import numpy as np

from ..graph.groups import FIXED, ChannelGroups, Layer
from .cost import CostModel

PIXELS_POWER = 3 / 16
"""What the pixels of a group's map count in a chain: the side to the power of 3/8."""

MACS_POWER = -0.5
"""What the MACs of a group count in a chain."""

MOST = 4.0
"""Times the average that a share in a chain may be, or a part of it: beyond lie squeezes of squeeze-and-excite, which cost next to nothing."""

BEFORE_POOL = 2**0.75
"""Factor of a group whose channels are read at a lower resolution only."""

BYPASSED = 1 / 64
"""Factor of a bypassed group at the highest resolution of any: a channel or two until all others are whole."""


def layer_shares(cost_model: CostModel) -> np.ndarray:
    """Share of its channels that each part of a network should keep, up to a common factor that the budget decides.

    Args:
        cost_model: Of the groups.

    Returns:
        np.ndarray: Of every part; those of a chain are on average as large as the others, pools aside. [parts], float64.
    """
    groups = cost_model.groups.groups
    wiring = _Wiring(cost_model.groups)
    branches = wiring.bypassed_branches()
    ends = [wiring.ends_at(branch) for branch in branches]
    chain = np.array([not group.residual for group in groups])
    for branch in branches:
        chain[list(branch)] = False
    shares = np.ones(len(groups))
    shares[chain] = _by_pixels_and_macs(wiring, np.flatnonzero(chain))
    for index in range(len(groups)):
        if wiring.read_at(index) < wiring.made_at(index):
            shares[index] *= BEFORE_POOL
    for branch, end in zip(branches, ends, strict=True):
        shares[list(branch)] = BYPASSED if end == max(ends) else 1.0
    place = {group.name: index for index, group in enumerate(groups)}
    return shares[[place[part.group.name] for part in cost_model.parts]]


def _by_pixels_and_macs(wiring: _Wiring, chain: np.ndarray) -> np.ndarray:
    """Shares of the groups of a chain, 1 on average (geometric, weighted by MACs). [chain], float64.

    That average is also the share of what is made of the image, and of groups that cost nothing: those of auxiliary heads.
    """
    pixels = np.array([wiring.made_at(index) for index in chain], dtype=np.float64)
    macs = wiring.macs()[chain]
    of_image = np.array([wiring.is_made_of_fixed(index) for index in chain], dtype=bool)
    known = ~of_image & (macs > 0)
    found = np.zeros(len(chain))
    if known.any():
        worth = PIXELS_POWER * np.log(pixels[known]) + MACS_POWER * np.log(macs[known])
        found[known] = worth - np.average(worth, weights=macs[known])
    return np.exp(found).clip(1 / MOST, MOST)


def bypassed_branches(groups: ChannelGroups) -> tuple[tuple[str, ...], ...]:
    """Names of the groups that the network can do without, branch by branch: with all of them gone, every residual sum and every
    layer that is held whole still depends on the input.

    Branches are tried in graph order: of two that meet in a sum with no identity beside them, the second stays.
    """
    return tuple(
        tuple(groups.groups[index].name for index in sorted(branch))
        for branch in _Wiring(groups).bypassed_branches()
    )


def group_macs(groups: ChannelGroups) -> np.ndarray:
    """MACs of one image that the whole network would lose with each group. [groups], float64."""
    return _Wiring(groups).macs()


class _Wiring:
    """Which groups each layer reads and makes, layers in graph order."""

    def __init__(self, groups: ChannelGroups) -> None:
        self._residual = [group.residual for group in groups.groups]
        of_unit = np.full(groups.num_units + 1, FIXED)  # the last entry maps FIXED to itself
        for index, group in enumerate(groups.groups):
            of_unit[group.start : group.start + group.size] = index
        self._of_unit = of_unit
        self._layers = [
            (layer, set(of_unit[layer.in_units].tolist()), set(of_unit[layer.out_units].tolist()))
            for layer in groups.layers
            if layer.kind != "bn"
        ]

    def macs(self) -> np.ndarray:
        """MACs of one image that the whole network would lose with each group. [groups], float64."""
        lost = np.zeros(len(self._residual))
        for layer, _, _ in self._layers:
            kept = 1.0 - self._parts_of(layer.out_units)
            if not layer.depthwise:
                kept *= 1.0 - self._parts_of(layer.in_units)
            pairs = len(layer.out_units) * len(layer.in_units) / layer.conv_groups
            lost += layer.macs_per_pair * pairs * (1.0 - kept)
        return lost

    def _parts_of(self, units: np.ndarray) -> np.ndarray:
        """What part of these units each group has. [groups], float64."""
        counts = np.bincount(self._of_unit[units] - FIXED, minlength=len(self._residual) + 1)
        return counts[1:] / len(units)

    def is_made_of_fixed(self, index: int) -> bool:
        """Whether a group is made of channels that are always kept, such as an image's."""
        return any(
            reads == {FIXED}
            for layer, reads, makes in self._layers
            if index in makes and not layer.depthwise
        )

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
