"""Slimming is exact on random networks: masked = slim, predicted = counted cost, gates at 1 change nothing.

``PFS_FAST_RANDOM_GRAPHS`` is the number of networks (150 by default; 2,000 are the proof), ``PFS_FAST_RANDOM_SEED`` the
first seed. A failure is thinned out to the blocks that it needs and printed with its graph.
"""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from random_graphs import Block, RandomNet, build, random_blocks
from torch import Tensor, fx
from torch.utils.flop_counter import FlopCounterMode

from pfs_fast.budgets.budget import Limits
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.solver import solve
from pfs_fast.budgets.structure import Structure
from pfs_fast.errors import ModelError
from pfs_fast.gating.gated import GatedNetwork
from pfs_fast.gating.gates import GateBank, GateState
from pfs_fast.gating.scope import SCOPES, gate_sites, gated_groups
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.graph.groups import FIXED, ChannelGroups
from pfs_fast.ops import reference
from pfs_fast.slimming.slim import slim
from pfs_fast.slimming.verify import verify

CASES = int(os.environ.get("PFS_FAST_RANDOM_GRAPHS", "150"))
FIRST = int(os.environ.get("PFS_FAST_RANDOM_SEED", "0"))
PARTS = 10  # tests that share the cases, so that several processes can
RTOL = 1e-9

pytestmark = pytest.mark.filterwarnings("ignore:solve. all .* gates of group:UserWarning")


@pytest.mark.parametrize("part", range(PARTS))
def test_random_networks_are_cut_exactly(part):
    seeds = range(FIRST + part, FIRST + CASES, PARTS)
    tally: Counter[str] = Counter()
    for seed in seeds:
        blocks = random_blocks(seed)
        try:
            tally += check(blocks, seed)
        except Exception as error:
            pytest.fail(_report(blocks, seed, error))
    # A test of networks that nothing can be cut from would prove nothing.
    assert tally["cut"] >= 0.6 * len(seeds) and tally["dropped"] >= 3 * len(seeds)


