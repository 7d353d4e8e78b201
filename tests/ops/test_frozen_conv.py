"""frozen_conv equals a convolution, gives the gradient of its input and keeps only its weight."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pfs_fast import ops
from pfs_fast.ops import reference

# shape of x, shape of the weight, options
CONVS = {
    "3x3": ((2, 4, 7, 6), (5, 4, 3, 3), {"padding": 1}),
    "1x1": ((2, 4, 7, 6), (5, 4, 1, 1), {}),
    "strided": ((2, 4, 8, 7), (5, 4, 3, 3), {"stride": 2, "padding": 1}),
    "stride beyond kernel": ((2, 4, 9, 8), (5, 4, 1, 1), {"stride": 3}),
    "dilated": ((2, 4, 9, 8), (5, 4, 3, 2), {"dilation": (2, 3), "padding": (2, 1)}),
    "grouped": ((2, 4, 7, 6), (6, 2, 3, 3), {"groups": 2, "padding": 1}),
    "depthwise": ((2, 4, 7, 6), (4, 1, 3, 3), {"groups": 4, "stride": 2, "padding": 1}),
    "1d": ((2, 4, 11), (6, 2, 3), {"groups": 2, "stride": 2, "padding": 3}),
    "3d": ((2, 4, 5, 6, 4), (3, 4, 3, 2, 1), {"stride": (2, 1, 2), "padding": (1, 0, 2)}),
    "empty": ((0, 4, 7, 6), (5, 4, 3, 3), {"padding": 1}),
}
# A sum of up to 36 products; bfloat16 rounds the result, and some CPU kernels their partial sums.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-2}


def make(name, dtype, device, bias=True):
    x_shape, weight_shape, options = CONVS[name]
    x = torch.randn(x_shape, dtype=torch.float64).to(device, dtype).requires_grad_()
    weight = torch.randn(weight_shape, dtype=torch.float64).to(device, dtype)
    shift = torch.randn(weight_shape[0], dtype=torch.float64).to(device, dtype) if bias else None
    return x, weight, shift, options


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("name", CONVS)
def test_agrees_with_twin(name, dtype, device):
    x, weight, bias, options = make(name, dtype, device)
    y = ops.frozen_conv(x, weight, bias, **options)
    grad_y = torch.randn_like(y)
    (grad_x,) = torch.autograd.grad(y, x, grad_y)
    exact_x = x.detach().double().requires_grad_()
    exact_y = reference.frozen_conv(exact_x, weight.double(), bias.double(), **options)
    (exact_grad,) = torch.autograd.grad(exact_y, exact_x, grad_y.double())
    tol = TOLERANCES[dtype]
    torch.testing.assert_close(y.double(), exact_y, rtol=tol, atol=tol * 4)
    torch.testing.assert_close(grad_x.double(), exact_grad, rtol=tol, atol=tol * 4)


@pytest.mark.parametrize("name", ["3x3", "1x1", "strided", "grouped", "depthwise", "3d"])
@pytest.mark.parametrize("weight_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_gradient_keeps_the_layout_of_x(name, weight_last, dtype, device):
    x, weight, _, options = make(name, dtype, device, bias=False)
    last = torch.channels_last_3d if x.dim() == 5 else torch.channels_last
    if weight_last:
        weight = weight.contiguous(memory_format=last)
    for memory_format in (torch.contiguous_format, last):
        x = x.detach().contiguous(memory_format=memory_format).requires_grad_()
        y = ops.frozen_conv(x, weight, **options)
        (grad_x,) = torch.autograd.grad(y.sum(), x)
        assert grad_x.is_contiguous(memory_format=memory_format)
        # PyTorch's float64 conv3d drops channels_last; every other one keeps it.
        own = reference.frozen_conv(x, weight, **options)
        assert y.stride() == own.stride()


def test_saves_only_the_weight(device):
    x, weight, bias, options = make("3x3", torch.float32, device)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.frozen_conv(x, weight, bias, **options)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


def test_weight_and_bias_get_no_gradient(device):
    x, weight, bias, options = make("3x3", torch.float32, device)
    weight.requires_grad_()
    bias.requires_grad_()
    ops.frozen_conv(x, weight, bias, **options).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None
    assert not ops.frozen_conv(x.detach(), weight, bias, **options).requires_grad


@pytest.mark.parametrize("name", ["strided", "depthwise", "1d"])
def test_gradcheck(name, device):
    x, weight, bias, options = make(name, torch.float64, device)
    assert torch.autograd.gradcheck(lambda x: ops.frozen_conv(x, weight, bias, **options), x)
