"""Gates of 0 and 1 are the slim network: every gate reaches every place where its channel is mixed with others."""

from __future__ import annotations

import copy

import pytest
import torch
from exactness import random_keep
from group_cases import CASES
from test_gated import assert_same, gate, shaken

from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.structure import Structure
from pfs_fast.graph.analysis import analyse
from pfs_fast.slimming.slim import slim


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups])
def test_gates_of_zero_and_one_are_the_slim_network(name):
    case = CASES[name]
    torch.manual_seed(0)
    model = shaken(copy.deepcopy(case.model)).eval()
    inputs = tuple(torch.randn(2, *shape[1:], dtype=torch.float64) for shape in case.inputs)
    example = inputs if len(inputs) > 1 else inputs[0]
    groups = analyse(model, example)
    cost_model = CostModel(groups)
    keep = random_keep(cost_model, groups, 0)
    network, bank = gate(model, example, channels_last=False)  # in which a view may be none
    bank.state.values.copy_(torch.from_numpy(keep))
    narrow = slim(model, Structure.from_keep(groups, keep, cost_model), "inherit")
    with torch.no_grad():
        assert_same(network.eval()(*inputs), narrow(*inputs), rtol=1e-10)
