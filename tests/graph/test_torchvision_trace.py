"""Every classification network of torchvision can be analysed, without storage for its weights."""

from __future__ import annotations

import re

import pytest
import torch
import torchvision
from torchvision_names import NAMES, size_of
from weightless import weightless

from pfs_fast.budgets.cost import CostModel
from pfs_fast.graph.analysis import analyse

OUTPUT = "it is an output of the network"
# Every channel that is not an output of the network is prunable.
WHOLLY = re.compile(
    "alexnet|densenet|efficientnet|googlenet|inception|mnasnet|mobilenet|regnet|resnet|resnext|shufflenet|squeezenet|vgg|"
    "wide_resnet"
)
# Of the others: what is held whole besides, and how many groups there are, all of them widths inside a block.
PARTLY = {
    "convnext_base": (36, "tensor of fixed size|normalises over channels"),
    "convnext_large": (36, "tensor of fixed size|normalises over channels"),
    "convnext_small": (36, "tensor of fixed size|normalises over channels"),
    "convnext_tiny": (18, "tensor of fixed size|normalises over channels"),
    "maxvit_t": (47, "normalises over channels|not understood|fixed places|fixed size"),
    "swin_b": (24, "normalises over channels|instead of calling it|fixed size"),
    "swin_s": (24, "normalises over channels|instead of calling it|fixed size"),
    "swin_t": (12, "normalises over channels|instead of calling it|fixed size"),
    "swin_v2_b": (48, "normalises over channels|instead of calling it|fixed places|fixed size"),
    "swin_v2_s": (48, "normalises over channels|instead of calling it|fixed places|fixed size"),
    "swin_v2_t": (24, "normalises over channels|instead of calling it|fixed places|fixed size"),
    "vit_b_16": (12, "normalises over channels|not understood|fixed places|fixed size"),
    "vit_b_32": (12, "normalises over channels|not understood|fixed places|fixed size"),
    "vit_h_14": (32, "normalises over channels|not understood|fixed places|fixed size"),
    "vit_l_16": (24, "normalises over channels|not understood|fixed places|fixed size"),
    "vit_l_32": (24, "normalises over channels|not understood|fixed places|fixed size"),
}


def network(name: str) -> torch.nn.Module:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    return weightless(torchvision.models.get_model, name, **options)


def test_all_eighty_are_here():
    assert len(NAMES) == 80
    assert {name for name in NAMES if not WHOLLY.match(name)} == set(PARTLY)


@pytest.mark.parametrize("name", NAMES)
def test_torchvision_network_is_analysed(name):
    model, size = network(name), size_of(name)
    groups = analyse(model, torch.empty(1, 3, size, size, device="meta"))
    assert groups.groups
    params = sum(p.numel() for p in model.parameters())
    assert CostModel(groups).base[1] == params
    if WHOLLY.match(name):
        assert {reason for _, reason in groups.fixed} == {OUTPUT}
    else:
        count, reasons = PARTLY[name]
        assert len(groups.groups) == count
        for layer, reason in groups.fixed:
            assert re.search(f"{reasons}|{OUTPUT}", reason), f"{layer}: {reason}"
    if name.startswith(
        ("vit", "swin", "convnext")
    ):  # the hidden width of every MLP, and nothing else
        for group in groups.groups:
            assert not group.residual and group.channels_per_unit == 1
            assert len(group.producers) == len(group.consumers) == 1
