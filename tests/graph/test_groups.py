"""Which channels live and die together: exact partitions, and reasons for what is held whole."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torchvision
from exactness import check_cut
from group_cases import CASES, OUTPUT

import pfs_fast as pfs
from pfs_fast.budgets.cost import CostModel
from pfs_fast.graph.analysis import analyse
from pfs_fast.graph.groups import FIXED


@pytest.fixture(scope="module", params=CASES)
def analysed(request):
    case = CASES[request.param]
    inputs = tuple(torch.zeros(shape) for shape in case.inputs)
    return case, inputs, analyse(case.model, inputs if len(inputs) > 1 else inputs[0])


def test_groups_partition_is_as_expected(analysed):
    case, _, groups = analysed
    assert {g.producers: g.size for g in groups.groups} == case.groups
    assert {g.producers for g in groups.groups if g.residual} == set(case.residual)
    per_unit = {g.producers: g.channels_per_unit for g in groups.groups}
    assert per_unit == dict.fromkeys(case.groups, 1) | case.per_unit


def test_groups_fixed_layers_have_their_reasons(analysed):
    case, _, groups = analysed
    expected = case.fixed | ({"fc.2": OUTPUT} if case.head else {})
    found = dict(groups.fixed)
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert re.search(reason, found[name]), f"{name}: {found[name]}"


def test_groups_hold_each_channel_axis_once(analysed):
    """Every producer is in one group or held whole; units are numbered through; a unit has one group."""
    _, _, groups = analysed
    producers = [name for g in groups.groups for name in g.producers] + [
        name for name, _ in groups.fixed
    ]
    modules = {la.name for la in groups.layers if la.kind != "bn" and not la.depthwise}
    assert len(producers) == len(set(producers))
    assert modules <= set(producers)
    for name in set(producers) - modules:
        assert "instead of calling it" in dict(groups.fixed)[name]
    start = 0
    for group in groups.groups:
        assert group.start == start
        start += group.size
    assert groups.num_units == start
    span = {name: (g.start, g.start + g.size) for g in groups.groups for name in g.producers}
    for layer in groups.layers:
        if layer.name in span:
            low, high = span[layer.name]
            assert ((layer.out_units >= low) & (layer.out_units < high)).all()
        elif layer.name in modules:
            assert (layer.out_units == FIXED).all()


def test_groups_cost_equals_count(analysed):
    case, inputs, groups = analysed
    cost = pfs.count(case.model, inputs)
    assert CostModel(groups).base == (cost.macs, cost.params)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.groups])
def test_groups_cuts_are_exact(name):
    case = CASES[name]
    check_cut(case.model, tuple(torch.zeros(shape) for shape in case.inputs))


TORCHVISION = {
    "googlenet": lambda: torchvision.models.googlenet(init_weights=False),
    "shufflenet": torchvision.models.shufflenet_v2_x0_5,
    "mnasnet": torchvision.models.mnasnet0_5,
    "squeezenet": torchvision.models.squeezenet1_1,
    "vision transformer": lambda: torchvision.models.VisionTransformer(
        64, 16, 1, 2, 8, 16, num_classes=5
    ),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_groups_cost_equals_count_on_torchvision(name):
    model, example = TORCHVISION[name](), torch.zeros(1, 3, 64, 64)
    cost = pfs.count(model, example)
    assert CostModel(analyse(model, example)).base == (cost.macs, cost.params)


def test_groups_followers_and_consumers_are_named():
    groups = analyse(CASES["depthwise"].model, torch.zeros(1, 3, 6, 6))
    first = groups.groups[0]
    assert first.followers == ("0.1", "1.0", "1.1")
    assert first.consumers == ("2.0",)


def test_groups_all_of_shufflenet_is_prunable():
    groups = analyse(torchvision.models.shufflenet_v2_x0_5(), torch.zeros(1, 3, 64, 64))
    assert groups.fixed == (("fc", OUTPUT),)


def test_restrict_renumbers_units_and_says_why():
    groups = analyse(CASES["grouped"].model, torch.zeros(1, 3, 6, 6))
    kept = groups.restrict(["2", "4"], "not wanted")
    assert [(g.name, g.start, g.size) for g in kept.groups] == [("2", 0, 3), ("4", 3, 5)]
    assert ("0", "not wanted") in kept.fixed
    layers = {la.name: la for la in kept.layers}
    assert (layers["0"].out_units == FIXED).all()
    assert (layers["2"].in_units == FIXED).all()
    np.testing.assert_array_equal(layers["2"].out_units, np.tile(np.arange(3), 4))
    np.testing.assert_array_equal(layers["4"].in_units, np.tile(np.arange(3), 4))
    assert CostModel(kept).base == CostModel(groups).base


def test_restrict_refuses_unknown_names():
    groups = analyse(CASES["grouped"].model, torch.zeros(1, 3, 6, 6))
    with pytest.raises(KeyError, match="no such groups"):
        groups.restrict(["nowhere"], "reason")
