"""Least and most widths of single layers, and layers that a budget ignores."""

from __future__ import annotations

import numpy as np
import pytest
from structure_cases import chain, conv, fixed, group, plain_cost, random_gates, random_groups

from pfs_fast.budgets.bounds import unit_bounds, without_ignored
from pfs_fast.budgets.budget import Budget, Limits
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.solver import solve
from pfs_fast.errors import BudgetError, InfeasibleBudgetError, ModelError
from pfs_fast.graph.groups import ChannelGroups
from pfs_fast.graph.patterns import matching, require_known

LAYERS = ["conv1", "layer1.0.conv1", "layer1.0.bn1", "layer1.1.conv1", "layer10.0.conv1", "fc"]


@pytest.mark.parametrize(
    ("pattern", "layers"),
    [
        ("conv1", ["conv1"]),
        ("layer1", ["layer1.0.conv1", "layer1.0.bn1", "layer1.1.conv1"]),
        ("layer1.*.conv1", ["layer1.0.conv1", "layer1.1.conv1"]),
        ("layer*.0", ["layer1.0.conv1", "layer1.0.bn1", "layer10.0.conv1"]),
        ("layer1.[01].conv?", ["layer1.0.conv1", "layer1.1.conv1"]),
        ("*conv1", ["conv1", "layer1.0.conv1", "layer1.1.conv1", "layer10.0.conv1"]),
        ("Conv1", []),
    ],
)
def test_patterns_mean_layers_by_name_or_by_the_module_around_them(pattern, layers):
    assert matching(pattern, LAYERS) == layers


@pytest.mark.parametrize(
    ("pattern", "closest"),
    [
        ("layer1.0.conv2", "'layer1.0.conv1'"),
        ("Layer1", "'layer1'"),
        ("cnv1", "'conv1'"),
        ("stage7", "'conv1', 'layer1.0.conv1'"),
    ],
)
def test_unknown_pattern_offers_the_closest_names(pattern, closest):
    message = rf"Budget: ignore must name layers of the model, got '{pattern}', which matches none; the closest names are .*{closest}"
    with pytest.raises(BudgetError, match=message):
        require_known("ignore", pattern, LAYERS)


def bounds(groups: ChannelGroups, **limits) -> list[tuple[int, int]]:
    return unit_bounds(CostModel(groups), Limits(**limits))


def widths(**ends) -> tuple:
    return tuple(ends.items())


@pytest.mark.parametrize(
    ("limits", "expected"),
    [
        ({}, [(1, 20), (1, 8)]),
        ({"widths": widths(conv0=(4, 10))}, [(4, 10), (1, 8)]),
        ({"widths": widths(bn0=(4, 10))}, [(4, 10), (1, 8)]),
        ({"widths": widths(conv0=(None, 10))}, [(1, 10), (1, 8)]),
        ({"widths": widths(conv0=(4, None))}, [(4, 20), (1, 8)]),
        ({"widths": widths(conv0=(0.33, 0.67))}, [(7, 13), (1, 8)]),  # 6.6 and 13.4
        ({"widths": widths(conv0=(0.3, 0.7))}, [(6, 14), (1, 8)]),  # as written, not as the float
        ({"widths": (("*", (2, 0.5)), ("conv1", (3, None)))}, [(2, 10), (3, 4)]),
        ({"widths": widths(conv0=(5, 14)), "multiple_of": 4}, [(8, 12), (4, 8)]),
        ({"widths": widths(conv0=(17, None)), "multiple_of": 4}, [(20, 20), (4, 8)]),
        ({"widths": widths(conv0=(17, None)), "multiple_of": 8}, [(20, 20), (8, 8)]),
        ({"ignore": ("conv1",), "min_channels": 3}, [(3, 20), (8, 8)]),
        ({"ignore": ("bn0",)}, [(20, 20), (1, 8)]),
        ({"ignore": ("fc",)}, [(1, 20), (1, 8)]),
    ],
)
def test_bounds_of_every_part(limits, expected):
    assert bounds(chain(20, 8), **limits) == expected


def test_bounds_count_channels_of_the_layer_not_units():
    out = np.tile(np.arange(6), 4)
    groups = ChannelGroups((group("a", 0, 6, 4),), (conv("a", out, fixed(1)),), (), 0, 0)
    assert bounds(groups, widths=widths(a=(5, 15))) == [(2, 3)]


def test_bounds_of_a_layer_with_fixed_channels_count_those_too():
    groups = ChannelGroups(
        (group("a", 0, 6),), (conv("a", np.append(np.arange(6), fixed(4)), fixed(1)),), (), 0, 0
    )
    assert bounds(groups, widths=widths(a=(5, 7))) == [(1, 3)]


def test_bounds_of_a_layer_over_two_parts_hold_for_their_sum():
    units = np.arange(12)
    layers = (
        conv("a", units[:4], fixed(3)),
        conv("b", units[4:], fixed(3)),
        conv("dw", units, units, groups=12),
    )
    groups = ChannelGroups((group("a", 0, 12),), layers, (), 0, 0)
    (low_a, high_a), (low_b, high_b) = bounds(groups, widths=widths(dw=(5, 9)))
    assert low_a + low_b >= 5 and high_a + high_b <= 9
    assert bounds(groups, widths=widths(b=(2, 6))) == [(1, 4), (2, 6)]


