"""Networks narrowed to the widths of a stored one, without a search."""

from __future__ import annotations

import pytest
import torch
from slim_cases import NET, Net
from torch import nn

from pfs_fast.errors import StructureError
from pfs_fast.slimming.slim import narrow_to, slim


def entries(model: nn.Module) -> dict:
    return {
        "conv": {
            "kind": "conv",
            "in": model.conv.in_channels,
            "out": model.conv.out_channels,
            "groups": 1,
        },
        "bn": {
            "kind": "bn",
            "in": model.bn.num_features,
            "out": model.bn.num_features,
            "groups": 1,
        },
        **{
            name: {
                "kind": "conv",
                "in": conv.in_channels,
                "out": conv.out_channels,
                "groups": conv.groups,
            }
            for name, conv in (("grouped", model.grouped), ("depthwise", model.depthwise))
        },
        "fc": {
            "kind": "linear",
            "in": model.fc.in_features,
            "out": model.fc.out_features,
            "groups": 1,
        },
    }


def test_narrow_to_takes_the_state_of_a_slim_network():
    model = Net()
    trained = slim(model, NET)
    narrow = narrow_to(model, entries(trained))
    narrow.load_state_dict(trained.state_dict())
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(narrow.eval()(x), trained.eval()(x))
    assert model.conv.out_channels == 8


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        (
            "conv",
            {"kind": "linear"},
            "layer conv must be a linear layer, got Conv2d; pass a model of the original class",
        ),
        ("conv", {"out": 9}, "layer conv must have at least 3 inputs and 9 outputs, got 3 and 8"),
        (
            "grouped",
            {"out": 5},
            "layer grouped must have 2 groups that divide its channels, got in 4, out 5",
        ),
        ("gone", {"kind": "conv"}, "layer gone must be a conv layer, got no such module"),
        (
            "depthwise",
            {"out": 13},
            "layer depthwise must have 6 groups that divide its channels, got in 6",
        ),
    ],
)
def test_narrow_to_names_the_layer_that_does_not_fit(name, changes, text):
    layers = entries(slim(Net(), NET))
    layers[name] = {**layers.get(name, {}), **changes}
    with pytest.raises(StructureError, match=f"narrow_to: {text}"):
        narrow_to(Net(), layers)
