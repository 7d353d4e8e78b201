"""One flat vector of gates, seen by the network as one vector per site."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from structure_cases import chain
from torch.utils._python_dispatch import TorchDispatchMode

from pfs_fast.gating.gates import GateBank, GateState, split_gates
from pfs_fast.gating.scope import Site
from pfs_fast.graph.groups import FIXED

GROUPS = chain(3, 2)  # units 0 1 2 | 3 4


def bank(*sites: Site) -> GateBank:
    state = GateState.create(5, 1.0, torch.float64, torch.device("cpu"))
    state.values.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5], dtype=torch.float64))
    return GateBank(GROUPS, sites, state)


def site(layer: str, *units: int) -> Site:
    return Site(layer, np.array(units))


def test_state_starts_alive_at_its_initial_value():
    state = GateState.create(4, 0.7, torch.float32, torch.device("cpu"))
    assert state.values.tolist() == pytest.approx([0.7] * 4)
    assert state.died_at.tolist() == [-1] * 4
    assert (state.step.tolist(), state.step.dtype) == ([0], torch.int64)
    assert set(state.tensors()) == {"values", "exp_avg", "exp_avg_sq", "step", "died_at"}
    assert not state.exp_avg.any()
    assert not state.exp_avg_sq.any()


def test_bank_vectors_read_their_units():
    found = bank(
        site("whole", 0, 1, 2),
        site("second", 3, 4),
        site("twice", 3, 3, 4, 4),
        site("reordered", 2, 0, 1),
        site("joined", 3, 4, 0, 1, 2),
        site("part fixed", FIXED, 1, FIXED, 4),
    )
    assert found.vector("whole").tolist() == [0.1, 0.2, 0.3]
    assert found.vector("second").tolist() == [0.4, 0.5]
    assert found.vector("twice").tolist() == [0.4, 0.4, 0.5, 0.5]
    assert found.vector("reordered").tolist() == [0.3, 0.1, 0.2]
    assert found.vector("joined").tolist() == [0.4, 0.5, 0.1, 0.2, 0.3]
    assert found.vector("part fixed").tolist() == [1.0, 0.2, 1.0, 0.5]
    assert found.layers == ("whole", "second", "twice", "reordered", "joined", "part fixed")


def test_bank_vectors_follow_the_flat_state():
    found = bank(site("whole", 0, 1, 2))
    found.state.values.fill_(0.25)
    assert found.vector("whole").tolist() == [0.25] * 3


def test_bank_gradients_add_up_in_the_flat_gradient():
    found = bank(site("a", 0, 1, 2), site("b", 3, 3, FIXED, 0))
    a, b = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([10.0, 20.0, 40.0, 80.0]).double()
    ((found.vector("a") * a).sum() + (found.vector("b") * b).sum()).backward()
    assert found.grad.tolist() == [81.0, 2.0, 3.0, 30.0, 0.0]
    (found.vector("a") * a).sum().backward()  # accumulates until told otherwise
    assert found.grad.tolist() == [82.0, 4.0, 6.0, 30.0, 0.0]
    found.zero_grad()
    assert not found.grad.any()


class Additions(TorchDispatchMode):
    """Notes the indexes that gradients are added at."""

    def __init__(self) -> None:
        super().__init__()
        self.indexes: list[torch.Tensor] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "index_add" in str(func):
            self.indexes.append(args[2])
        return func(*args, **(kwargs or {}))


def test_no_gradients_of_a_gate_are_added_in_an_order_of_the_devices():
    """At an address that several threads add to, a GPU rounds differently each time; only the fixed channels have none to take."""
    units = (3, 0, 3, FIXED, 3, 4, 0, FIXED, 3)
    found, grad = bank(site("a", *units)), 1.5 ** torch.arange(9).double()
    y = found.vector("a")
    assert y.tolist() == [0.4, 0.1, 0.4, 1.0, 0.4, 0.5, 0.1, 1.0, 0.4]
    with Additions() as additions:
        y.backward(grad)
    (index,) = additions.indexes
    assert len(index.unique()) == len(units) - 1  # two fixed channels read one value
    sums = [sum(g for u, g in zip(units, grad.tolist(), strict=True) if u == i) for i in range(5)]
    assert found.grad.tolist() == pytest.approx(sums, rel=1e-15)


def test_bank_gradient_storage_stays_the_same():
    """The fused step reads one flat tensor: autograd must add into it, never put another in its place."""
    found = bank(site("a", 0, 1, 2))
    flat = found.grad
    for _ in range(3):
        found.vector("a").sum().backward()
    assert found.grad is flat
    assert flat.tolist() == [3.0, 3.0, 3.0, 0.0, 0.0]


def test_split_gates_copies_by_group():
    flat = torch.arange(5.0)
    parts = split_gates(GROUPS, flat)
    assert {name: part.tolist() for name, part in parts.items()} == {
        "conv0": [0.0, 1.0, 2.0],
        "conv1": [3.0, 4.0],
    }
    parts["conv0"].fill_(9.0)
    assert flat[0] == 0.0