CONTRADICTIONS = {
    "two patterns": (
        {"widths": (("conv0", (12, None)), ("conv*", (None, 6)))},
        r"width of group 'conv0' must not contradict each other, got at least 12 channels by widths\['conv0'\] \(12, None\) "
        r"and at most 6 by widths\['conv\*'\] \(None, 6\); its width can be 12 to 20",
    ),
    "below min_channels": (
        {"widths": widths(conv0=(None, 3)), "min_channels": 4},
        r"at least 4 channels by min_channels=4 and at most 3 by widths\['conv0'\]",
    ),
    "below a multiple": (
        {"widths": widths(conv0=(None, 7)), "multiple_of": 8},
        r"at least 8 channels by multiple_of=8 and min_channels=1 and at most 7 by .* in multiples of 8",
    ),
    "narrower than a multiple": (
        {"widths": widths(conv1=(None, 4)), "multiple_of": 16},
        "group 'conv1' .* at least 8 channels by multiple_of=16 .* and at most 4",
    ),
    "no multiple between": (
        {"widths": widths(conv0=(9, 15)), "multiple_of": 8},
        "at least 16 channels .* and at most 15 by",
    ),
    "ignored": (
        {"widths": widths(conv0=(None, 7)), "ignore": ("conv0",)},
        "at least 20 channels by ignore, which names 'conv0' and at most 7",
    ),
    "above the layer's width": (
        {"widths": widths(conv0=(64, None))},
        r"widths\['conv0'\] \(64, None\) must be feasible: layer 'conv0' has 20 channels, so its least must be in \[1, 20\], got 64",
    ),
    "a layer that is held whole": (
        {"widths": widths(fc=(None, 5))},
        r"widths\['fc'\] \(None, 5\) must mean a layer that can be narrowed, got 'fc' with 10 channels, held whole: it is the output",
    ),
    "unknown": ({"widths": widths(conv7=(1, 5))}, "widths must name layers .* got 'conv7'"),
    "unknown to ignore": ({"ignore": ("conv7",)}, "ignore must name layers .* got 'conv7'"),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_contradictions_name_both_rules_and_the_range(case):
    limits, message = CONTRADICTIONS[case]
    groups = chain(20, 8)
    groups.__dict__["fixed"] = (("fc", "it is the output"),)
    with pytest.raises(BudgetError, match=f"Budget: .*{message}"):
        bounds(groups, **limits)


def test_a_pattern_over_whole_and_prunable_layers_binds_the_prunable_ones():
    assert bounds(chain(20, 8), widths=(("*", (None, 5)),)) == [(1, 5), (1, 5)]


@pytest.mark.parametrize("seed", range(12))
def test_solution_obeys_the_widths_and_the_budget(seed):
    groups = random_groups(seed)
    model = CostModel(groups)
    gates, died_at = random_gates(seed, groups.num_units)
    rng = np.random.default_rng(seed)
    rules = {}
    for g in groups.groups:
        whole = g.size * g.channels_per_unit
        if rng.random() < 0.5 and all(len(p.units) == g.size for p in model.parts if p.group is g):
            rules[g.name] = (
                int(rng.integers(1, whole // 3 + 2)),
                int(rng.integers(whole // 2 + 1, whole + 1)),
            )
    rules = {n: (a, b) for n, (a, b) in rules.items() if a <= b // 2}
    ignored = [g.name for g in groups.groups if g.name not in rules and rng.random() < 0.3]
    solved = 0
    for share in (0.2, 0.5, 0.8, 1.0):
        budget = Budget(macs=share, widths=rules, ignore=tuple(ignored))
        try:
            keep = solve(groups, gates + 0.01, died_at, budget.resolve(model.base), model)
        except InfeasibleBudgetError as error:
            assert "macs must be in [" in str(error)
            assert ("widen widths or ignore less" in str(error)) == bool(rules or ignored)
            continue
        solved += 1
        assert plain_cost(groups, keep)[0] <= share * model.base[0]
        for g in groups.groups:
            width = int(keep[g.start : g.start + g.size].sum()) * g.channels_per_unit
            least, most = rules.get(g.name, (1, g.size * g.channels_per_unit))
            # Units stand for several channels: the bounds are met by whole units.
            assert least <= width <= most
        for layer in groups.layers:
            assert layer.name not in ignored or keep[layer.out_units[layer.out_units >= 0]].all()
    assert solved


def test_the_widest_structure_is_printed_as_the_upper_end():
    groups = chain(8, 8)
    with pytest.raises(InfeasibleBudgetError, match=r"without them from macs [\d,]+"):
        solve(
            groups,
            np.ones(16),
            np.full(16, -1),
            Budget(macs=0.2, ignore=("conv0",)).resolve(CostModel(groups).base),
        )


def test_ignored_groups_get_no_gates():
    left = without_ignored(chain(4, 6, 8), ("bn1",))
    assert [g.name for g in left.groups] == ["conv0", "conv2"]
    assert left.fixed == (("conv1", "the budget ignores it"),)
    groups = chain(4, 6)
    assert without_ignored(groups, ()) is groups
    with pytest.raises(ModelError, match=r"got none; .*\n  conv0: the budget ignores it"):
        without_ignored(groups, ("conv*",))
