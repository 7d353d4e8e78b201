from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from structure_cases import chain, conv, fixed, group, plain_cost, random_groups

from pfs_fast.budgets.cost import CostModel
from pfs_fast.errors import ModelError, StructureError
from pfs_fast.graph.groups import ChannelGroups


def test_base_is_the_sum_over_the_layers():
    groups = chain(4, 6)
    convolutions, linear = 3 * 4 + 4 * 6, 6 * 10
    assert CostModel(groups).base == (
        36 * convolutions + linear + 7,
        9 * convolutions + 2 * 10 + linear + 10 + 5,
    )


@pytest.mark.parametrize("seed", range(20))
def test_evaluate_equals_the_plain_sum(seed):
    groups = random_groups(seed)
    model, rng = CostModel(groups), np.random.default_rng(seed)
    assert model.base == plain_cost(groups, np.ones(groups.num_units, dtype=bool))
    for share in (0.0, 0.1, 0.5, 0.9):
        keep = rng.random(groups.num_units) < share
        assert model.evaluate(keep) == plain_cost(groups, keep)


def test_evaluate_returns_python_integers():
    assert all(
        type(number) is int for number in CostModel(chain(4)).evaluate(np.ones(4, dtype=bool))
    )


def test_depthwise_convolution_costs_one_input_per_output():
    units = np.arange(8)
    layers = (conv("a", units, fixed(3)), conv("dw", np.repeat(units, 2), units, groups=8))
    groups = ChannelGroups((group("a", 0, 8),), layers, (), 0, 0)
    keep = np.arange(8) < 3
    assert CostModel(groups).evaluate(keep)[1] == 9 * 3 * 3 + 9 * 6


def test_grouped_convolution_keeps_its_groups():
    out = np.tile(np.arange(4), 2)
    groups = ChannelGroups(
        (group("a", 0, 4, 2),), (conv("a", out, fixed(2)), conv("g", out, out, groups=2)), (), 0, 0
    )
    assert CostModel(groups).evaluate(np.arange(4) < 3)[1] == 9 * 2 * 6 + 9 * 6 * 6 // 2


def test_costs_above_32_bits_stay_exact():
    layer = dataclasses.replace(chain(5).layers[0], macs_per_pair=10**15 + 1)
    groups = dataclasses.replace(chain(5), layers=(layer,))
    assert CostModel(groups).evaluate(np.ones(5, dtype=bool))[0] == 15 * (10**15 + 1) + 7


def test_cost_beyond_62_bits_is_refused():
    layer = dataclasses.replace(chain(5).layers[0], macs_per_pair=10**18)
    with pytest.raises(ModelError, match="CostModel: cost must fit 62 bits"):
        CostModel(dataclasses.replace(chain(5), layers=(layer,)))


def test_unit_out_of_range_is_refused_by_layer():
    layer = dataclasses.replace(chain(5).layers[0], out_units=np.arange(1, 6))
    with pytest.raises(
        StructureError, match=r"units of layer conv0 must be in -1\.\.4, got 1\.\.5"
    ):
        CostModel(dataclasses.replace(chain(5), layers=(layer,)))


@pytest.mark.parametrize(
    ("min_channels", "multiple_of", "widths"),
    [
        (1, 1, (1, 1)),
        (3, 1, (3, 3)),
        (1, 4, (4, 4)),
        (5, 4, (8, 6)),
        (1, 8, (8, 6)),
        (100, 1, (20, 6)),
    ],
)
def test_floor_has_the_smallest_widths(min_channels, multiple_of, widths):
    groups = chain(20, 6)
    keep = np.concatenate([np.arange(20) < widths[0], np.arange(6) < widths[1]])
    assert CostModel(groups).floor(min_channels, multiple_of) == plain_cost(groups, keep)


def test_floor_counts_channels_not_units():
    out = np.tile(np.arange(6), 4)  # every unit stands for 4 channels
    groups = ChannelGroups((group("a", 0, 6, 4),), (conv("a", out, fixed(1)),), (), 0, 0)
    assert CostModel(groups).floor(min_channels=5)[1] == 9 * 8
    assert CostModel(groups).floor(multiple_of=8)[1] == 9 * 8
    assert CostModel(groups).floor(multiple_of=6)[1] == 9 * 12


def test_parts_of_a_group_are_told_apart_by_their_layers():
    units = np.arange(10)
    layers = (
        conv("a", units[:4], fixed(3)),
        conv("b", units[4:], fixed(3)),
        conv("c", fixed(5), units),
    )
    groups = ChannelGroups((group("a", 0, 10),), layers, (), 0, 0)
    assert [part.units.tolist() for part in CostModel(groups).parts] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7, 8, 9],
    ]


def test_groups_without_units_cost_the_constants():
    groups = ChannelGroups((), (conv("a", fixed(2), fixed(3)),), (), 1, 2)
    assert CostModel(groups).evaluate(np.zeros(0, dtype=bool)) == (9 * 6 + 1, 9 * 6 + 2)
