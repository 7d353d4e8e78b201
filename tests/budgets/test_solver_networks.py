"""The budget solver on whole networks of the paper: a thousand random gate vectors and budgets for each."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pfs_fast import models
from pfs_fast.budgets.budget import Budget
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.ranking import rank
from pfs_fast.budgets.solver import solve
from pfs_fast.graph.analysis import analyse

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
        budget = [Budget(macs=share), Budget(params=share), Budget(macs=share, params=share)][
            trial % 3
        ]
        limits = budget.resolve(model.base)
        keep = solve(groups, gates, died_at, limits, model)
        assert limits.allow(model.evaluate(keep))
        order = rank(groups, gates, died_at)
        left = order[~keep[order]]
        if left.size:
            keep[left[0]] = True
            assert not limits.allow(model.evaluate(keep))
            steps_left += 1
    assert steps_left > 0.95 * TRIALS