def check(blocks: Sequence[Block], seed: int) -> Counter[str]:
    """Everything that must hold for one network; raises where it does not. Counts what was checked."""
    rng = np.random.default_rng([seed, 1])
    net, inputs = build(blocks)
    graph = channel_graph(net, inputs)
    check_partition(graph.groups)
    base = CostModel(graph.groups).base
    assert base == counted(net, inputs), f"predicted {base}, counted {counted(net, inputs)}"
    tally: Counter[str] = Counter()
    for turn, scope in enumerate(SCOPES):
        try:
            groups = gated_groups(graph, net, scope)
        except ModelError:  # nothing to gate
            continue
        check_partition(groups)
        model = CostModel(groups)
        # Each scope by the solver in every other network, and by chance in the rest.
        keep = (solved, at_random)[(seed // 2 + turn) % 2](groups, model, rng)
        structure = Structure.from_keep(groups, keep, model)
        verify(net, None, structure, inputs, trials=1, rtol=RTOL, seed=seed)
        cost = counted(slim(net, structure, "inherit"), inputs)
        assert cost == (structure.macs, structure.params), f"{cost} counted, {structure}"
        tally["dropped"] += int((~keep).sum())
        tally["structures"] += 1
    if graph.groups.groups:
        tally["cut"] = 1
        check_gates_at_one(net, inputs, graph, SCOPES[seed % 2])
    return tally


def check_partition(groups: ChannelGroups) -> None:
    """Each channel belongs to one group or is held whole, and so does each producer."""
    ends = [g.start + g.size for g in groups.groups]
    assert [g.start for g in groups.groups] == [0, *ends[:-1]] or not ends
    owners = Counter(name for g in groups.groups for name in g.producers)
    owners += Counter(name for name, _ in groups.fixed)
    through = {name for g in groups.groups for name in g.followers}
    seen = np.zeros(groups.num_units, dtype=bool)
    for layer in groups.layers:
        for units in (layer.out_units, layer.in_units):
            assert units.min() >= FIXED and units.max() < groups.num_units
        seen[layer.out_units[layer.out_units != FIXED]] = True
        if layer.name in owners:
            assert owners[layer.name] == 1
            spans = [g for g in groups.groups if layer.name in g.producers]
            low, high = (spans[0].start, spans[0].start + spans[0].size) if spans else (FIXED, 0)
            assert (layer.out_units >= low).all() and (layer.out_units < high).all()
            assert layer.name not in through
    assert seen.all()


def solved(groups: ChannelGroups, model: CostModel, rng: np.random.Generator) -> np.ndarray:
    """What the solver keeps for a random budget, which it must not exceed."""
    gates = rng.random(groups.num_units)
    gates[rng.random(groups.num_units) < rng.choice([0.0, 0.3, 0.9])] = 0
    multiple, least = int(rng.choice([1, 1, 2, 4])), int(rng.choice([1, 1, 2, 3]))
    low = model.floor(least, multiple)
    macs, params = (int(rng.integers(a, b + 1)) for a, b in zip(low, model.base, strict=True))
    limits = Limits(
        macs=macs if rng.random() < 0.8 else None,
        params=params if rng.random() < 0.4 else None,
        multiple_of=multiple,
        min_channels=least,
    )
    keep = solve(groups, gates, np.where(gates == 0, 5, -1), limits, model)
    assert limits.allow(model.evaluate(keep))
    for part in model.parts:
        kept, of = int(keep[part.units].sum()), len(part.units)
        width = part.group.channels_per_unit
        assert kept == of or (kept * width % multiple == 0 and kept * width >= least)
    return keep


def at_random(groups: ChannelGroups, model: CostModel, rng: np.random.Generator) -> np.ndarray:
    """Any units, at least one of each part of a group."""
    keep = rng.random(groups.num_units) < rng.uniform(0.1, 0.9)
    for part in model.parts:
        keep[rng.choice(part.units)] = True
    return keep


def counted(net: RandomNet, inputs: tuple[Tensor, ...]) -> tuple[int, int]:
    """MACs of one image and parameters, by PyTorch's own counter on a real run."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net.eval()(*inputs)
    return counter.get_total_flops() // (2 * len(inputs[0])), sum(
        p.numel() for p in net.parameters()
    )


def check_gates_at_one(net: RandomNet, inputs: tuple[Tensor, ...], graph, scope: str) -> None:
    try:
        groups = gated_groups(graph, net, scope)
    except ModelError:
        return
    sites = gate_sites(graph, groups, scope)
    state = GateState.create(groups.num_units, 1.0, torch.float64, torch.device("cpu"))
    gated = GatedNetwork(graph, GateBank(groups, sites, state), reference, dtype=torch.float64)
    for training in (False, True):  # a forward in train mode changes running statistics
        outputs = []
        for network in (net, gated):
            with torch.no_grad():
                result = network.train(training)(*(x.clone() for x in inputs))
            outputs.append(result if isinstance(result, tuple) else (result,))
        for expected, found in zip(*outputs, strict=True):
            error = float((expected - found).abs().max() / expected.abs().max().clamp(min=1e-300))
            assert error <= RTOL, (
                f"gates at 1, scope {scope}, training {training}: error {error:.1e}"
            )


def _report(blocks: Sequence[Block], seed: int, error: Exception) -> str:
    """The failure with as few blocks as still give an error of its kind."""
    blocks, thinner = list(blocks), True
    while thinner:
        thinner = False
        for i in range(len(blocks) - 1, -1, -1):
            fewer = blocks[:i] + blocks[i + 1 :]
            found = _error(fewer, seed)
            if type(found) is type(error):
                blocks, error, thinner = fewer, found, True
                break
    net, _ = build(blocks)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = fx.Tracer().trace(net.eval())
    code = graph.python_code("self").src
    layers = "\n".join(f"  {name}: {layer}" for name, layer in net.layers.items())
    return (
        f"seed {seed}: {type(error).__name__}: {error}\ncheck({blocks}, {seed})\n{layers}\n{code}"
    )


def _error(blocks: Sequence[Block], seed: int) -> Exception | None:
    try:
        build(blocks)
    except Exception:  # blocks that need those that were taken out
        return None
    try:
        check(blocks, seed)
    except Exception as error:
        return error
    return None
