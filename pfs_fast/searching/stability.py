"""When the answer of a search has stopped changing: structure and order of the gates, compared over the last steps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..budgets.budget import Limits
from ..budgets.cost import CostModel
from ..budgets.ranking import Ranking, rank
from ..budgets.solver import Gauge, Sweep
from ..errors import InfeasibleBudgetError
from ..graph.groups import ChannelGroups

MIN_INTERVAL = 10
"""Steps between two looks, at least: a look solves the budget, which takes some milliseconds."""

LOOKS = 10
"""Looks within the patience."""


class Change(NamedTuple):
    """How far two sets of gates are apart.

    Attributes:
        structure: Share of the channels of both structures that only one of them keeps, in [0, 1].
        order: 1 - Spearman's rank correlation of all gates, in [0, 2]; 1 for orders that have nothing in common.
    """

    structure: float
    order: float


def structure_change(keep_a: np.ndarray, keep_b: np.ndarray) -> float:
    """|A xor B| / (|A| + |B|) of two sets of kept units. Both [num_units], bool."""
    total = np.count_nonzero(keep_a) + np.count_nonzero(keep_b)
    return float(np.count_nonzero(keep_a ^ keep_b) / total) if total else 0.0


def order_change(position_a: np.ndarray, position_b: np.ndarray) -> float:
    """1 - Spearman's rho of two permutations, which have no ties. Both [num_units], int."""
    n = len(position_a)
    if n < 2:
        return 0.0
    squares = np.square(position_a.astype(np.float64) - position_b).sum()
    return 6.0 * float(squares) / (n * (n * n - 1.0))


class StabilityWatch:
    """Looks at the gates every few steps and says when structure and order have stopped changing.

    The answer is stable at a look if, against every earlier look of the last ``patience`` steps, the structure for the budget
    and the order of all gates (ties as the solver breaks them) changed by at most ``tolerance``. Comparing with all of them, not
    with the first alone, keeps a structure that swings to and fro from passing for a stable one.

    Args:
        groups: The gated groups.
        limits: The budget of the search.
        cost_model: Of ``groups``.
        patience: Steps over which nothing may change.
        tolerance: Largest ``Change.structure`` and ``Change.order`` that count as none.
        gauges: What predicts the limits that the cost model does not know. ``{cost: gauge}``.
        ranking: In which order channels enter the structure.

    Attributes:
        every: Steps between two looks.
        last: Largest changes within the patience as of the last look; None before there were enough looks.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        limits: Limits,
        cost_model: CostModel,
        patience: int,
        tolerance: float,
        gauges: Mapping[str, Gauge] | None = None,
        ranking: str = "gates",
    ) -> None:
        self._gauges = gauges
        self._groups, self._limits, self._cost_model = groups, limits, cost_model
        self._patience, self._tolerance = patience, tolerance
        self._ranking = Ranking(cost_model, ranking)
        self.every = max(MIN_INTERVAL, patience // LOOKS)
        self.last: Change | None = None
        self._steps: list[int] = []
        self._keeps: list[np.ndarray] = []
        self._positions: list[np.ndarray] = []

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def look(self, step: int, values: Tensor, died_at: Tensor) -> bool:
        """Compare with earlier looks. Reads the gates from the device.

        Args:
            step: Steps taken.
            values: All gates, those left out of the network included. [G].
            died_at: Step at which each became 0, or -1. [G].

        Returns:
            Whether the answer is stable. Never for gates that are not finite.
        """
        gates, deaths = values.detach().cpu().numpy(), died_at.cpu().numpy()
        if not np.isfinite(gates).all():
            return False  # the loop says so at its next entry
        keep, position = self._answer(gates, deaths)
        while len(self._steps) > 1 and self._steps[1] <= step - self._patience:
            for looks in (self._steps, self._keeps, self._positions):
                looks.pop(0)
        if self._steps and self._steps[0] <= step - self._patience:
            self.last = Change(
                max(structure_change(keep, earlier) for earlier in self._keeps),
                max(order_change(position, earlier) for earlier in self._positions),
            )
        self._steps.append(step)
        self._keeps.append(keep)
        self._positions.append(position)
        return self.last is not None and max(self.last) <= self._tolerance

    def _answer(self, gates: np.ndarray, died_at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Kept units, and the position of each unit in the order of all."""
        order = rank(self._groups, gates, died_at)
        position = np.empty(len(order), dtype=np.int32)
        position[order] = np.arange(len(order), dtype=np.int32)
        ranked = self._ranking.scores(gates, died_at)
        sweep = Sweep.within(self._groups, *ranked, self._limits, self._cost_model, self._gauges)
        try:
            return sweep.largest(self._limits), position
        except InfeasibleBudgetError:
            # The budget was feasible before the first step; only the prediction of a latency says otherwise.
            return sweep.keep(0), position

    # -- checkpoint ------------------------------------------------------------------------------------------------

    def state(self) -> tuple[dict[str, Tensor], Change | None]:
        """Tensors and changes that ``restore`` takes."""
        if not self._steps:
            return {}, self.last
        return {
            "steps": torch.tensor(self._steps),
            "keeps": torch.from_numpy(np.stack(self._keeps)),
            "positions": torch.from_numpy(np.stack(self._positions)),
        }, self.last

    def restore(self, tensors: dict[str, Tensor], last: Change | None) -> None:
        self.last = last
        if tensors:
            self._steps = tensors["steps"].tolist()
            self._keeps = list(tensors["keeps"].numpy())
            self._positions = list(tensors["positions"].numpy())
