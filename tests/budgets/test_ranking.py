"""The order in which channels enter a structure: by gates alone, or by shares of every group."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
import torchvision
from small_nets import Net, cbr, head
from structure_cases import chain, random_gates, random_groups
from torch import nn

import pfs_fast as pfs
from pfs_fast.budgets import layerwise
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.layerwise import (
    BEFORE_POOL,
    BYPASSED,
    MOST,
    bypassed_branches,
    group_macs,
    layer_shares,
)
from pfs_fast.budgets.ranking import Ranking, rank
from pfs_fast.budgets.solver import Sweep
from pfs_fast.graph.analysis import analyse

IMAGE = torch.zeros(1, 3, 16, 16)


def shares_of(model: nn.Module, example: torch.Tensor = IMAGE) -> dict[str, float]:
    cost_model = CostModel(analyse(model, example))
    shares = layer_shares(cost_model)
    return {part.group.name: share for part, share in zip(cost_model.parts, shares, strict=True)}


def of_torchvision(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network without storage, and an image."""
    options = {"init_weights": False} if name == "googlenet" else {}
    with torch.device("meta"):
        return torchvision.models.get_model(name, **options), torch.zeros(1, 3, 64, 64)


def test_gates_are_ranked_as_they_are():
    gates, died_at = random_gates(1, 12)
    scores = Ranking(CostModel(chain(4, 8)), "gates").scores(gates, died_at)
    assert scores[0] is gates and scores[1] is died_at


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("name", ["uniform", "layerwise"])
def test_shares_leave_the_order_within_a_part_to_the_gates(name, seed):
    groups = random_groups(seed)
    model = CostModel(groups)
    gates, died_at = random_gates(seed, groups.num_units)
    by_gates = rank(groups, gates, died_at)
    by_shares = rank(groups, *Ranking(model, name).scores(gates, died_at))
    for part in model.parts:
        own = np.isin(by_gates, part.units)
        assert (by_gates[own] == by_shares[np.isin(by_shares, part.units)]).all()


