"""Labels where they should be: which input channel of a layer reads which unit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, conv, head
from torch import fx, nn

from pfs_fast.graph import rules
from pfs_fast.graph.analysis import analyse
from pfs_fast.graph.groups import FIXED


def units(model: nn.Module, layer: str, shape: tuple[int, ...] = (1, 3, 4, 4)) -> list[int]:
    """Units of a layer's input channels."""
    groups = analyse(model, torch.zeros(shape))
    return next(la for la in groups.layers if la.name == layer).in_units.tolist()


def outputs(model: nn.Module, layer: str) -> list[int]:
    groups = analyse(model, torch.zeros(1, 3, 4, 4))
    return next(la for la in groups.layers if la.name == layer).out_units.tolist()


def test_flatten_repeats_a_channel_for_every_position():
    model = Net(lambda m, x: m.fc(torch.flatten(m.a(x), 1)), a=conv(3, 3), fc=nn.Linear(48, 2))
    assert units(model, "fc") == np.repeat([0, 1, 2], 16).tolist()


def test_flatten_of_channels_last_interleaves_channels():
    model = Net(
        lambda m, x: m.fc(m.a(x).permute(0, 2, 3, 1).flatten(1)), a=conv(3, 3), fc=nn.Linear(48, 2)
    )
    assert units(model, "fc") == np.tile([0, 1, 2], 16).tolist()


def test_linear_over_the_last_dimension_reads_channels_there():
    model = Net(
        lambda m, x: m.fc(m.b(m.a(x).permute(0, 2, 3, 1)).mean((1, 2))),
        a=conv(3, 3),
        b=nn.Linear(3, 5),
        fc=nn.Linear(5, 2),
    )
    assert units(model, "b") == [0, 1, 2]
    assert units(model, "fc") == [3, 4, 5, 6, 7]


def test_concatenation_keeps_order_and_fixed_parts():
    model = Net(
        lambda m, x: m.fc(torch.cat([m.b(x), x, m.a(x), m.b(x)], 1)),
        a=conv(3, 2),
        b=conv(3, 2),
        fc=head(9),
    )
    assert units(model, "fc.2") == [0, 1, FIXED, FIXED, FIXED, 2, 3, 0, 1]


def test_depth_multiplier_puts_copies_side_by_side():
    model = nn.Sequential(conv(3, 2), nn.Conv2d(2, 6, 1, groups=2), head(6))
    assert units(model, "1") == [0, 1]
    assert outputs(model, "1") == [0, 0, 0, 1, 1, 1]
    assert units(model, "2.2") == [0, 0, 0, 1, 1, 1]


def test_grouped_convolution_ties_the_same_place_of_every_group():
    model = nn.Sequential(conv(3, 6), nn.Conv2d(6, 4, 1, groups=2), head(4))
    assert outputs(model, "0") == [0, 1, 2, 0, 1, 2]
    assert outputs(model, "1") == [3, 4, 3, 4]


def test_shuffle_reads_channels_in_shuffled_order():
    def body(m, x):
        y = m.a(x)
        n, c, h, w = y.shape
        return m.fc(y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))

    model = Net(body, a=conv(3, 6), fc=head(6))
    assert outputs(model, "a") == [0, 1, 2, 0, 1, 2]
    assert units(model, "fc.2") == [0, 0, 1, 1, 2, 2]


def test_chunk_ties_its_pieces():
    model = Net(
        lambda m, x: (lambda t: m.fc(t[1] * t[0].sigmoid()))(m.a(x).chunk(2, 1)),
        a=conv(3, 6),
        fc=head(3),
    )
    assert outputs(model, "a") == [0, 1, 2, 0, 1, 2]
    assert units(model, "fc.2") == [0, 1, 2]


def test_padded_channels_are_fixed():
    model = Net(lambda m, x: m.fc(F.pad(m.a(x), (0, 0, 0, 0, 1, 2))), a=conv(3, 2), fc=head(5))
    assert units(model, "fc.2") == [FIXED, 0, 1, FIXED, FIXED]


def test_two_calls_sum_their_positions():
    shared = conv(4, 4)
    model = Net(
        lambda m, x: m.fc(m.b(F.max_pool2d(m.b(m.a(x)), 2))), a=conv(3, 4), b=shared, fc=head(4)
    )
    groups = analyse(model, torch.zeros(1, 3, 4, 4))
    layers = {la.name: la for la in groups.layers}
    assert layers["b"].macs_per_pair == 9 * (16 + 4)
    assert layers["b"].params_per_pair == 9


def test_calls_of_train_mode_are_coupled_but_not_counted():
    model = Net(
        lambda m, x: (m.fc(m.a(x)), m.fc(m.b(x))) if m.training else m.fc(m.a(x)),
        a=conv(3, 4),
        b=conv(3, 4),
        fc=head(4),
    )
    groups = analyse(model, torch.zeros(1, 3, 4, 4))
    assert [g.producers for g in groups.groups] == [("a", "b")]
    layers = {la.name: la for la in groups.layers}
    assert layers["b"].macs_per_pair == 0
    assert layers["b"].params_per_pair == 9


@pytest.mark.parametrize(
    ("body", "name"),
    [
        (lambda x: F.relu(x), "relu"),
        (lambda x: torch.relu_(x), "relu"),
        (lambda x: x.relu_(), "relu"),
        (lambda x: x + 1, "add"),
        (lambda x: x.__iadd__(1), "iadd"),
        (lambda x: F.max_pool2d(x, 2), "max_pool2d"),
        (lambda x: F.adaptive_max_pool2d(x, 2), "adaptive_max_pool2d"),
        (lambda x: torch.cat([x, x]), "cat"),
        (lambda x: x[0], "getitem"),
    ],
)
def test_plain_name_is_one_for_all_forms(body, name):
    node = [n for n in fx.symbolic_trace(body).graph.nodes if n.op.startswith("call")][-1]
    assert rules.plain_name(node, None) == name


def test_no_operation_stands_in_two_tables():
    tables = [
        rules.ZERO_PRESERVING,
        rules.ELEMENTWISE,
        rules.ADDITIVE,
        rules.MULTIPLICATIVE,
        rules.DIVISION,
        rules.SPATIAL,
        rules.MOVEMENT,
        rules.PIECES,
        rules.CHANNEL_SHUFFLE,
        rules.SOFTMAX,
        rules.EXTREMES,
        rules.FACTORY,
        rules.NORMALISING,
        rules.REDUCTION,
        rules.CONCATENATION,
    ]
    assert sum(map(len, tables)) == len(frozenset().union(*tables))
    assert rules.BOUNDED <= rules.ELEMENTWISE
