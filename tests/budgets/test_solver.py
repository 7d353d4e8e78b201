from __future__ import annotations

import itertools
import time
import warnings

import numpy as np
import pytest
from structure_cases import chain, conv, fixed, group, plain_cost, random_gates, random_groups

from pfs_fast.budgets.budget import Budget, Limits
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.ranking import rank
from pfs_fast.budgets.solver import Sweep, pareto, solve
from pfs_fast.errors import InfeasibleBudgetError, StructureError
from pfs_fast.graph.groups import ChannelGroups

ALIVE = np.full(100, -1)
BUDGETS = [0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0]


def quiet_solve(*args: object) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return solve(*args)


def next_channels(
    groups: ChannelGroups, gates: np.ndarray, died_at: np.ndarray, keep: np.ndarray, limits: Limits
) -> np.ndarray | None:
    """The kept units once the next channel or block has entered, by brute force; None where none is left."""
    best = {unit: position for position, unit in enumerate(rank(groups, gates, died_at))}
    candidates = []
    for part in CostModel(groups).parts:
        step = limits.multiple_of // np.gcd(limits.multiple_of, part.group.channels_per_unit)
        left = sorted((unit for unit in part.units if not keep[unit]), key=best.get)[:step]
        if len(left) == step:
            candidates.append((best[left[-1]], left))
    if not candidates:
        return None
    wider = keep.copy()
    wider[min(candidates)[1]] = True
    return wider


@pytest.mark.parametrize("seed", range(24))
def test_solution_is_within_the_limits_and_the_next_channel_is_not(seed):
    groups = random_groups(seed)
    model = CostModel(groups)
    feasible = 0
    for trial in range(5):
        gates, died_at = random_gates(5 * seed + trial, groups.num_units)
        multiple_of, min_channels = [(1, 1), (1, 3), (4, 1), (8, 1), (6, 2)][trial]
        for share in BUDGETS:
            budget = Budget(
                macs=share if trial != 1 else None,
                params=share if trial in (1, 3) else None,
                multiple_of=multiple_of,
                min_channels=min_channels,
            )
            limits = budget.resolve(model.base)
            try:
                keep = quiet_solve(groups, gates, died_at, limits, model)
            except InfeasibleBudgetError:
                assert not limits.allow(
                    Sweep(
                        groups, gates, died_at, multiple_of=multiple_of, min_channels=min_channels
                    ).floor
                )
                continue
            feasible += 1
            assert limits.allow(plain_cost(groups, keep))
            wider = next_channels(groups, gates, died_at, keep, limits)
            assert wider is None or not limits.allow(plain_cost(groups, wider))
    assert feasible > 10


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("multiple_of", [1, 4])
def test_kept_sets_are_nested_in_the_budget(seed, multiple_of):
    groups = random_groups(seed)
    gates, died_at = random_gates(seed, groups.num_units)
    points = pareto(groups, gates, died_at, multiple_of=multiple_of)
    assert len(points) > 2
    for smaller, larger in itertools.pairwise(points):
        assert not (smaller.keep & ~larger.keep).any()
        assert smaller.macs <= larger.macs and smaller.params <= larger.params


def test_solution_keeps_the_largest_gates():
    gates = np.array([0.9, 0.1, 0.8, 0.2, 0.7, 0.3, 0.6, 0.4])
    one = CostModel(chain(8)).evaluate(np.arange(8) < 1)[0]
    per_channel = CostModel(chain(8)).evaluate(np.arange(8) < 2)[0] - one
    keep = solve(chain(8), gates, ALIVE[:8], Limits(macs=one + 3 * per_channel))
    assert np.flatnonzero(keep).tolist() == [0, 2, 4, 6]


def test_rank_breaks_ties_of_dead_gates_by_death_then_index():
    gates = np.array([0.0, 0.5, 0.0, 0.5, 0.0, 0.0, 1e-30])
    died_at = np.array([10, 7, 30, -1, 10, -1, -1])  # the 7 belongs to a gate that came back
    assert rank(chain(7), gates, died_at).tolist() == [1, 3, 6, 5, 2, 0, 4]


def test_dead_channels_enter_in_order_of_death():
    gates, died_at = np.zeros(6), np.array([1, 5, 3, 5, 2, 4])
    groups = chain(6)
    cost = [CostModel(groups).evaluate(np.arange(6) < n)[0] for n in range(7)]
    with pytest.warns(
        UserWarning,
        match="solve: all 6 gates of group conv0 are 0; it keeps 3, those that died last",
    ):
        keep = solve(groups, gates, died_at, Limits(macs=cost[3]))
    assert np.flatnonzero(keep).tolist() == [1, 3, 5]


def test_dead_group_keeps_min_channels_and_warns():
    gates = np.array([1.0] * 8 + [0.0] * 4)
    died_at = np.array([-1] * 8 + [3, 9, 5, 9])
    limits = Budget(macs=0.25, min_channels=2).resolve(CostModel(chain(8, 4)).base)
    with pytest.warns(UserWarning, match="group conv1 are 0; it keeps 2") as record:
        keep = solve(chain(8, 4), gates, died_at, limits)
    assert len(record) == 1
    assert keep[8:].tolist() == [False, True, False, True]


@pytest.mark.parametrize("seed", range(10))
def test_whole_budget_keeps_everything(seed):
    groups = random_groups(seed)
    gates, died_at = random_gates(seed, groups.num_units)
    assert quiet_solve(
        groups, gates, died_at, Budget(macs=1.0).resolve(CostModel(groups).base)
    ).all()


