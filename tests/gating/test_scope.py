"""Which groups are gated, and where the gates sit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from small_nets import Net, cbr, conv, head
from torch import nn

import pfs_fast as pfs
from pfs_fast.errors import ConfigError, ModelError
from pfs_fast.gating.scope import gate_sites, gated_groups
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.graph.groups import FIXED


def scoped(model: nn.Module, scope: str, shape: tuple[int, ...] = (1, 3, 32, 32)):
    graph = channel_graph(model, torch.zeros(shape))
    groups = gated_groups(graph, model, scope)
    return groups, gate_sites(graph, groups, scope)


# paper's table: number of gate groups, gates, gates of the network widened by 1.25
TABLE = {
    "vgg16": (13, 4224, 5280),
    "vgg19": (16, 5504, 6880),
    "resnet20": (9, 336, 420),
    "resnet32": (15, 560, 700),
    "resnet44": (21, 784, 980),
    "resnet56": (27, 1008, 1260),
    "resnet110": (54, 2016, 2520),
    "mobilenet_v1": (14, 5984, 7480),
    "mobilenet_v2": (18, 8416, 10520),
    "resnet50": (32, 7552, 9440),
}


# The longer networks of a family add blocks of the same widths.
WIDE = ["vgg16", "resnet20", "resnet32", "mobilenet_v1", "mobilenet_v2", "resnet50"]


@pytest.mark.parametrize(
    ("name", "expansion"), [*((name, 1.0) for name in TABLE), *((name, 1.25) for name in WIDE)]
)
def test_scope_paper_has_the_gates_of_the_table(name, expansion):
    num_groups, base, wide = TABLE[name]
    model = getattr(pfs.models, name)(expansion=expansion)
    groups, sites = scoped(model, "paper")
    assert len(groups.groups) == num_groups
    assert groups.num_units == (base if expansion == 1 else wide)
    # One site a gate group: the batch norm behind the convolution, and every gate exactly once.
    assert [g.name for g in groups.groups] == list(model.paper_gates())
    assert len(sites) == num_groups
    assert sorted(np.concatenate([s.units for s in sites]).tolist()) == list(
        range(groups.num_units)
    )
    kinds = {la.name: la.kind for la in groups.layers}
    assert {kinds[s.layer] for s in sites} == {"bn"}


@pytest.mark.parametrize(
    ("make", "own", "gates"),
    [
        (torchvision.models.resnet50, pfs.models.resnet50, 7552),
        (torchvision.models.mobilenet_v2, pfs.models.mobilenet_v2, 8416),
    ],
)
def test_scope_paper_of_torchvision_equals_own_network(make, own, gates):
    groups, _ = scoped(make(), "paper")
    expected, _ = scoped(own(), "paper")
    assert groups.num_units == gates
    assert sorted(g.size for g in groups.groups) == sorted(g.size for g in expected.groups)


def test_scope_paper_of_torchvision_resnet18_gates_inner_widths():
    groups, sites = scoped(torchvision.models.resnet18(), "paper")
    assert [g.name for g in groups.groups] == [
        f"layer{i}.{j}.conv1" for i in range(1, 5) for j in range(2)
    ]
    assert groups.num_units == 2 * (64 + 128 + 256 + 512)
    assert [s.layer for s in sites] == [f"layer{i}.{j}.bn1" for i in range(1, 5) for j in range(2)]
    assert ("conv1", "the paper does not gate this layer of this network") in groups.fixed


def test_scope_paper_of_mobilenet_v1_sits_before_the_depthwise_convolution():
    _, sites = scoped(pfs.models.mobilenet_v1(10, expansion=0.125), "paper")
    assert [s.layer for s in sites] == ["stem.bn", *(f"blocks.{i}.pointwise.bn" for i in range(13))]


def test_scope_all_of_mobilenet_v1_sits_where_channels_mix():
    """Batch statistics of the depthwise convolution's norm would cancel the scale of an earlier gate."""
    groups, sites = scoped(pfs.models.mobilenet_v1(10, expansion=0.125), "all")
    assert [s.layer for s in sites] == [
        *(f"blocks.{i}.depthwise.bn" for i in range(13)),
        "blocks.12.pointwise.bn",
    ]
    assert sorted(np.concatenate([s.units for s in sites]).tolist()) == list(
        range(groups.num_units)
    )


