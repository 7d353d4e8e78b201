"""A batch norm with a forward of its own is a batch norm where it computes one."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_nets import Frozen, batches, conv, head
from torch import nn

import pfs_fast as pfs
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.structure import Structure
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.graph.trace import trace
from pfs_fast.slimming.verify import verify

X = torch.randn(4, 3, 6, 6)


class NormAct(nn.BatchNorm2d):
    """Batch norm and activation in one module, as timm's BatchNormAct2d."""

    def __init__(self, channels: int, act: nn.Module | None = None, **options) -> None:
        super().__init__(channels, **options)
        self.act = act or nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = self.track_running_stats or not self.training
        y = F.batch_norm(
            x,
            self.running_mean if own else None,
            self.running_var if own else None,
            self.weight,
            self.bias,
            self.training or self.running_mean is None,
            self.momentum,
            self.eps,
        )
        return self.act(y)


class Doubled(NormAct):
    """Computes something else with its own tensors."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.batch_norm(
            x, self.running_mean, self.running_var, self.weight * 2, self.bias, self.training
        )
        return self.act(y)


def net(norm: nn.Module) -> nn.Module:
    return nn.Sequential(conv(3, 6), norm, conv(6, 5), nn.BatchNorm2d(5), nn.ReLU(), head(5))


NORMS = {
    "relu": lambda: NormAct(6),
    "silu": lambda: NormAct(6, nn.SiLU()),
    "no affine": lambda: NormAct(6, affine=False),
    "no statistics": lambda: NormAct(6, track_running_stats=False),
    "momentum and eps": lambda: NormAct(6, momentum=0.3, eps=1e-2),
}


@pytest.mark.parametrize("name", NORMS)
def test_norm_with_an_activation_is_followed_and_cut(name):
    model = net(NORMS[name]())
    groups = channel_graph(model, X).groups
    assert [(g.name, g.size, g.followers) for g in groups.groups] == [
        ("0", 6, ("1",)),
        ("2", 5, ("3",)),
    ]
    keep = np.ones(11, dtype=bool)
    keep[[1, 4, 7]] = False
    structure = Structure.from_keep(groups, keep, CostModel(groups))
    assert verify(model, None, structure, X, trials=1).passed


def test_activation_that_is_not_zero_at_zero_holds_the_channels():
    groups = channel_graph(net(NormAct(6, nn.Sigmoid())), X).groups
    assert [g.name for g in groups.groups] == ["2"]
    assert "would not be 0" in dict(groups.fixed)["0"]


def test_other_function_of_the_same_tensors_is_held_whole():
    groups = channel_graph(net(Doubled(6)), X).groups
    assert [g.name for g in groups.groups] == ["2"]
    assert "batch_norm" in dict(groups.fixed)["0"]


def test_graphs_compute_what_the_model_does():
    model = net(NormAct(6, nn.SiLU())).double()
    x = X.double()
    traced = trace(model, x)
    # A forward in train mode changes running statistics, which the graphs share.
    for training, graph in ((False, traced.eval), (True, traced.train)):
        expected = copy.deepcopy(model).train(training)(x)
        torch.testing.assert_close(graph.train(training)(x), expected, rtol=1e-12, atol=1e-12)


def test_search_leaves_the_model_and_its_classes_alone():
    model = net(NormAct(6))
    frozen = Frozen(model)
    result = pfs.search(
        model,
        batches(),
        0.5,
        config=pfs.SearchConfig(epochs=1, backend="reference"),
        progress=False,
    )
    frozen.check()
    slim = result.slim()
    assert type(model[1]) is type(slim[1]) is NormAct
    assert slim[1].num_features == len(result.structure.layers["1"]) < 6
