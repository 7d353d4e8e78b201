"""winograd_conv equals a direct convolution in float64 but for rounding, keeps nothing but its weight, and repeats."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.autograd.graph import saved_tensors_hooks

from pfs_fast import ops
from pfs_fast.ops import reference

library = torch.ops.pfs_fast

# N, C_in, C_out, H, W, padding
SHAPES = (
    (2, 16, 16, 8, 8, (1, 1)),
    (2, 4, 5, 7, 6, (1, 1)),  # maps that no tile divides
    (3, 3, 17, 5, 9, (0, 0)),  # fewer channels than lanes, and one more than a vector
    (2, 17, 3, 4, 4, (2, 2)),
    (2, 80, 80, 8, 8, (1, 1)),
    (2, 40, 24, 3, 11, (0, 2)),
    (1, 1, 1, 3, 3, (0, 0)),
    (1, 1, 1, 1, 1, (1, 1)),  # maps of one pixel
    (5, 9, 33, 2, 1, (1, 1)),
    (1, 300, 20, 5, 5, (1, 1)),  # deeper than one panel of weights
    (40, 8, 8, 16, 16, (1, 1)),  # several blocks of tiles
    (3, 24, 20, 13, 29, (1, 0)),
    (5, 352, 368, 3, 3, (1, 1)),  # weights that are transformed by chunks
)
EMPTY = ((0, 4, 5, 6, 6, (1, 1)), (2, 4, 0, 6, 6, (1, 1)), (2, 0, 4, 6, 6, (1, 1)))
# Root mean square of the errors in units of sqrt(9 C), the size of a value for normal x and weights: 6e-8 for each rounding,
# times 3 to 14 for sums of up to 368 products, times 2 to 3 for the points of tile 4. Single values may be 8 times as far off.
TOLERANCES = {2: 1e-6, 4: 3e-6}
DTYPES = (torch.float32, torch.bfloat16)
# Of a value that is rounded once, as a share of it: half a unit in the last place.
ROUNDED = {torch.float32: 0.0, torch.bfloat16: 2.0**-8}


def make(shape, dtype=torch.float32):
    batch, c_in, c_out, height, width, padding = shape
    torch.manual_seed(sum(shape[:5]))
    x = torch.randn(batch, c_in, height, width, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return x, torch.randn(c_out, c_in, 3, 3, dtype=dtype), torch.randn(c_out, dtype=dtype), padding


def exact(x, weight, bias, padding, grad_y):
    """Output and gradient of a direct convolution in float64."""
    x = x.detach().double().requires_grad_()
    y = F.conv2d(x, weight.double(), None if bias is None else bias.double(), 1, padding)
    return y.detach(), torch.autograd.grad(y, x, grad_y.double())[0]


def assert_close(found, expected, depth, tile, dtype):
    assert found.dtype == dtype
    bound, last_place = TOLERANCES[tile] * (9 * depth) ** 0.5, ROUNDED[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=last_place, atol=8 * bound)
    size = expected.square().mean().sqrt()
    assert (found.double() - expected).square().mean().sqrt() < bound + last_place * size


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, tile, dtype):
    """In bfloat16 too the sums are float32, and rounded once."""
    x, weight, bias, padding = make(shape, dtype)
    x.requires_grad_()
    for shift in (bias, None):
        y = ops.winograd_conv(x, weight, shift, padding, tile=tile)
        grad_y = torch.randn_like(y)
        (grad_x,) = torch.autograd.grad(y, x, grad_y)
        exact_y, exact_grad = exact(x, weight, shift, padding, grad_y)
        assert_close(y, exact_y, shape[1], tile, dtype)
        assert_close(grad_x, exact_grad, shape[2], tile, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [2, 4])
@pytest.mark.parametrize("shape", EMPTY, ids=str)
def test_empty(shape, tile, dtype):
    x, weight, bias, padding = make(shape, dtype)
    y = ops.winograd_conv(x.requires_grad_(), weight, bias, padding, tile=tile)
    (grad_x,) = torch.autograd.grad(y.sum(), x)
    assert y.shape == (shape[0], shape[2], 6, 6) and grad_x.shape == x.shape
    assert torch.equal(
        y, bias.view(1, -1, 1, 1).expand(y.shape)
    )  # no channel: nothing but the bias
    assert torch.equal(grad_x, torch.zeros_like(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [2, 4])
def test_any_layout(tile, dtype):
    x, weight, bias, padding = make((3, 12, 10, 9, 7, (1, 1)), dtype)
    y = ops.winograd_conv(x, weight, bias, padding, tile=tile)
    assert y.is_contiguous(memory_format=torch.channels_last)
    plain = x.contiguous().requires_grad_()
    last = weight.contiguous(memory_format=torch.channels_last)
    again = ops.winograd_conv(plain, last, bias, padding, tile=tile)
    assert again.is_contiguous() and torch.equal(again, y)
    grad_y = torch.randn_like(again)
    (grad_x,) = torch.autograd.grad(again, plain, grad_y)
    assert grad_x.is_contiguous()
    sliced = torch.cat([x, x], dim=1)[:, :12]  # neither dense nor at an end of its memory
    assert torch.equal(ops.winograd_conv(sliced, weight, bias, padding, tile=tile), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [2, 4])
def test_reads_nothing_but_its_arguments(tile, dtype):
    """Channels that fill no vector: what lies behind an image, or behind the weights, must not matter."""
    shape = (2, 5, 7, 6, 6, (1, 1))
    x, weight, bias, padding = make(shape, dtype)
    y = ops.winograd_conv(x, weight, bias, padding, tile=tile)
    buffer = torch.full((x.numel() + 64,), float("nan"), dtype=dtype)
    inside = buffer[: x.numel()].view(2, 6, 6, 5).permute(0, 3, 1, 2)
    inside.copy_(x)
    heavy = torch.full((weight.numel() + 64,), float("nan"), dtype=dtype)
    kernel = heavy[: weight.numel()].view(7, 3, 3, 5).permute(0, 3, 1, 2)
    kernel.copy_(weight)
    assert inside.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.winograd_conv(inside, kernel, bias, padding, tile=tile), y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [SHAPES[4], SHAPES[10], SHAPES[12]], ids=str)
@pytest.mark.parametrize("tile", [2, 4])
def test_result_does_not_depend_on_number_of_threads(shape, tile, dtype):
    x, weight, bias, padding = make(shape, dtype)
    grad_y = torch.randn(shape[0], shape[2], *x.shape[2:]).to(dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = ops.winograd_conv(x, weight, bias, padding, tile=tile)
            grad = library._winograd_conv_backward(grad_y, weight, list(padding), tile)
            results.append((y, grad))
    finally:
        torch.set_num_threads(before)
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1])


def test_saves_only_the_weight():
    x, weight, bias, padding = make(SHAPES[0])
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        ops.winograd_conv(x.requires_grad_(), weight, bias, padding)
    assert [t.data_ptr() for t in saved] == [weight.data_ptr()]


def test_weights_may_change_between_calls():
    x, weight, _, padding = make(SHAPES[0])
    before = ops.winograd_conv(x, weight, None, padding)
    weight.mul_(2)
    assert torch.equal(ops.winograd_conv(x, weight, None, padding), before * 2)


def test_weight_and_bias_get_no_gradient():
    x, weight, bias, padding = make(SHAPES[0])
    weight.requires_grad_()
    bias.requires_grad_()
    assert not ops.winograd_conv(x, weight, bias, padding).requires_grad
    ops.winograd_conv(x.requires_grad_(), weight, bias, padding).sum().backward()
    assert x.grad is not None and weight.grad is None and bias.grad is None


def test_reference_is_a_convolution():
    x, weight, bias, padding = make((2, 4, 5, 7, 6, (1, 2)), torch.float64)
    y = reference.winograd_conv(x, weight, bias, padding, tile=2)
    assert torch.equal(y, F.conv2d(x, weight, bias, 1, padding))


def test_second_derivative_is_refused():
    x, weight, _, padding = make(SHAPES[1])
    y = ops.winograd_conv(x.requires_grad_(), weight, None, padding)
    grad_y = torch.randn_like(y).requires_grad_()
    (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
    with pytest.raises(RuntimeError, match="winograd_conv: the gradient must be taken once"):
        grad_x.sum().backward()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[5], (2, 3, 4, 1, 1, (1, 1))], ids=str)
def test_opcheck(shape, layout):
    x, weight, bias, padding = make(shape)
    x = x.contiguous(memory_format=layout).requires_grad_()
    torch.library.opcheck(library.winograd_conv, (x, weight, bias, list(padding), 4))
    grad_y = torch.randn(
        shape[0], shape[2], *library.winograd_conv(x, weight, None, list(padding), 2).shape[2:]
    )
    grad_y = grad_y.contiguous(memory_format=layout)
    torch.library.opcheck(
        library._winograd_conv_backward,
        (grad_y, weight, list(padding), 2),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_compiles_whole():
    x, weight, bias, padding = make(SHAPES[0])

    def layer(x):
        return ops.winograd_conv(torch.relu(x), weight, bias, padding, tile=2)

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_autocast_keeps_float32():
    x, weight, bias, padding = make(SHAPES[0])
    expected = ops.winograd_conv(x.bfloat16().float(), weight, bias, padding)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.winograd_conv(x.bfloat16(), weight, bias, padding)
    assert y.dtype == torch.float32 and torch.equal(y, expected)


ERRORS = {
    "x dimensions": (
        dict(x=torch.ones(4, 8, 8)),
        ValueError,
        r"x must have 4 dimensions \[N, C, H, W\]",
    ),
    "x dtype": (
        dict(x=torch.ones(2, 4, 8, 8).double()),
        TypeError,
        "x must be float32 or bfloat16, got Double",
    ),
    "weight dtype": (
        dict(weight=torch.ones(6, 4, 3, 3).bfloat16()),
        TypeError,
        "weight must have the dtype of x, Float, got BFloat16",
    ),
    "kernel": (
        dict(weight=torch.ones(6, 4, 5, 5)),
        ValueError,
        r"weight must have shape \[C_out, C_in, 3, 3\], got \[6, 4, 5, 5\]",
    ),
    "channels": (
        dict(x=torch.ones(2, 5, 8, 8)),
        ValueError,
        r"x must have 4 channels \(weight.size\(1\)\), got 5",
    ),
    "bias": (
        dict(bias=torch.ones(7)),
        ValueError,
        r"bias must have shape \[C_out\] with C_out = 6",
    ),
    "bias dtype": (
        dict(bias=torch.ones(6).double()),
        TypeError,
        "bias must have the dtype of x, Float, got Double",
    ),
    "padding": (dict(padding=3), ValueError, r"padding must lie in \[0, 2\], got \[3, 3\]"),
    "negative padding": (dict(padding=(0, -1)), ValueError, r"padding must lie in \[0, 2\]"),
    "padding list": (dict(padding=(1, 1, 1)), ValueError, "padding must have two values"),
    "tile": (dict(tile=3), ValueError, "tile must be 2 or 4, got 3"),
    "small": (
        dict(x=torch.ones(2, 4, 2, 8), padding=0),
        ValueError,
        r"x must be at least 3 high and wide with its padding, got shape \[2, 4, 2, 8\]",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refuses(name):
    change, error, message = ERRORS[name]
    arguments = {"x": torch.ones(2, 4, 8, 8), "weight": torch.ones(6, 4, 3, 3), **change}
    with pytest.raises(error, match=f"winograd_conv: {message}"):
        ops.winograd_conv(**arguments)


def test_backward_refuses_foreign_gradients():
    weight = torch.ones(6, 4, 3, 3)
    with pytest.raises(ValueError, match=r"_winograd_conv_backward: grad_y must have 6 channels"):
        library._winograd_conv_backward(torch.ones(2, 4, 8, 8), weight, [1, 1], 4)
    with pytest.raises(TypeError, match="grad_y must be float32 or bfloat16, got Double"):
        library._winograd_conv_backward(torch.ones(2, 6, 8, 8).double(), weight, [1, 1], 4)
    with pytest.raises(TypeError, match="weight must have the dtype of grad_y, BFloat16, got"):
        library._winograd_conv_backward(torch.ones(2, 6, 8, 8).bfloat16(), weight, [1, 1], 4)
    with pytest.raises(
        ValueError, match=r"grad_y must be as large as the output .*got shape \[2, 6, 1, 1\]"
    ):
        library._winograd_conv_backward(torch.ones(2, 6, 1, 1), weight, [2, 2], 4)
