"""frozen_conv's own float32 kernels for few channels, for strides and for 1x1 kernels: equal to float64 but for rounding, in every shape."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from pfs_fast import ops

library = torch.ops.pfs_fast

# N, C_in, C_out, H, W, kernel, stride, padding
SHAPES = (
    (2, 3, 16, 8, 8, (3, 3), (1, 1), (1, 1)),  # stems
    (2, 3, 20, 9, 7, (3, 3), (1, 1), (1, 1)),
    (2, 3, 64, 15, 16, (7, 7), (2, 2), (3, 3)),
    (3, 2, 5, 6, 5, (5, 5), (1, 1), (2, 2)),
    (2, 16, 32, 8, 8, (3, 3), (2, 2), (1, 1)),
    (2, 20, 13, 9, 8, (3, 3), (2, 2), (1, 1)),
    (2, 9, 24, 7, 10, (3, 3), (2, 2), (0, 0)),
    (2, 16, 40, 8, 9, (1, 1), (2, 2), (0, 0)),  # pixels that no output reads
    (2, 5, 8, 11, 10, (1, 1), (3, 3), (0, 0)),
    (2, 12, 16, 10, 11, (2, 2), (3, 3), (0, 0)),
    (2, 12, 16, 10, 11, (3, 2), (1, 2), (2, 1)),
    (2, 6, 8, 6, 6, (3, 3), (1, 1), (4, 4)),  # padding beyond the kernel
    (1, 2, 3, 1, 1, (3, 3), (2, 2), (1, 1)),
    (2, 7, 9, 4, 3, (4, 3), (4, 3), (0, 0)),
    (1, 33, 17, 5, 40, (3, 3), (2, 1), (1, 0)),
    (70, 4, 8, 16, 16, (3, 3), (2, 2), (1, 1)),  # several threads
    (2, 300, 8, 4, 4, (3, 3), (2, 2), (1, 1)),  # deeper than one panel of weights
    (2, 16, 96, 8, 9, (1, 1), (1, 1), (0, 0)),  # products of matrices
    (3, 21, 13, 5, 7, (1, 1), (1, 1), (0, 0)),
    (2, 9, 5, 4, 4, (1, 1), (1, 1), (1, 2)),
    (5, 40, 10, 1, 1, (1, 1), (1, 1), (0, 0)),  # as in a squeeze-excite
    (70, 300, 24, 4, 4, (1, 1), (1, 1), (0, 0)),
)


def make(shape):
    batch, c_in, c_out, height, width, kernel, stride, padding = shape
    torch.manual_seed(sum(shape[:5]))
    x = torch.randn(batch, c_in, height, width).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(c_out, c_in, *kernel)
    return x, weight, torch.randn(c_out), stride, padding


def forward(x, weight, bias, stride, padding):
    return library.frozen_conv(x, weight, bias, stride, padding, [1, 1], 1)


def backward(grad_y, weight, x, stride, padding):
    return library._frozen_conv_backward(grad_y, weight, x.shape, stride, padding, [1, 1], 1)


def assert_close(found, expected, products):
    assert found.dtype == torch.float32
    assert found.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6 * products**0.5 * 4)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, with_bias):
    x, weight, bias, stride, padding = make(shape)
    bias = bias if with_bias else None
    exact_x = x.double().requires_grad_()
    exact_bias = None if bias is None else bias.double()
    exact = F.conv2d(exact_x, weight.double(), exact_bias, stride, padding)
    y = forward(x, weight, bias, stride, padding)
    assert_close(y, exact.detach(), weight[0].numel())
    grad_y = torch.randn_like(y)
    (exact_grad,) = torch.autograd.grad(exact, exact_x, grad_y.double())
    grad_x = backward(grad_y, weight, x, stride, padding)
    assert_close(grad_x, exact_grad, weight[:, 0].numel())


def test_small_sizes_all():
    """Every combination of a small image, kernel, stride and padding."""
    for size, kernel, stride, padding in itertools.product(
        range(1, 6), range(1, 4), range(1, 4), range(3)
    ):
        if size + 2 * padding < kernel:
            continue
        shape = (2, 3, 5, size, size + 1, (kernel, kernel), (stride, stride), (padding, padding))
        test_agrees_with_float64(shape, with_bias=False)


@pytest.mark.parametrize("shape", SHAPES[:8], ids=str)
def test_reads_nothing_but_its_arguments(shape):
    x, weight, _, stride, padding = make(shape)
    y = forward(x, weight, None, stride, padding)
    grad_x = backward(y, weight, x, stride, padding)

    def within_nan(t):
        n, c, h, w = t.shape
        memory = torch.full((t.numel() + 128,), torch.nan)
        inside = memory[64:-64].view(n, h, w, c).permute(0, 3, 1, 2)
        return inside.copy_(t)

    assert torch.equal(forward(within_nan(x), within_nan(weight), None, stride, padding), y)
    assert torch.equal(backward(within_nan(y), within_nan(weight), x, stride, padding), grad_x)


def test_a_nan_stays_where_its_window_is():
    x, weight, _, stride, padding = make(SHAPES[4])
    x[0, 3, 4, 5] = torch.nan
    y = forward(x, weight, None, stride, padding)
    reached = F.conv2d(x.isnan().any(1, keepdim=True).float(), torch.ones(1, 1, 3, 3), None, 2, 1)
    assert torch.equal(y.isnan(), (reached > 0).expand_as(y))


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5], SHAPES[15]], ids=str)
def test_result_does_not_depend_on_number_of_threads(shape):
    x, weight, bias, stride, padding = make(shape)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = forward(x, weight, bias, stride, padding)
            results.append((y, backward(y, weight, x, stride, padding)))
    finally:
        torch.set_num_threads(before)
    for y, grad_x in results[1:]:
        assert torch.equal(y, results[0][0])
        assert torch.equal(grad_x, results[0][1])


def test_other_layouts_are_pytorchs():
    x, weight, bias, stride, padding = make(SHAPES[4])
    contiguous = x.contiguous()
    y = ops.frozen_conv(contiguous, weight, bias, stride, padding)
    assert torch.equal(y, F.conv2d(contiguous, weight, bias, stride, padding))
    assert y.is_contiguous()


def test_a_kernel_that_does_not_fit_is_refused():
    x, weight, _, _, _ = make(SHAPES[0])
    with pytest.raises(RuntimeError, match="Kernel size can't be greater than actual input size"):
        ops.frozen_conv(x[:, :, :2, :2], weight, None, 2, 0)


def test_a_foreign_gradient_is_refused():
    x, weight, _, stride, padding = make(SHAPES[4])
    for size in (3, 9):
        with pytest.raises(RuntimeError, match=r"output.padding"):
            backward(torch.ones(2, 32, size, size), weight, x, stride, padding)
