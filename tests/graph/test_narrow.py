"""Narrowed networks can be built again from their widths alone, and refuse what would not be legal."""

from __future__ import annotations

import pytest
import torch
from exactness import random_keep
from group_cases import CASES
from small_nets import conv
from torch import nn

from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.structure import Structure
from pfs_fast.errors import StructureError
from pfs_fast.graph.analysis import analyse
from pfs_fast.slimming.slim import narrow_to, slim
from pfs_fast.storage.io import layer_widths


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups])
def test_widths_are_enough_to_build_the_slim_network_again(name):
    case = CASES[name]
    inputs = tuple(torch.zeros(shape) for shape in case.inputs)
    groups = analyse(case.model, inputs if len(inputs) > 1 else inputs[0])
    cost_model = CostModel(groups)
    structure = Structure.from_keep(groups, random_keep(cost_model, groups, 1), cost_model)
    narrow = slim(case.model, structure, "inherit")
    again = narrow_to(case.model, layer_widths(narrow))
    again.load_state_dict(narrow.state_dict())
    again.eval(), narrow.eval()
    inputs = tuple(torch.randn(2, *shape[1:]) for shape in case.inputs)
    torch.manual_seed(0)
    expected = narrow(*inputs)
    torch.manual_seed(0)
    found = again(*inputs)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)


def cut(model: nn.Module, layers: dict[str, tuple[int, ...]], widths: dict) -> nn.Module:
    return slim(model, Structure({}, {}, layers, {}, widths, 1, 1, 2, 2), "inherit")


def test_norm_groups_are_kept_whole():
    model = nn.Sequential(conv(3, 6), nn.GroupNorm(3, 6))
    widths = {"0": (3, 6), "1": (6, 6)}
    narrow = cut(model, {"0": (0, 1, 4, 5), "1": (0, 1, 4, 5)}, widths)
    assert (narrow[1].num_groups, narrow[1].num_channels) == (2, 4)
    with pytest.raises(StructureError, match="layer 1 must keep whole groups of 2 channels"):
        cut(model, {"0": (0, 1, 4), "1": (0, 1, 4)}, widths)


def test_groups_of_transposed_convolutions_keep_equally_many():
    model = nn.Sequential(nn.ConvTranspose2d(4, 6, 3, groups=2))
    narrow = cut(model, {"0": (0, 2, 3, 4)}, {"0": (4, 6)})
    assert narrow[0].weight.shape == (4, 2, 3, 3)
    torch.testing.assert_close(narrow[0].weight[:2], model[0].weight[:2, [0, 2]])
    torch.testing.assert_close(narrow[0].weight[2:], model[0].weight[2:, [0, 1]])
    with pytest.raises(StructureError, match="equally many output channels"):
        cut(model, {"0": (0, 1, 3)}, {"0": (4, 6)})
