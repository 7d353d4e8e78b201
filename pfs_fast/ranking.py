"""In which order the channels of a search enter a structure: the paper's order of all gates, or shares of each group.

The paper's order ("Pruning from Scratch", arXiv 1909.12579) compares gates of different layers, whatever their channels cost. The
shares compare gates within a layer alone; what a layer gets follows from its mean gate and from what its channels cost. Powers were
chosen by experiment (docs/ranking.md, ``python -m benchmarks.experiments.ranking``).
"""

from __future__ import annotations

import numpy as np

from .config import SearchConfig
from .cost import CostModel
from .solver import by_part, rank

POWER_OF_GATES = 1 / 2
POWER_OF_MACS = 1 / 8
LEAST_MEAN = 1e-3  # of the gates of a layer that died as a whole: it still gets channels


def ranking_of(config: SearchConfig) -> str:
    """``"gates"`` or ``"shares"``: what ``config.ranking`` means for its scope."""
    if config.ranking != "auto":
        return config.ranking
    return "gates" if config.scope == "paper" else "shares"


def ranked(
    ranking: str, cost_model: CostModel, gates: np.ndarray, died_at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gates, or what stands for them, in whose order a `solver.Sweep` lets channels enter.

    Args:
        ranking: ``"gates"`` or ``"shares"``.
        cost_model: Of the groups of the search.
        gates: Gate of every unit. [num_units], float.
        died_at: Step at which the gate reached 0, -1 where it never did. [num_units], int.

    Returns:
        Scores and steps of death, as ``solver.rank`` takes them. Both [num_units].

    Raises:
        StructureError: As ``solver.rank``.
    """
    if ranking == "gates":
        return gates, died_at
    order = rank(cost_model.groups, gates, died_at)
    scores = np.empty(len(order), dtype=np.float64)
    macs = np.maximum(cost_model.marginal_macs, 1.0)  # a layer may cost parameters alone
    for units in by_part(cost_model, order):
        mean = max(float(np.mean(gates[units], dtype=np.float64)), LEAST_MEAN)
        weight = mean**POWER_OF_GATES / macs[units[0]] ** POWER_OF_MACS
        # A part keeps the share t * weight of its channels: this is when t reaches each of them.
        scores[units] = np.arange(len(units)) / (len(units) * weight)
    return 1.0 / (1.0 + scores / max(scores.max(initial=0.0), 1e-300)), np.full(len(order), -1)