@pytest.mark.parametrize("name", ["uniform", "layerwise"])
def test_parts_keep_channels_in_proportion_to_their_shares(name):
    model = CostModel(analyse(pooled(), IMAGE))
    gates = np.random.default_rng(0).random(model.groups.num_units)
    shares = layer_shares(model) if name == "layerwise" else np.ones(len(model.parts))
    sweep = Sweep(model.groups, *Ranking(model, name).scores(gates, np.full(gates.shape, -1)))
    for steps in range(8, sweep.num_steps // 2, 5):
        keep = sweep.keep(steps)
        factor = [
            keep[p.units].sum() / (len(p.units) * s)
            for p, s in zip(model.parts, shares, strict=True)
        ]
        assert max(factor) - min(factor) <= 1.5 / 16  # one channel of the narrowest group


def test_dead_gates_are_ordered_by_death_within_their_group():
    groups = chain(4, 4)
    gates, died_at = np.zeros(8), np.array([3, 1, 2, 9, 5, 5, 7, -1])
    scores, deaths = Ranking(CostModel(groups), "uniform").scores(gates, died_at)
    assert (deaths == -1).all()
    assert np.argsort(-scores[:4]).tolist() == [3, 0, 2, 1]
    assert np.argsort(-scores[4:], kind="stable").tolist() == [3, 2, 0, 1]


def pooled() -> nn.Module:
    return nn.Sequential(
        cbr(3, 16), cbr(16, 16), nn.MaxPool2d(2), cbr(16, 32), cbr(32, 32, stride=2), head(32)
    )


@pytest.fixture
def place_alone(monkeypatch):
    """Shares by what reads a group, whatever its maps and costs."""
    monkeypatch.setattr(layerwise, "PIXELS_POWER", 0.0)
    monkeypatch.setattr(layerwise, "MACS_POWER", 0.0)


def test_groups_read_at_a_lower_resolution_get_more(place_alone):
    shares = list(shares_of(pooled()).values())
    assert shares == [1.0, BEFORE_POOL, BEFORE_POOL, BEFORE_POOL]


def test_a_depthwise_stride_is_within_a_group(place_alone):
    model = nn.Sequential(
        cbr(3, 8), cbr(8, 8, stride=2, groups=8), cbr(8, 8, 1), cbr(8, 8), head(8)
    )
    shares = list(shares_of(model).values())
    assert shares == [1.0, 1.0, BEFORE_POOL]


def test_shares_of_a_chain_go_by_its_maps_and_its_costs():
    shares = np.array(list(shares_of(pooled()).values()))
    sides = np.array([16, 16, 8, 4])
    convs = [3 * 16 * 9 * 256, 16 * 16 * 9 * 256, 16 * 32 * 9 * 64, 32 * 32 * 9 * 16]
    classifier = 32 * 4
    macs = np.array([a + b for a, b in zip(convs, [*convs[1:], classifier], strict=True)])
    expected = sides**0.375 / np.sqrt(macs)
    expected /= np.exp(np.average(np.log(expected[1:]), weights=macs[1:]))
    expected[0] = 1.0  # what is made of the image is as the others on average
    expected[1:] *= BEFORE_POOL
    assert np.allclose(shares, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["googlenet", "efficientnet_b0", "densenet121"])
def test_shares_of_a_chain_are_bounded_in_every_network(name):
    model, image = of_torchvision(name)
    shares = np.array(list(shares_of(model, image).values()))
    assert ((shares == BYPASSED) | ((shares >= 1 / MOST) & (shares <= MOST * BEFORE_POOL))).all()


def test_a_squeeze_that_costs_next_to_nothing_meets_the_bound():
    model, image = of_torchvision("efficientnet_b0")
    assert shares_of(model, image)["features.1.0.block.1.fc1"] == MOST


def test_what_costs_nothing_is_as_the_others_on_average():
    model, image = of_torchvision("googlenet")
    shares = shares_of(model, image)  # eval mode: the auxiliary heads are not computed
    assert shares["aux1.conv.conv"] == 1.0


def two_groups_in_one_depthwise_layer() -> tuple[nn.Module, torch.Tensor]:
    body = lambda m, x: m.mix(m.depthwise(torch.cat([m.a(x), m.b(x)], 1)))  # noqa: E731
    mix = nn.Sequential(cbr(10, 4), head(4))
    return Net(body, a=cbr(3, 4), b=cbr(3, 6), depthwise=cbr(10, 10, groups=10), mix=mix), IMAGE


@pytest.mark.parametrize(
    "network",
    [
        two_groups_in_one_depthwise_layer,
        *(
            functools.partial(of_torchvision, name)
            for name in ("vgg16_bn", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121")
        ),
    ],
)
def test_macs_of_a_group_are_those_that_the_network_loses_without_it(network):
    cost_model = CostModel(analyse(*network()))
    macs = group_macs(cost_model.groups)
    for group, found in zip(cost_model.groups.groups, macs, strict=True):
        keep = np.ones(cost_model.groups.num_units, dtype=bool)
        keep[group.start : group.start + group.size] = False
        assert np.isclose(found, cost_model.base[0] - cost_model.evaluate(keep)[0], rtol=1e-12)


class Residual(nn.Module):
    """Two branches into one sum; ``identity``: beside the input."""

    def __init__(self, identity: bool, squeeze: bool = False) -> None:
        super().__init__()
        self.stem = cbr(3, 8)
        self.a = nn.Sequential(cbr(8, 6), cbr(6, 5), cbr(5, 8, 1))
        self.b = nn.Sequential(cbr(8, 7), cbr(7, 8, 1))
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 3, 1), nn.ReLU(), nn.Conv2d(3, 6, 1), nn.Sigmoid()
        )
        self.identity, self.squeeze = identity, squeeze
        self.head = nn.Sequential(cbr(8, 8), head(8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        a = self.a[0](x)
        a = self.a[2](self.a[1](a * self.gate(a) if self.squeeze else a))
        b = self.b(x)
        return self.head(a + b + x if self.identity else a + b)


def test_an_identity_bypasses_both_branches():
    assert bypassed_branches(analyse(Residual(True), IMAGE)) == (("a.0.0", "a.1.0"), ("b.0.0",))


def test_without_an_identity_one_branch_stays():
    assert bypassed_branches(analyse(Residual(False), IMAGE)) == (("a.0.0", "a.1.0"),)


def test_a_squeeze_excite_goes_with_its_branch():
    branches = bypassed_branches(analyse(Residual(True, squeeze=True), IMAGE))
    assert branches == (("a.0.0", "gate.1", "a.1.0"), ("b.0.0",))


def test_nothing_bypasses_a_chain_or_a_concatenation():
    model = pfs.models.get("vgg16", num_classes=10, expansion=0.25)
    assert bypassed_branches(analyse(model, torch.zeros(1, 3, 32, 32))) == ()


def test_only_branches_at_the_highest_resolution_get_little():
    shares = shares_of(pfs.models.get("resnet20", num_classes=10), torch.zeros(1, 3, 32, 32))
    assert {name for name, share in shares.items() if share == BYPASSED} == {
        f"layer1.{block}.conv1" for block in range(3)
    }
    assert set(shares.values()) == {BYPASSED, 1.0}


def test_a_branch_is_of_the_resolution_at_which_it_joins_the_sum():
    with torch.device("meta"):
        model, image = torchvision.models.resnet50(), torch.zeros(1, 3, 64, 64)
    shares = shares_of(model, image)
    assert shares["layer1.2.conv2"] == BYPASSED
    assert shares["layer2.0.conv1"] == 1.0  # strided later in the branch
    assert shares["conv1"] == BEFORE_POOL


class Unread(Residual):
    """Its first branch is computed for nobody."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        self.a[0](x)
        return self.head(self.b(x) + x)


def test_a_branch_that_nobody_reads_does_not_count_as_one_at_the_highest_resolution():
    shares = shares_of(Unread(True))
    assert (shares["a.0.0"], shares["b.0.0"]) == (1.0, BYPASSED)
