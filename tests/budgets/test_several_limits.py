"""Several limits at once: none is exceeded, and the next channel or block would exceed one."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_nets import cbr, head
from structure_cases import plain_cost, random_gates, random_groups
from torch import nn

import pfs_fast as pfs
from pfs_fast.budgets.budget import Budget, Limits
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.ranking import Ranking, rank
from pfs_fast.budgets.solver import Sweep
from pfs_fast.errors import BudgetError, InfeasibleBudgetError
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.graph.groups import ChannelGroups
from pfs_fast.measuring.memory import ActivationModel, allocations
from pfs_fast.measuring.meters import Meters

SHARES = st.floats(0.02, 1.0)


class WidestPair:
    """A made-up peak: the largest sum of two neighbouring groups."""

    def __init__(self, groups: ChannelGroups) -> None:
        self.groups = groups

    def evaluate(self, keep: np.ndarray) -> int:
        widths = [int(keep[g.start : g.start + g.size].sum()) for g in self.groups.groups]
        return max(a + b for a, b in zip([0, *widths], widths, strict=False))


class Milliseconds:
    """A made-up latency: every channel takes a time of its own."""

    def __init__(self, groups: ChannelGroups, seed: int) -> None:
        self.times = np.random.default_rng(seed).random(groups.num_units) ** 3

    def evaluate(self, keep: np.ndarray) -> float:
        return 0.5 + float(self.times[keep].sum())


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, dict[str, Any]]:
    seed = draw(st.integers(0, 200))
    budget: dict[str, Any] = {
        "multiple_of": draw(st.sampled_from([1, 1, 2, 4])),
        "min_channels": draw(st.integers(1, 3)),
    }
    names = ("macs", "params", "weight_bytes", "peak_activation_bytes")
    for name in draw(st.lists(st.sampled_from(names), min_size=1, unique=True)):
        budget[name] = draw(SHARES)
    if draw(st.booleans()):
        budget["latency_ms"] = draw(st.floats(0.5, 30.0))
    if draw(st.booleans()):
        budget["widths"] = {f"conv{draw(st.integers(0, 5))}": (None, draw(st.integers(2, 20)))}
    if draw(st.booleans()):
        budget["ignore"] = [f"conv{draw(st.integers(0, 5))}"]
    return seed, budget


def next_blocks(
    groups: ChannelGroups,
    model: CostModel,
    order: np.ndarray,
    keep: np.ndarray,
    limits: Limits,
) -> np.ndarray | None:
    """The kept units once the next channel or block that widths allow has entered; None where none is left."""
    best = {unit: position for position, unit in enumerate(order)}
    most = {pattern: ends[1] for pattern, ends in limits.widths}
    candidates = []
    for part in model.parts:
        step = limits.multiple_of // np.gcd(limits.multiple_of, part.group.channels_per_unit)
        left = sorted((unit for unit in part.units if not keep[unit]), key=best.get)[:step]
        wider = keep.copy()
        wider[left] = True
        fits = all(
            int(wider[layer.out_units[layer.out_units >= 0]].sum()) <= most.get(layer.name, 10**9)
            for layer in groups.layers
        )
        if len(left) == step and fits:
            candidates.append((best[left[-1]], left))
    if not candidates:
        return None
    wider = keep.copy()
    wider[min(candidates)[1]] = True
    return wider


def costs(
    groups: ChannelGroups, keep: np.ndarray, limits: Limits, gauges: dict[str, Any]
) -> dict[str, Any]:
    """By the definition of each cost."""
    macs, params = plain_cost(groups, keep)
    known = {"macs": macs, "params": params, "weight_bytes": 4 * params}
    return {n: known[n] if n in known else gauges[n].evaluate(keep) for n in limits.asked()}


@settings(max_examples=150, deadline=None)
@given(cases())
def test_no_limit_is_exceeded_and_the_next_channel_exceeds_one(case):
    seed, wish = case
    groups = random_groups(seed)
    model = CostModel(groups)
    peak = WidestPair(groups)
    gauges = {"peak_activation_bytes": peak, "latency_ms": Milliseconds(groups, seed)}
    limits = Budget(**wish).resolve(model.base, peak.evaluate(np.ones(groups.num_units, bool)))
    gates, died_at = random_gates(seed, groups.num_units)
    try:
        sweep = Sweep.within(groups, gates, died_at, limits, model, gauges)
    except BudgetError as error:
        assert "contradict each other" in str(error)
        assert "widths" in wish
        return
    try:
        keep = sweep.largest(limits)
    except InfeasibleBudgetError as error:
        exceeded = limits.exceeded(costs(groups, sweep.keep(0), limits, gauges))
        assert exceeded
        for name in limits.asked():  # exactly the limits that cannot be met, each with its range
            assert (f"{name} must be in [" in str(error)) == (name in exceeded)
        return
    assert not limits.exceeded(costs(groups, keep, limits, gauges))
    for pattern, (_, most) in limits.widths:
        (layer,) = [la for la in groups.layers if la.name == pattern]
        assert keep[layer.out_units].sum() <= most
    for pattern in limits.ignore:
        (layer,) = [la for la in groups.layers if la.name == pattern]
        assert keep[layer.out_units].all()
    several = any(
        len(p.units) < p.group.size and (limits.widths) for p in model.parts
    )  # a bound shared between parts is not tight
    wider = next_blocks(groups, model, rank(groups, gates, died_at), keep, limits)
    if wider is not None and not several:
        assert limits.exceeded(costs(groups, wider, limits, gauges))


@functools.cache
def network() -> tuple[nn.Module, Meters]:
    torch.manual_seed(0)
    net = nn.Sequential(cbr(3, 12), cbr(12, 12, groups=12), cbr(12, 16, 1), cbr(16, 9), head(9))
    graph = channel_graph(net, torch.zeros(1, 3, 6, 6))
    return net, Meters(graph.groups, CostModel(graph.groups), net, (3, 6, 6), graph)


@settings(max_examples=40, deadline=None)
@given(macs=SHARES, params=SHARES, peak=st.floats(0.2, 1.0), batch=st.integers(1, 3))
def test_every_exact_limit_holds_on_the_slim_network(macs, params, peak, batch):
    net, meters = network()
    budget = Budget(macs=macs, params=params, peak_activation_bytes=peak, batch=batch)
    limits = meters.limits(budget, meters.cost_model.base)
    gates = np.random.default_rng(batch).random(meters.groups.num_units)
    try:
        keep, _ = meters.choose(gates, np.full(len(gates), -1), limits)
    except InfeasibleBudgetError:
        return
    structure = pfs.Structure.from_keep(meters.groups, keep, meters.cost_model)
    found = meters.measure(pfs.slim(net, structure), limits)
    for check in meters.checks(keep, limits, {}):
        assert found[check.name].median == check.predicted <= check.asked


def test_share_of_activations_is_of_the_searched_network():
    _, meters = network()
    limits = meters.limits(Budget(peak_activation_bytes=0.5, batch=2), (1, 1))
    assert limits.peak_activation_bytes == meters.memory(limits.run).base // 2
    half = meters.limits(Budget(peak_activation_bytes=0.5, batch=2, precision="bf16"), (1, 1))
    assert 2 * half.peak_activation_bytes == limits.peak_activation_bytes


def test_uniform_ranking_narrows_every_part_alike():
    _, meters = network()
    limits = meters.limits(Budget(macs=0.5, multiple_of=1), meters.cost_model.base)
    alike = np.zeros(37)
    uniform = Ranking(meters.cost_model, "uniform")
    keep, _ = meters.choose(*uniform.scores(alike, alike), limits)
    shares = [keep[p.units].mean() for p in meters.cost_model.parts]
    assert max(shares) - min(shares) < 0.15
    assert all(keep[p.units[: keep[p.units].sum()]].all() for p in meters.cost_model.parts)


@pytest.mark.parametrize(
    ("limit", "target"), [({"peak_activation_bytes": 0.5}, 0.6), ({"weight_bytes": 0.5}, 0.8)]
)
def test_target_of_other_limits_is_the_macs_they_leave(limit, target):
    net, _ = network()
    images = torch.zeros(4, 3, 6, 6)
    loader = [(images, torch.zeros(4, dtype=torch.int64))]
    config = pfs.SearchConfig(epochs=1, max_steps=1, backend="reference", precision="fp32")
    result = pfs.search(net, loader, Budget(**limit), config=config, progress=False, device="cpu")
    assert 0.05 < result.config.target < target


def test_activation_model_is_a_gauge_for_the_solver():
    net, _ = network()
    graph = channel_graph(net, torch.zeros(1, 3, 6, 6))
    found = allocations(graph.traced.eval, (torch.zeros(1, 3, 6, 6),))
    model = ActivationModel(found, graph.unit_of_label, graph.groups.num_units, 4)
    limits = Limits(peak_activation_bytes=model.base - 1)
    sweep = Sweep.within(
        graph.groups,
        np.arange(graph.groups.num_units) / 100,
        np.full(graph.groups.num_units, -1),
        limits,
        gauges={"peak_activation_bytes": model},
    )
    keep = sweep.largest(limits)
    assert model.evaluate(keep) < model.base
    assert model.peak_at(keep)
