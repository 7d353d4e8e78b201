"""The proof that every cut must pass: masked = slim, and predicted = counted cost."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.structure import Structure
from pfs_fast.graph.analysis import analyse
from pfs_fast.graph.counting import count
from pfs_fast.graph.groups import ChannelGroups
from pfs_fast.slimming.slim import slim
from pfs_fast.slimming.verify import verify


def random_keep(cost_model: CostModel, groups: ChannelGroups, seed: int) -> np.ndarray:
    """About half of the units, at least one and not all of every part."""
    rng = np.random.default_rng(seed)
    keep = np.zeros(groups.num_units, dtype=bool)
    for part in cost_model.parts:
        size = len(part.units)
        keep[rng.choice(part.units, max(1, size // 2), replace=False)] = True
    return keep


def check_cut(model: nn.Module, inputs: tuple[torch.Tensor, ...], seed: int = 0) -> Structure:
    """Drop random units of every group and assert that the cut is exact in values and cost."""
    example = inputs if len(inputs) > 1 else inputs[0]
    groups = analyse(model, example)
    cost_model = CostModel(groups)
    assert groups.groups, groups.fixed
    structure = Structure.from_keep(groups, random_keep(cost_model, groups, seed), cost_model)
    batch = tuple(torch.zeros(4, *x.shape[1:]) for x in inputs)
    report = verify(model, None, structure, batch, seed=seed)
    assert report.max_error < 1e-9
    assert report.layers_compared > 0
    cost = count(slim(model, structure, "inherit"), inputs)
    assert (cost.macs, cost.params) == (structure.macs, structure.params)
    return structure
