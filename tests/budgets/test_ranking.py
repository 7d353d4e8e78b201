"""The order in which channels enter a structure: by gates alone, or by shares of every group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision
from small_nets import cbr, head
from structure_cases import chain, random_gates, random_groups
from torch import nn

import pfs_fast as pfs
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.layerwise import (
    BEFORE_POOL,
    BYPASSED,
    ELSEWHERE,
    LayerShares,
    bypassed_branches,
)
from pfs_fast.budgets.ranking import Ranking, rank
from pfs_fast.budgets.solver import Sweep
from pfs_fast.graph.analysis import analyse

IMAGE = torch.zeros(1, 3, 16, 16)


def factors_of(model: nn.Module, example: torch.Tensor = IMAGE) -> dict[str, float]:
    cost_model = CostModel(analyse(model, example))
    factors = LayerShares(cost_model).factors
    return {part.group.name: factor for part, factor in zip(cost_model.parts, factors, strict=True)}


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
    shares = LayerShares(model)(gates) if name == "layerwise" else np.ones(len(model.parts))
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


def test_groups_read_at_a_lower_resolution_get_more():
    shares = list(factors_of(pooled()).values())
    assert shares == [ELSEWHERE, BEFORE_POOL, BEFORE_POOL, BEFORE_POOL]


def test_a_depthwise_stride_is_within_a_group():
    model = nn.Sequential(
        cbr(3, 8), cbr(8, 8, stride=2, groups=8), cbr(8, 8, 1), cbr(8, 8), head(8)
    )
    shares = list(factors_of(model).values())
    assert shares == [ELSEWHERE, ELSEWHERE, BEFORE_POOL]


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
    shares = factors_of(pfs.models.get("resnet20", num_classes=10), torch.zeros(1, 3, 32, 32))
    assert {name for name, share in shares.items() if share == BYPASSED} == {
        f"layer1.{block}.conv1" for block in range(3)
    }
    assert set(shares.values()) == {BYPASSED, ELSEWHERE}


def test_a_branch_is_of_the_resolution_at_which_it_joins_the_sum():
    with torch.device("meta"):
        model, image = torchvision.models.resnet50(), torch.zeros(1, 3, 64, 64)
    shares = factors_of(model, image)
    assert shares["layer1.2.conv2"] == BYPASSED
    assert shares["layer2.0.conv1"] == ELSEWHERE  # strided later in the branch
    assert shares["conv1"] == BEFORE_POOL


def test_mean_gates_weigh_the_groups_of_a_chain():
    model = CostModel(analyse(pooled(), IMAGE))
    gates = np.repeat([0.2, 0.6, 0.0, 0.4], [group.size for group in model.groups.groups])
    shares = LayerShares(model)
    assert shares.by_gates.all()
    expected = np.array([0.2, 0.6, 0.3 * BYPASSED, 0.4]) / 0.3  # of the mean
    assert np.allclose(shares(gates), shares.factors * expected)
    assert (shares(np.zeros_like(gates)) == shares.factors).all()


def test_gates_of_streams_and_branches_do_not_weigh():
    model = CostModel(analyse(Residual(True), IMAGE))
    shares = LayerShares(model)
    names = [part.group.name for part in model.parts]
    assert dict(zip(names, shares.by_gates, strict=True)) == {
        "stem.0": False,
        "a.0.0": False,
        "a.1.0": False,
        "b.0.0": False,
        "head.0.0": True,
    }
    gates = np.random.default_rng(0).random(model.groups.num_units)
    assert (shares(gates)[:-1] == shares.factors[:-1]).all()


class Unread(Residual):
    """Its first branch is computed for nobody."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        self.a[0](x)
        return self.head(self.b(x) + x)


def test_a_branch_that_nobody_reads_does_not_count_as_one_at_the_highest_resolution():
    factors = factors_of(Unread(True))
    assert (factors["a.0.0"], factors["b.0.0"]) == (ELSEWHERE, BYPASSED)
