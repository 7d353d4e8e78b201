"""The objective: its terms, and the gradient that the fused step adds."""

from __future__ import annotations

import math

import pytest
import torch

from pfs_fast.gating.objective import cross_entropy, sparsity_penalty
from pfs_fast.ops import reference


def test_penalty_is_gamma_times_the_squared_distance_of_the_mean():
    gates = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    assert sparsity_penalty(gates, 0.5, 0.2).item() == pytest.approx(0.5 * 0.3**2)


def test_penalty_divides_by_all_gates_where_some_were_left_out():
    alive = torch.tensor([0.5, 1.0], dtype=torch.float64)
    whole = torch.tensor([0.5, 0.0, 1.0, 0.0], dtype=torch.float64)
    assert sparsity_penalty(alive, 0.5, 0.2, 4) == sparsity_penalty(whole, 0.5, 0.2)


@pytest.mark.parametrize("target", [0.2, 0.9])
def test_penalty_gradient_is_two_sided_and_0_at_dead_gates(target):
    gates = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64, requires_grad=True)
    sparsity_penalty(gates, 0.5, target).backward()
    expected = 2 * 0.5 * (0.5 - target) / 3
    assert gates.grad.tolist() == pytest.approx([0.0, expected, expected])


def test_gate_step_takes_the_gradient_of_the_penalty():
    """With no cross-entropy, one step of the operator is one Adam step on ``sparsity_penalty``."""
    values = torch.rand(7, dtype=torch.float64)
    parameter = torch.nn.Parameter(values.clone())
    adam = torch.optim.Adam([parameter], lr=0.01)
    zeros = torch.zeros(7, dtype=torch.float64)
    state = values.clone(), zeros.clone(), zeros.clone(), zeros.clone()
    step, died_at = torch.zeros(1, dtype=torch.int64), torch.full((7,), -1, dtype=torch.int32)
    for _ in range(5):
        adam.zero_grad()
        sparsity_penalty(parameter, 0.5, 0.2).backward()
        adam.step()
        reference.gate_step_(*state, step, died_at, lr=0.01, gamma=0.5, target=0.2)
    torch.testing.assert_close(state[0], parameter.detach(), rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_cross_entropy_is_at_least_float32(dtype, expected):
    logits = torch.zeros(2, 5, dtype=dtype)
    loss = cross_entropy(logits, torch.tensor([0, 4]))
    assert loss.dtype == expected
    assert loss.item() == pytest.approx(math.log(5))


def test_cross_entropy_takes_probabilities():
    logits = torch.randn(3, 4, dtype=torch.float64)
    labels = torch.tensor([0, 3, 1])
    soft = torch.nn.functional.one_hot(labels, 4).double()
    assert cross_entropy(logits, soft).item() == pytest.approx(cross_entropy(logits, labels).item())
