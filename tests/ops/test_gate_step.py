"""gate_step_ equals torch.optim.Adam on the regularised loss, then a clamp."""

from __future__ import annotations

import pytest
import torch

from pfs_fast import ops
from pfs_fast.ops import reference

IMPLEMENTATIONS = [ops.gate_step_, reference.gate_step_]
GAMMA, TARGET, LR = 0.5, 0.3, 0.01


def state(gates):
    return {
        "exp_avg": torch.zeros_like(gates),
        "exp_avg_sq": torch.zeros_like(gates),
        "step": torch.zeros(1, dtype=torch.int64, device=gates.device),
        "died_at": torch.full(gates.shape, -1, dtype=torch.int32, device=gates.device),
    }


def apply(step, gates, grad, moments, **options):
    step(
        gates,
        grad,
        moments["exp_avg"],
        moments["exp_avg_sq"],
        moments["step"],
        moments["died_at"],
        **{"gamma": GAMMA, "target": TARGET, **options},
    )


@pytest.mark.parametrize("step", IMPLEMENTATIONS, ids=["compiled", "reference"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("size", [1, 5, 1000])
def test_equals_adam_and_clamp_for_200_steps(step, dtype, size, device):
    gates = torch.ones(size, dtype=dtype, device=device)
    moments = state(gates)
    exact = gates.double().clone().requires_grad_()
    adam = torch.optim.Adam([exact], lr=LR)
    died_at = torch.full((size,), -1, dtype=torch.int32, device=device)
    for number in range(1, 201):
        grad = (torch.randn(size, dtype=torch.float64) * 0.1 + 0.05).to(device, dtype)
        apply(step, gates, grad, moments, lr=LR)
        loss = (grad.double() * exact).sum() + GAMMA * (exact.abs().mean() - TARGET) ** 2
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            exact.clamp_(0, 1)
        died_at[(exact == 0) & (died_at < 0)] = number
        died_at[exact > 0] = -1
    # float32: 200 steps, each rounded in gates near 1, and moments rounded likewise.
    tol = 1e-12 if dtype == torch.float64 else 2e-5
    torch.testing.assert_close(gates.double(), exact.detach(), rtol=tol, atol=tol)
    assert moments["step"].item() == 200
    if dtype == torch.float64:
        assert torch.equal(moments["died_at"], died_at)
        assert size < 100 or (died_at > 0).any()


@pytest.mark.parametrize("step", IMPLEMENTATIONS, ids=["compiled", "reference"])
def test_death_is_noted_once_and_forgotten_on_revival(step, device):
    gates = torch.tensor([0.005, 1.0], dtype=torch.float64, device=device)
    moments = state(gates)
    push = torch.tensor([1.0, 0.0], dtype=torch.float64, device=device)
    for sign, expected in ((1, 1), (1, 1), (-30, -1), (1, -1)):
        apply(step, gates, sign * push, moments, gamma=0.0)
        assert moments["died_at"].tolist() == [expected, -1]


@pytest.mark.parametrize("step", IMPLEMENTATIONS, ids=["compiled", "reference"])
def test_regulariser_counts_gates_that_were_removed(step, device):
    """All gates, with the dead half in place or cut out, move alike."""
    full = torch.cat([torch.rand(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)])
    full = full.to(device)
    part = full[:8].clone()
    full_state, part_state = state(full), state(part)
    grad = torch.randn(16, dtype=torch.float64).to(device)
    grad[8:] = 0
    for _ in range(5):
        apply(step, full, grad, full_state)
        apply(step, part, grad[:8], part_state, num_gates=16)
    torch.testing.assert_close(full[:8], part, rtol=1e-12, atol=1e-12)
    assert full[8:].abs().max() == 0


@pytest.mark.parametrize("step", IMPLEMENTATIONS, ids=["compiled", "reference"])
def test_nan_gradient_makes_nan_gate(step, device):
    gates = torch.ones(3, device=device)
    grad = torch.tensor([0.0, float("nan"), 0.0], device=device)
    apply(step, gates, grad, state(gates))
    assert gates.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("step", IMPLEMENTATIONS, ids=["compiled", "reference"])
def test_gradient_is_read_only_and_may_be_strided(step, device):
    grad = torch.randn(6, device=device)
    before = grad.clone()
    gates, other = torch.full((3,), 0.5, device=device), torch.full((3,), 0.5, device=device)
    apply(step, gates, grad[::2], state(gates))
    apply(step, other, grad[::2].clone(), state(other))
    assert torch.equal(grad, before) and torch.equal(gates, other)


@pytest.mark.parametrize("step", IMPLEMENTATIONS, ids=["compiled", "reference"])
def test_no_gates_only_count_the_step(step, device):
    gates = torch.ones(0, device=device)
    moments = state(gates)
    apply(step, gates, gates.clone(), moments, num_gates=4)
    assert moments["step"].item() == 1


def test_compiled_and_reference_agree_on_random_state(device):
    gates = torch.rand(777, dtype=torch.float64).to(device)
    results = []
    for step in IMPLEMENTATIONS:
        own, moments = gates.clone(), state(gates)
        generator = torch.Generator().manual_seed(3)
        for _ in range(20):
            grad = torch.randn(777, dtype=torch.float64, generator=generator).to(device)
            apply(step, own, grad, moments, lr=0.05, betas=(0.8, 0.95), eps=1e-4)
        results.append((own, moments))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-12)
