"""conv_bn_gate_act_branch is conv_bn_gate_act with x passed on: the same values and the same gradients, added elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pfs_fast import ops
from pfs_fast.ops import reference

LAST = torch.channels_last
# N, C, H, W; the last has weights that are transformed by chunks
SHAPES = ((2, 16, 8, 8), (3, 9, 7, 6), (40, 20, 16, 16), (9, 5, 5, 3), (5, 368, 3, 3))


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    torch.manual_seed(sum(shape))
    channels = shape[1]
    x = torch.randn(shape, dtype=dtype).contiguous(memory_format=LAST).requires_grad_()
    weight = torch.randn(channels, channels, 3, 3, dtype=dtype) / channels
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    return x, weight, torch.rand(channels, dtype=acc).requires_grad_()


def block(x: Tensor, weight: Tensor, gate: Tensor, tile: int, branch: bool) -> Tensor:
    if branch:
        y, x = ops.conv_bn_gate_act_branch(x, weight, gate=gate, tile=tile)
    else:
        y = ops.conv_bn_gate_act(x, weight, gate=gate, tile=tile)
    return y.sin() + 2 * x.cos()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_two_readers(
    shape: tuple[int, ...], tile: int, dtype: torch.dtype
) -> None:
    x, weight, gate = inputs(shape, dtype)
    grad = torch.randn(shape, dtype=dtype)
    results = []
    for branch in (False, True):
        y = block(x, weight, gate, tile, branch)
        results.append((y.detach(), *torch.autograd.grad(y, (x, gate), grad)))
    (y, grad_x, grad_gate), found = results
    assert torch.equal(found[0], y) and torch.equal(found[2], grad_gate)
    if dtype == torch.float32:
        torch.testing.assert_close(found[1], grad_x, rtol=1e-6, atol=1e-6)
    else:  # rounded once in place of twice
        assert (found[1] - grad_x).float().norm() <= 2**-8 * grad_x.float().norm()
    assert found[1].is_contiguous(memory_format=LAST)


def test_gradient_of_one_reader_alone() -> None:
    x, weight, gate = inputs(SHAPES[0])
    y, same = ops.conv_bn_gate_act_branch(x, weight, gate=gate)
    assert same.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(same.sum(), x, retain_graph=True)[0], torch.ones_like(x))
    plain = torch.autograd.grad(ops.conv_bn_gate_act(x, weight, gate=gate).cos().sum(), x)[0]
    assert torch.equal(torch.autograd.grad(y.cos().sum(), x)[0], plain)


def test_autocast_keeps_float32() -> None:
    x, weight, gate = inputs(SHAPES[0])
    low = x.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, same = ops.conv_bn_gate_act_branch(low, weight, gate=gate)
    assert y.dtype == same.dtype == torch.float32
    found = torch.autograd.grad((y.cos() + same.cos()).sum(), low)[0]
    full = low.detach().float().requires_grad_()
    y, same = ops.conv_bn_gate_act_branch(full, weight, gate=gate)
    expected = torch.autograd.grad((y.cos() + same.cos()).sum(), full)[0]
    assert torch.equal(found, expected.bfloat16())


def test_x_without_gradient_stays_without() -> None:
    x, weight, gate = inputs(SHAPES[0])
    y, same = ops.conv_bn_gate_act_branch(x.detach(), weight, gate=gate)
    assert y.requires_grad and not same.requires_grad
    y.sum().backward()
    assert gate.grad is not None


def test_agrees_with_its_twin() -> None:
    shape = SHAPES[1]
    x, weight, gate = inputs(shape)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, weight, gate)]
    sums = []
    for operators, tensors in ((ops, (x, weight, gate)), (reference, exact)):
        y, same = operators.conv_bn_gate_act_branch(*tensors[:2], gate=tensors[2])
        sums.append(torch.autograd.grad((y * same).sum(), (tensors[0], tensors[2])))
    for found, expected in zip(*sums, strict=True):
        assert (found.double() - expected).norm() <= 2e-5 * expected.norm()


class Additions(TorchDispatchMode):
    """Counts sums of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "aten.add" in str(func) and args[0].dim() == 4
        return func(*args, **(kwargs or {}))


def test_nothing_is_added_in_a_pass_of_its_own() -> None:
    x, weight, gate = inputs(SHAPES[0])
    counts = []
    for branch in (False, True):
        y = block(x, weight, gate, 4, branch)
        with Additions() as additions:
            torch.autograd.grad(y.sum(), x)
        counts.append(additions.count)
    assert counts[0] == counts[1] + 1


def test_compiles_whole() -> None:
    x, weight, gate = inputs(SHAPES[0])
    grad = torch.randn(SHAPES[0])
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = [
        torch.autograd.grad(run(x, weight, gate, 4, True), (x, gate), grad)
        for run in (block, compiled)
    ]
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("grad_branch", "error", "text"),
    [
        (torch.ones(2, 16, 8, 7), ValueError, "grad_branch must have the shape of x"),
        (
            torch.ones(2, 16, 8, 8).double(),
            TypeError,
            "grad_branch must have the dtype of grad_y, Float",
        ),
    ],
)
def test_bad_gradient(grad_branch: Tensor, error: type[Exception], text: str) -> None:
    x, weight, gate = inputs(SHAPES[0])
    library = torch.ops.pfs_fast
    with torch.no_grad():
        y, u, mean, var, aux = library.conv_bn_gate_act(
            x, weight, None, gate, None, None, None, [1, 1], 4, 1e-5, "relu"
        )
        saved = (y, u, mean, var, weight, gate, None, None, aux)
        options = ([1, 1], 4, 1e-5, "relu", False, [True] * 5, grad_branch)
        with pytest.raises(error, match=text):
            library._conv_bn_gate_act_backward(*saved, *options)
