"""Slimming by the found groups is exact on whole networks: masked = slim, and predicted = counted costs."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

from pfs_fast import models
from pfs_fast.budgets.budget import Budget
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.solver import solve
from pfs_fast.budgets.structure import Structure
from pfs_fast.graph.analysis import analyse
from pfs_fast.graph.counting import count
from pfs_fast.slimming.slim import slim
from pfs_fast.slimming.verify import verify

# Input sizes are about the smallest that each network takes.
NETWORKS = {
    "alexnet": (64, {}),
    "densenet121": (32, {}),
    "efficientnet_b0": (32, {}),
    "googlenet": (32, {"aux_logits": False, "init_weights": False}),
    "inception_v3": (75, {"aux_logits": False, "init_weights": False}),
    "mnasnet1_0": (32, {}),
    "mobilenet_v2": (32, {}),
    "mobilenet_v3_small": (32, {}),
    "regnet_x_400mf": (32, {}),
    "regnet_y_400mf": (32, {}),
    "resnet18": (32, {}),
    "resnet50": (32, {}),
    "resnext50_32x4d": (32, {}),
    "shufflenet_v2_x1_0": (32, {}),
    "squeezenet1_1": (48, {}),
    "vgg16_bn": (32, {}),
}


PAPER = {
    "vgg16": 32,
    "vgg19": 32,
    "resnet20": 16,
    "resnet56": 16,
    "resnet50": 32,
    "mobilenet_v1": 32,
    "mobilenet_v2": 32,
}


def build(name: str) -> nn.Module:
    model = getattr(torchvision.models, name)(num_classes=10, **NETWORKS[name][1])
    if name == "vgg16_bn":  # its 120 million linear weights would only cost time
        model.classifier = nn.Sequential(nn.Linear(512 * 49, 32), nn.ReLU(True), nn.Linear(32, 10))
    return model


@pytest.mark.parametrize("name", NETWORKS)
def test_random_structure_of_torchvision_is_exact(name):
    check_random_structure(build(name), NETWORKS[name][0])


@pytest.mark.parametrize("name", PAPER)
def test_random_structure_of_the_paper_is_exact(name):
    check_random_structure(getattr(models, name)(expansion=1.25), PAPER[name])


def test_auxiliary_heads_of_train_mode_are_slimmed_along():
    model = torchvision.models.googlenet(num_classes=10, init_weights=False)
    for head in (model.aux1, model.aux2):  # their million linear weights would only cost time
        head.fc1, head.fc2 = nn.Linear(2048, 16), nn.Linear(16, 10)
    narrow = check_random_structure(model, 32)
    outputs = narrow.train()(torch.randn(2, 3, 32, 32))
    assert [tuple(output.shape) for output in outputs] == [(2, 10)] * 3


def test_fresh_vgg_is_drawn_by_its_own_rule():
    narrow = check_random_structure(models.vgg16(), 32)
    assert all((m.weight == 0.5).all() for m in narrow.modules() if isinstance(m, nn.BatchNorm2d))
    for conv in (narrow.features[8].conv, narrow.features[15].conv):
        expected = (2 / (9 * conv.out_channels)) ** 0.5
        assert abs(conv.weight.std().item() / expected - 1) < 0.02


def check_random_structure(model: nn.Module, size: int) -> nn.Module:
    """Cut a model to half of its MACs by random gates, assert that the cut is exact, and return it with fresh weights."""
    x = torch.zeros(2, 3, size, size)
    groups = analyse(model, x)
    cost_model = CostModel(groups)
    gates = np.random.default_rng(0).random(groups.num_units)
    limits = Budget(macs=0.5).resolve(cost_model.base)
    keep = solve(groups, gates, np.full(groups.num_units, -1), limits, cost_model)
    structure = Structure.from_keep(groups, keep, cost_model)

    report = verify(model, None, structure, x, trials=1)
    assert report.max_error < 1e-9

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # every parameter of these networks has a known initialiser
        narrow = slim(model, structure)
    cost = count(narrow, x[:1])
    assert (cost.macs, cost.params) == (structure.macs, structure.params)
    assert 0.4 * structure.base_macs < structure.macs <= 0.5 * structure.base_macs
    assert (structure.base_macs, structure.base_params) == cost_model.base
    return narrow