@pytest.mark.parametrize("multiple_of", [2, 3, 4, 8, 16])
def test_widths_are_multiples_where_the_group_is_wide_enough(multiple_of):
    groups = chain(20, 7, 33, 16)
    gates, died_at = random_gates(1, groups.num_units)
    for share in (0.6, 0.9, 1.0):
        budget = Budget(macs=share, multiple_of=multiple_of)
        keep = quiet_solve(groups, gates, died_at, budget.resolve(CostModel(groups).base))
        for g in groups.groups:
            width = int(keep[g.start : g.start + g.size].sum())
            assert width % multiple_of == 0 if g.size >= multiple_of else width == g.size


def test_multiples_count_channels_of_grouped_convolutions():
    out = np.tile(np.arange(12), 4)
    groups = ChannelGroups(
        (group("a", 0, 12, 4),), (conv("a", out, fixed(3)), conv("b", out, out, groups=4)), (), 0, 0
    )
    gates, died_at = random_gates(0, 12)
    for share in (0.3, 0.5, 0.8):
        limits = Budget(params=share, multiple_of=8).resolve(CostModel(groups).base)
        assert quiet_solve(groups, gates, died_at, limits).sum() % 2 == 0


def test_block_enters_with_its_worst_member():
    # Blocks of 2: conv0 (0.9, 0.1), conv1 (0.5, 0.4); after the floor block of each, conv1's enters first.
    groups = chain(4, 4)
    gates = np.array([1.0, 1.0, 0.9, 0.1, 1.0, 1.0, 0.5, 0.4])
    keep = np.array([1, 1, 0, 0, 1, 1, 1, 1], dtype=bool)
    assert (
        solve(groups, gates, ALIVE[:8], Limits(macs=plain_cost(groups, keep)[0], multiple_of=2))
        == keep
    ).all()


def test_every_part_of_a_group_keeps_a_channel():
    units = np.arange(10)
    layers = (
        conv("a", units[:4], fixed(3)),
        conv("b", units[4:], fixed(3)),
        conv("c", fixed(5), units),
    )
    groups = ChannelGroups((group("a", 0, 10),), layers, (), 0, 0)
    keep = solve(groups, np.arange(10) / 10, ALIVE[:10], Limits(macs=CostModel(groups).floor()[0]))
    assert np.flatnonzero(keep).tolist() == [3, 9]


def test_infeasible_budget_prints_the_range():
    groups = chain(8, 8)
    model = CostModel(groups)
    low, base = model.floor(min_channels=2), model.base
    text = (
        rf"solve: budget must be feasible: macs must be in \[{low[0]:,}, {base[0]:,}\] \(.* to 100 %\), got 50; "
        rf"params must be in \[{low[1]:,}, {base[1]:,}\] .*, got 5; raise the limit, lower min_channels \(2\)"
    )
    with pytest.raises(InfeasibleBudgetError, match=text):
        solve(groups, np.ones(16), ALIVE[:16], Limits(macs=50, params=5, min_channels=2))
    solve(groups, np.ones(16), ALIVE[:16], Limits(*low, min_channels=2))


@pytest.mark.parametrize(
    ("gates", "died_at", "text"),
    [
        (np.ones(3), ALIVE[:4], r"solve: gates must have shape \[4\], got \[3\]"),
        (np.ones(4), ALIVE[:3], r"solve: died_at must have shape \[4\], got \[3\]"),
        (
            np.array([1, 1, np.nan, 1]),
            ALIVE[:4],
            "solve: gates must be finite and at least 0, got nan for unit 2",
        ),
        (np.array([1, -1, 1, 1]), ALIVE[:4], "got -1 for unit 1"),
    ],
)
def test_solve_names_bad_gates(gates, died_at, text):
    with pytest.raises(StructureError, match=text):
        solve(chain(4), gates, died_at, Limits(macs=10**9))


def test_pareto_defaults_to_the_feasible_twentieths():
    groups = chain(8, 8)
    model = CostModel(groups)
    points = pareto(groups, np.arange(16) / 16, ALIVE[:16])
    share = model.floor()[0] / model.base[0]
    assert [p.fraction for p in points] == [i / 20 for i in range(1, 21) if i / 20 >= share]
    assert points[-1].keep.all() and points[-1][1:3] == model.base
    assert all(p.macs <= p.fraction * model.base[0] for p in points)


def test_pareto_refuses_an_infeasible_fraction_that_was_asked_for():
    with pytest.raises(InfeasibleBudgetError, match="macs must be in"):
        pareto(chain(8, 8), np.ones(16), ALIVE[:16], [0.5, 0.001])


def test_pareto_shares_refer_to_the_reference():
    groups = chain(8, 8)
    base = CostModel(groups).base
    (point,) = pareto(groups, np.ones(16), ALIVE[:16], [0.8], reference=(base[0] // 2, base[1]))
    assert point.macs <= 0.4 * base[0]


def test_sweep_of_twelve_thousand_units_is_fast():
    # A guard against a quadratic solver, loose enough for a busy machine.
    groups = chain(*[256] * 48)
    model = CostModel(groups)
    gates, died_at = random_gates(0, groups.num_units)
    limits = Budget(macs=0.5).resolve(model.base)
    start = time.perf_counter()
    quiet_solve(groups, gates, died_at, limits, model)
    assert time.perf_counter() - start < 0.5
