"""In which order the channels of a network enter a structure, from the gates of one search.

``"gates"`` is the method's own order ("Pruning from Scratch", arXiv 1909.12579): the largest gates of the whole network first. The
other two give every group a share of its channels, and let the gates decide within the group alone.
"""

from __future__ import annotations

import numpy as np

from ..errors import StructureError
from ..graph.groups import ChannelGroups
from .cost import CostModel
from .layerwise import layer_shares

RANKINGS = ("gates", "layerwise", "uniform")

_LATEST = np.iinfo(np.int64).max


def rank(groups: ChannelGroups, gates: np.ndarray, died_at: np.ndarray) -> np.ndarray:
    """Units in the order of their gates, best first.

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
    death = np.where(died_at < 0, _LATEST, died_at.astype(np.int64))
    death[gates > 0] = 0  # only the dead tie by their step
    return np.lexsort((-death, -gates.astype(np.float64)))  # stable, so the index decides last


class Ranking:
    """The order of one name of `RANKINGS` for the groups of one network.

    Args:
        cost_model: Of the groups.
        name: One of `RANKINGS`.
    """

    def __init__(self, cost_model: CostModel, name: str) -> None:
        self._groups, self._parts = cost_model.groups, cost_model.parts
        self._name = name
        layerwise = name == "layerwise"
        self._shares = layer_shares(cost_model) if layerwise else np.ones(len(self._parts))

    def scores(self, gates: np.ndarray, died_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Gates and times of death which `rank` puts into this order; for ``"gates"`` those given.

        For the others, the n-th of the N channels of a part whose share is w scores ``1 / (1 + (n - 1/2) / (N w))``: at any budget
        every part keeps channels in proportion to N w, until it is whole.

        Args:
            gates: Gate of every unit. [num_units], float.
            died_at: Step at which the gate reached 0, or -1. [num_units], int.

        Raises:
            StructureError: As `rank`.
        """
        if self._name == "gates":
            return gates, died_at
        order = rank(self._groups, gates, died_at)
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        found = np.empty(len(order))
        for part, share in zip(self._parts, self._shares, strict=True):
            size = len(part.units)
            best_first = part.units[np.argsort(position[part.units])]
            found[best_first] = 1.0 / (1.0 + (np.arange(size) + 0.5) / (size * share))
        return found, np.full(len(order), -1)