def test_scope_all_of_resnet20_gates_streams_at_every_producer():
    groups, sites = scoped(pfs.models.resnet20(), "all")
    by_layer = {s.layer: s.units for s in sites}
    stream = next(g for g in groups.groups if g.name == "conv1")
    assert stream.residual
    expected = np.arange(stream.start, stream.start + stream.size)
    for layer in ("bn1", "layer1.0.bn2", "layer1.1.bn2", "layer1.2.bn2"):
        np.testing.assert_array_equal(by_layer[layer], expected)
    norms = {
        name for name, m in pfs.models.resnet20().named_modules() if isinstance(m, nn.BatchNorm2d)
    }
    assert set(by_layer) == norms
    assert len(groups.groups) == 9 + 3


def test_scope_paper_of_other_nets_holds_residual_sums_whole():
    model = Net(
        lambda m, x: m.fc(m.a(x) + m.b(m.c(x))), a=cbr(3, 6), b=cbr(5, 6), c=cbr(3, 5), fc=head(6)
    )
    groups, _ = scoped(model, "paper")
    assert [g.name for g in groups.groups] == ["c.0"]
    assert dict(groups.fixed)["a.0"] == "scope 'paper' holds channels of a residual sum whole"
    groups, _ = scoped(model, "all")
    assert [g.name for g in groups.groups] == ["a.0", "c.0"]


@pytest.mark.parametrize("scope", ["paper", "all"])
def test_scope_gates_a_convolution_without_norm_at_its_output(scope):
    model = nn.Sequential(conv(3, 6), nn.ReLU(), cbr(6, 5), head(5))
    _, sites = scoped(model, scope)
    assert [s.layer for s in sites] == ["0", "2.1"]


@pytest.mark.parametrize("scope", ["paper", "all"])
def test_scope_gates_linear_layers(scope):
    model = nn.Sequential(
        nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 4)
    )
    _, sites = scoped(model, scope, (1, 7))
    assert [s.layer for s in sites] == ["0", "3"]


def test_scope_all_gates_both_ways_past_a_norm():
    """Channels that reach the next layer both through a norm and past it are gated on both ways."""
    model = Net(
        lambda m, x: (lambda y: m.fc(torch.cat([m.b(y), m.c(torch.relu(m.n(y)))], 1)))(m.a(x)),
        a=conv(3, 6),
        n=nn.BatchNorm2d(6),
        b=conv(6, 2),
        c=conv(6, 3),
        fc=head(5),
    )
    _, sites = scoped(model, "all")
    assert {"a", "n"} <= {s.layer for s in sites}


def test_scope_all_of_concatenation_gates_at_the_norm_behind_it():
    model = Net(
        lambda m, x: m.fc(m.d(torch.relu(m.n(torch.cat([m.a(x), m.b(x)], 1))))),
        a=conv(3, 2),
        b=conv(3, 3),
        n=nn.BatchNorm2d(5),
        d=cbr(5, 4),
        fc=head(4),
    )
    _, sites = scoped(model, "all")
    units = {s.layer: s.units.tolist() for s in sites}
    assert units == {"n": [0, 1, 2, 3, 4], "d.1": [5, 6, 7, 8]}


def test_scope_all_of_partly_fixed_concatenation_has_no_gate_on_the_fixed_part():
    model = Net(
        lambda m, x: m.fc(m.n(torch.cat([x, m.a(x)], 1))),
        a=conv(3, 2),
        n=nn.BatchNorm2d(5),
        fc=head(5),
    )
    _, sites = scoped(model, "all")
    assert [(s.layer, s.units.tolist()) for s in sites] == [("n", [FIXED, FIXED, FIXED, 0, 1])]


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("densenet121", "paper"),
        ("shufflenet_v2_x0_5", "all"),
        ("mobilenet_v3_small", "paper"),
        ("mobilenet_v3_small", "all"),
        ("squeezenet1_1", "all"),
        ("efficientnet_b0", "all"),
    ],
)
def test_scope_every_gate_has_a_site(name, scope):
    groups, sites = scoped(torchvision.models.get_model(name), scope, (1, 3, 64, 64))
    seen = np.unique(np.concatenate([s.units for s in sites]))
    np.testing.assert_array_equal(seen[seen != FIXED], np.arange(groups.num_units))


def test_scope_refuses_an_unknown_name():
    with pytest.raises(ConfigError, match=r"scope must be one of \('paper', 'all'\), got 'some'"):
        scoped(nn.Sequential(cbr(3, 4), head(4)), "some")


def test_scope_refuses_a_model_without_prunable_groups_and_says_why():
    with pytest.raises(
        ModelError,
        match=r"must have a channel group that can be gated.*\n  0: it is an output of the network\n",
    ):
        scoped(nn.Sequential(nn.Conv2d(3, 4, 3)), "all")


def test_scope_refuses_a_model_without_layers():
    with pytest.raises(
        ModelError, match="must have convolution or linear layers, got none that it calls"
    ):
        scoped(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten()), "all")
