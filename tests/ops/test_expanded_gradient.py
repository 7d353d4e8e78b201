"""Gradients that come in another layout, such as a pool's one value a channel: same results, in the memory of the copy."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.footprint import peak_bytes
from pfs_fast import ops

LAST = torch.channels_last
ACTS = ("identity", "relu", "relu6", "silu", "hardswish")


def make(
    name: str, act: str, residual: bool, shape: tuple[int, ...], layout: torch.memory_format = LAST
) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(0)
    channels = shape[1]
    x, added = (
        torch.randn(shape).contiguous(memory_format=layout).requires_grad_() for _ in range(2)
    )
    gate = torch.rand(channels).requires_grad_()
    leaves = [x, gate, *([added] if residual else [])]
    extra = added if residual else None
    if name == "bn_gate_act":
        return ops.bn_gate_act(x, gate, residual=extra, act=act), leaves
    weight = torch.randn(channels, channels, 3, 3) / channels
    return ops.conv_bn_gate_act(x, weight, gate=gate, residual=extra, act=act), leaves


@pytest.mark.parametrize("name", ["bn_gate_act", "conv_bn_gate_act"])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ACTS)
# The second has several blocks to an image, whose edges are read twice.
@pytest.mark.parametrize("shape", [(6, 16, 8, 8), (2, 24, 40, 40), (3, 13, 5, 7)], ids=str)
def test_same_gradients(name: str, act: str, residual: bool, shape: tuple[int, ...]) -> None:
    y, leaves = make(name, act, residual, shape)
    pooled = torch.randn(*shape[:2], 1, 1)
    before = pooled.clone()
    for grad in (pooled.expand(shape), torch.randn(shape)):  # the second in NCHW
        dense = grad.contiguous(memory_format=LAST)
        expected = torch.autograd.grad(y, leaves, dense, retain_graph=True)
        found = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            # Lines that are made in one piece or in three are rounded as their tails are.
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
    assert torch.equal(pooled, before)


@pytest.mark.parametrize("name", ["bn_gate_act", "conv_bn_gate_act"])
def test_a_copy_becomes_a_result(name: str) -> None:
    shape = (32, 32, 16, 16)
    y, leaves = make(name, "relu", True, shape)
    grad = torch.randn(32, 32, 1, 1).expand(shape)
    peak = peak_bytes(
        lambda: torch.autograd.grad(y, leaves, grad, retain_graph=True), torch.device("cpu")
    )
    assert peak < 2.9 * y.numel() * 4  # two results and small buffers; not the copy besides


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("act", ACTS)
# Rows of whole samples; planes, whose ends are written twice.
@pytest.mark.parametrize("shape", [(6, 4, 3, 5), (3, 4, 6, 6), (2, 3, 9, 11)], ids=str)
def test_same_gradients_in_nchw(act: str, residual: bool, shape: tuple[int, ...]) -> None:
    y, leaves = make("bn_gate_act", act, residual, shape, torch.contiguous_format)
    reversed_strides = torch.randn(shape[::-1]).permute(3, 2, 1, 0)
    for grad in (torch.randn(*shape[:2], 1, 1).expand(shape), reversed_strides):
        expected = torch.autograd.grad(y, leaves, grad.contiguous(), retain_graph=True)
        found = torch.autograd.grad(y, leaves, grad, retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)
