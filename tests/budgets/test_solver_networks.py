"""The budget solver on whole networks of the paper: a thousand random gate vectors and budgets for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pfs_fast import models
from pfs_fast.budgets.budget import Budget
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.ranking import Ranking, rank
from pfs_fast.budgets.solver import solve
from pfs_fast.gating.scope import gated_groups
from pfs_fast.graph.analysis import analyse, channel_graph

TRIALS = 1000


@pytest.mark.filterwarnings("ignore:solve. all .* gates of group:UserWarning")
@pytest.mark.parametrize(
    ("build", "size"), [(models.vgg16, 32), (models.resnet20, 32), (models.mobilenet_v2, 64)]
)
def test_budgets_are_never_exceeded_and_the_next_channel_would(build, size):
    groups = analyse(build(), torch.zeros(1, 3, size, size))
    model = CostModel(groups)
    floor_share = max(low / full for low, full in zip(model.floor(), model.base, strict=True))
    rng = np.random.default_rng(0)
    steps_left = 0
    for trial in range(TRIALS):
        gates = rng.random(groups.num_units)
        gates[rng.random(groups.num_units) < rng.choice([0.0, 0.2, 0.6])] = 0
        died_at = np.where(gates == 0, rng.integers(0, 50, groups.num_units), -1)
        share = float(rng.uniform(floor_share + 0.005, 1.0))
        asked = [{"macs": share}, {"params": share}, {"macs": share, "params": share}][trial % 3]
        limits = Budget(**asked, multiple_of=1).resolve(model.base)
        keep = solve(groups, gates, died_at, limits, model)
        assert limits.allow(model.evaluate(keep))
        order = rank(groups, gates, died_at)
        left = order[~keep[order]]
        if left.size:
            keep[left[0]] = True
            assert not limits.allow(model.evaluate(keep))
            steps_left += 1
    assert steps_left > 0.95 * TRIALS


@pytest.mark.filterwarnings("ignore:solve. all .* gates of group:UserWarning")
@pytest.mark.parametrize("vectors", ["AVX512", "AVX2"])
@pytest.mark.parametrize("scope", ["paper", "all"])
@pytest.mark.parametrize("ranking", ["gates", "layerwise"])
@pytest.mark.parametrize(
    ("build", "size"),
    [
        (models.vgg16, 32),
        (models.resnet20, 32),
        (models.resnet56, 32),
        (models.mobilenet_v1, 64),
        (models.mobilenet_v2, 64),
        (models.resnet50, 64),
    ],
)
def test_default_budgets_are_met_closely_with_few_widths_off_the_multiple(
    build, size, ranking, scope, vectors, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    network = build()
    groups = gated_groups(channel_graph(network, torch.zeros(1, 3, size, size)), network, scope)
    model, rng = CostModel(groups), np.random.default_rng(0)
    multiple = {"AVX512": 16, "AVX2": 8}[vectors]
    for share in (0.5, 0.3):
        limits = Budget(macs=share, device="cpu").resolve(model.base)
        gates = np.clip(rng.normal(0.3, 0.4, groups.num_units), 0, 1)
        scores = Ranking(model, ranking).scores(gates, np.where(gates == 0, 1, -1))
        keep = solve(groups, *scores, limits, model)
        macs, _ = model.evaluate(keep)
        assert limits.macs - 0.03 * model.base[0] <= macs <= limits.macs
        between = above = 0
        for part in model.parts:
            channels = int(keep[part.units].sum()) * part.group.channels_per_unit
            whole = len(part.units) * part.group.channels_per_unit
            if channels % multiple and channels != whole:
                above += channels > multiple
                between += 1
        assert above <= 1
        # Below a whole block only where not even one block of every part fits.
        one_each = sum_of_floors(model, multiple)
        assert between <= 1 or one_each > limits.macs


def sum_of_floors(model, multiple):
    return model.floor(1, multiple)[0]


def test_default_widths_grow_with_the_budget():
    groups = analyse(models.resnet20(), torch.zeros(1, 3, 32, 32))
    model, rng = CostModel(groups), np.random.default_rng(1)
    gates, alive = rng.random(groups.num_units), np.full(groups.num_units, -1)
    before = np.zeros(groups.num_units, dtype=bool)
    for share in np.linspace(0.02, 1.0, 99):
        limits = Budget(macs=float(share), device="cpu").resolve(model.base)
        keep = solve(groups, gates, alive, limits, model)
        assert not (before & ~keep).any()
        before = keep
    assert before.all()


def test_default_budget_reaches_as_low_as_single_channels():
    groups = analyse(models.vgg16(), torch.zeros(1, 3, 32, 32))
    model = CostModel(groups)
    gates, alive = np.ones(groups.num_units), np.full(groups.num_units, -1)
    limits = Budget(macs=model.floor(1, 1)[0], device="cpu").resolve(model.base)
    keep = solve(groups, gates, alive, limits, model)
    assert model.evaluate(keep) == model.floor(1, 1)
