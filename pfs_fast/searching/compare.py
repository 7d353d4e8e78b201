"""How far two structures of the same network are apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..budgets.budget import Budget
from ..budgets.structure import Structure
from ..errors import StructureError
from .result import SearchResult


@dataclass(frozen=True)
class StructureDistance:
    """Result of ``structure_distance``.

    Attributes:
        channels: Share of the channels of both structures that only one of them keeps, in [0, 1].
        widths: The same share of the numbers of channels, whichever channels they are: sum |a - b| / sum (a + b) over
            groups, in [0, 1]. Never above ``channels``. Slim networks with fresh weights differ in this alone.
        width_correlation: Pearson correlation of the numbers of kept channels of the groups, in [-1, 1]. 1 where the numbers
            are equal, 0 where those of one structure do not vary.
    """

    channels: float
    widths: float
    width_correlation: float

    def __str__(self) -> str:
        return (
            f"{self.channels:.1%} of the channels differ, {self.widths:.1%} in number; "
            f"correlation of the widths {self.width_correlation:.4f}"
        )


def structure_distance(
    a: Structure | SearchResult,
    b: Structure | SearchResult,
    budget: float | int | Budget | None = None,
) -> StructureDistance:
    """How far two structures are apart, such as those of an early and a late stop, or of two seeds.

    Args:
        a: A structure, or a result that one is cut from.
        b: Another one of the same network.
        budget: For results: the budget of both structures; default: the budget of each search.

    Raises:
        StructureError: The two are not of the same groups.
    """
    first, second = (
        x
        if isinstance(x, Structure)
        else x.structure
        if budget is None
        else x.structure_for(budget)
        for x in (a, b)
    )
    if first.sizes != second.sizes:
        odd = sorted(dict(first.sizes.items() ^ second.sizes.items()))
        raise StructureError(
            f"structure_distance: structures must be of the same groups, got others in {odd[:5]}; compare searches of one "
            "network and scope"
        )
    pairs = [(set(kept), set(second.kept[name])) for name, kept in first.kept.items()]
    widths = np.array([(len(p), len(q)) for p, q in pairs], dtype=np.float64).reshape(-1, 2)
    total = max(widths.sum(), 1.0)
    return StructureDistance(
        channels=sum(len(p ^ q) for p, q in pairs) / total,
        widths=float(np.abs(widths[:, 0] - widths[:, 1]).sum() / total),
        width_correlation=correlation(widths[:, 0], widths[:, 1]),
    )


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson correlation in [-1, 1]; 1 where all numbers are equal, 0 where those of one side do not vary. Both [N], float64."""
    if np.array_equal(a, b):
        return 1.0
    if len(a) == 0 or np.ptp(a) == 0 or np.ptp(b) == 0:  # a mean of equal numbers may be another
        return 0.0
    a, b = a - a.mean(), b - b.mean()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))
