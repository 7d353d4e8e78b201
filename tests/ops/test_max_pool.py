"""max_pool is PyTorch's max_pool2d, bit for bit, keeps a byte for each output, and repeats."""

from __future__ import annotations

import pytest
import torch
from cases import LAYOUTS
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from pfs_fast import ops
from pfs_fast.ops import reference

library = torch.ops.pfs_fast

# N, C, H, W, kernel, stride, padding
SHAPES = (
    (2, 16, 8, 8, 2, 2, 0),
    (2, 3, 7, 9, 2, 2, 0),  # fewer channels than lanes; a last row and column in no window
    (3, 17, 6, 5, 2, 2, 1),  # one more than a vector
    (2, 32, 9, 9, 3, 2, 1),
    (2, 37, 8, 7, 3, 1, 1),  # windows that overlap by two thirds
    (1, 1, 5, 5, 3, 2, 1),
    (2, 70, 4, 4, (3, 2), (1, 3), (1, 0)),
    (2, 33, 2, 2, 2, 2, 0),  # maps of one pixel
    (2, 20, 1, 1, 1, 1, 0),
    (4, 9, 1, 1, 3, 2, 1),  # windows larger than the map
    (2, 12, 11, 6, 2, 5, 0),  # pixels in no window
    (1, 18, 20, 20, (15, 17), (3, 2), (7, 8)),  # 255 taps
    (5, 48, 13, 13, 3, 2, 0),
)
SOME = (SHAPES[1], SHAPES[3], SHAPES[6])
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
LAYOUT_NAMES = ("contiguous", "channels_last", "sliced", "permuted", "sliced_channels_last")


def make(shape, dtype=torch.float32, layout="contiguous", device="cpu", values="normal"):
    """An image: normal values; few different ones, for ties; or with NaN and infinities."""
    size, options = shape[:4], shape[4:]
    torch.manual_seed(sum(size))
    if values == "ties":
        x = torch.randint(-1, 2, size).to(dtype)
    else:
        x = torch.randn(size, dtype=torch.float64).to(dtype)
    if values == "special":
        kind = torch.rand(size)
        x[kind < 0.5] = float("-inf")
        x[kind < 0.1] = float("nan")
        x[kind < 0.05] = float("inf")
    return LAYOUTS[layout](x.to(device)).detach(), options


def forward_and_backward(op, x, options, grad_y=None):
    x = x.detach().requires_grad_()
    y = op(x, *options)
    if grad_y is None:
        torch.manual_seed(7)
        grad_y = torch.randn(y.shape, dtype=torch.float64).to(y)
    return y.detach(), torch.autograd.grad(y, x, grad_y)[0]


def same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True, check_stride=False)


def check_against_twin(x, options):
    y, grad_x = forward_and_backward(ops.max_pool, x, options)
    expected_y, _ = forward_and_backward(reference.max_pool, x, options)
    same(y, expected_y)
    # Sums in float32, rounded once: PyTorch's own are rounded at each step. Both add up in the order of the output, so the sums
    # of float32 and float64 are the same to the bit.
    wide = x if x.dtype == torch.float64 else x.float()
    torch.manual_seed(7)
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(y)
    _, expected_grad = forward_and_backward(
        reference.max_pool, wide.contiguous(), options, grad_y.to(wide.dtype)
    )
    same(grad_x, expected_grad.to(x.dtype))
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    layout = torch.channels_last if last else torch.contiguous_format
    if min(x.shape[1:]) > 1 and min(y.shape[1:]) > 1 and x.is_contiguous(memory_format=layout):
        assert y.is_contiguous(memory_format=layout) and grad_x.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin(shape, layout, dtype, device):
    check_against_twin(*make(shape, dtype, layout, device))


@pytest.mark.parametrize("values", ["ties", "special"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_ties_nan_and_infinity(shape, layout, dtype, values, device):
    """The same one of several equal maxima gets the gradient, and the same one of several NaN."""
    check_against_twin(*make(shape, dtype, layout, device, values))


@pytest.mark.parametrize("layout", [*LAYOUT_NAMES, "expanded"])
@pytest.mark.parametrize("shape", SOME, ids=str)
def test_any_strides(shape, layout, device):
    check_against_twin(*make(shape, layout=layout, device=device))


def test_float16_on_cuda():
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    for shape in SHAPES:
        check_against_twin(*make(shape, torch.float16, "channels_last", "cuda"))


def test_first_of_equal_maxima_and_last_nan_get_the_gradient(device):
    x = torch.tensor([[1.0, 3.0], [3.0, 2.0]], device=device).view(1, 1, 2, 2)
    _, grad_x = forward_and_backward(ops.max_pool, x, (2,), torch.ones(1, 1, 1, 1, device=device))
    assert grad_x.flatten().tolist() == [0.0, 1.0, 0.0, 0.0]
    x[0, 0, 0, 0] = x[0, 0, 1, 0] = float("nan")
    y, grad_x = forward_and_backward(ops.max_pool, x, (2,), torch.ones(1, 1, 1, 1, device=device))
    assert y.isnan().all() and grad_x.flatten().tolist() == [0.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradients_of_other_windows_do_not_leak(layout, device):
    """A NaN in one output's gradient reaches one input only."""
    x, options = make(SHAPES[3], layout=layout, device=device)
    grad_y = torch.ones_like(ops.max_pool(x, *options))
    grad_y[1, 5, 2, 2] = float("nan")
    _, grad_x = forward_and_backward(ops.max_pool, x, options, grad_y)
    assert grad_x.isnan().sum() == 1


@pytest.mark.parametrize("shape", [(0, 5, 6, 6, 2, 2, 0), (2, 0, 6, 6, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_empty(shape, layout, device):
    x, options = make(shape, layout=layout, device=device)
    y, grad_x = forward_and_backward(ops.max_pool, x, options)
    assert y.shape == (shape[0], shape[1], 3, 3) and grad_x.shape == x.shape


def test_options_as_torch_names_them(device):
    x, _ = make(SHAPES[0], device=device)
    same(ops.max_pool(x, 3, padding=1), nn.MaxPool2d(3, padding=1)(x))
    same(ops.max_pool(x, (3, 2), 1), nn.MaxPool2d((3, 2), 1)(x))
    same(reference.max_pool(x, 3, padding=1), nn.MaxPool2d(3, padding=1)(x))


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_reads_and_writes_nothing_beside_its_tensors(dtype, layout):
    """Channels that fill no vector: what lies around a tensor must not matter, and must stay."""
    for shape in SHAPES:
        x, options = make(shape, dtype, layout)
        y, _ = library.max_pool(x, *(_pair(o) for o in options))
        buffer = torch.full((x.numel() + 128,), float("nan"), dtype=dtype)
        inside = torch.as_strided(buffer, x.shape, x.stride(), 64)
        inside.copy_(x)
        same(ops.max_pool(inside, *options), y)


def _pair(value):
    return [value, value] if isinstance(value, int) else list(value)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", [(6, 64, 33, 31, 3, 2, 1), (8, 50, 32, 32, 2, 2, 0)], ids=str)
def test_result_does_not_depend_on_number_of_threads(shape, layout):
    x, options = make(shape, layout=layout)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(forward_and_backward(ops.max_pool, x, options))
    finally:
        torch.set_num_threads(before)
    for y, grad in results[1:]:
        assert torch.equal(y, results[0][0]) and torch.equal(grad, results[0][1])


def test_saves_one_byte_for_each_output(device):
    x, options = make(SHAPES[3], layout="channels_last", device=device)
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.max_pool(x.requires_grad_(), *options)
    assert [t.dtype for t in saved] == [torch.uint8]
    assert saved[0].untyped_storage().nbytes() == y.numel()


def test_input_may_change_before_backward(device):
    x, options = make(SHAPES[0], device=device)
    _, expected = forward_and_backward(reference.max_pool, x, options)
    leaf = x.clone().requires_grad_()
    inner = leaf * 1
    y = ops.max_pool(inner, *options)
    inner.detach().zero_()
    torch.manual_seed(7)
    grad_y = torch.randn(y.shape, dtype=torch.float64).to(y)
    same(torch.autograd.grad(y, leaf, grad_y)[0], expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_gradcheck(layout, device):
    for shape in SOME:
        x, options = make((*shape[:1], 3, *shape[2:]), torch.float64, layout, device)
        leaf = x.requires_grad_()
        assert torch.autograd.gradcheck(lambda t, o=options: ops.max_pool(t, *o), leaf)


def test_second_derivative_is_refused(device):
    x, options = make(SHAPES[0], device=device)
    y = ops.max_pool(x.requires_grad_(), *options)
    grad_y = torch.randn_like(y).requires_grad_()
    (grad_x,) = torch.autograd.grad(y, x, grad_y, create_graph=True)
    with pytest.raises(RuntimeError, match="max_pool: the gradient must be taken once"):
        grad_x.sum().backward()


@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("shape", [*SOME, SHAPES[7], SHAPES[8]], ids=str)
def test_opcheck(shape, layout, device):
    x, options = make(shape, layout=layout, device=device)
    options = [_pair(o) for o in options]
    torch.library.opcheck(library.max_pool, (x.requires_grad_(), *options))
    y, offsets = library.max_pool(x.detach(), *options)
    torch.library.opcheck(library._max_pool_backward, (y, offsets, x.shape, *options))


def test_compiles_whole(device):
    x, options = make(SHAPES[3], layout="channels_last", device=device)

    def layer(x):
        return ops.max_pool(torch.relu(x), *options)

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0]) and torch.equal(results[0][1], results[1][1])


def test_autocast_leaves_the_dtype(device):
    for dtype in DTYPES:
        x, options = make(SHAPES[0], dtype, device=device)
        with torch.autocast(device, dtype=torch.bfloat16):
            assert ops.max_pool(x, *options).dtype == dtype


def image(*size, dtype=torch.float32):
    return torch.ones(size, dtype=dtype)


ERRORS = {
    "x dimensions": (
        dict(x=image(4, 8, 8)),
        ValueError,
        r"x must have 4 dimensions \[N, C, H, W\], got shape \[4, 8, 8\]; add",
    ),
    "x dtype": (
        dict(x=image(2, 4, 8, 8, dtype=torch.int32)),
        TypeError,
        "x must be float32, bfloat16 or float64 on cpu, got Int; convert",
    ),
    "float16": (dict(x=image(2, 4, 8, 8, dtype=torch.half)), TypeError, "x must be float32"),
    "kernel": (dict(kernel=0), ValueError, r"kernel must be at least 1, got \[0, 0\]; correct"),
    "kernel list": (dict(kernel=(2, 2, 2)), ValueError, r"kernel must have two values, got \[2,"),
    "large kernel": (
        dict(x=image(1, 1, 40, 40), kernel=16),
        ValueError,
        r"kernel must have at most 255 values, got \[16, 16\]; use torch.nn.functional.max_pool2d",
    ),
    "huge kernel": (dict(kernel=2**62), ValueError, "kernel must have at most 255 values"),
    "stride": (dict(stride=(1, 0)), ValueError, r"stride must be at least 1, got \[1, 0\]"),
    "huge stride": (dict(stride=2**62), ValueError, "stride must be at most 2147483648"),
    "padding": (dict(padding=-1), ValueError, r"padding must be at least 0, got \[-1, -1\]"),
    "large padding": (
        dict(padding=(1, 2)),
        ValueError,
        r"padding must be at most half of kernel, \[2, 2\], got \[1, 2\]; pad",
    ),
    "small x": (
        dict(x=image(2, 4, 8, 1)),
        ValueError,
        r"x must be at least as high and wide as kernel, \[2, 2\], .* got shape \[2, 4, 8, 1\]; use",
    ),
    "no x": (
        dict(x=image(2, 4, 0, 8), padding=1),
        ValueError,
        "x must be at least as high and wide as kernel",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refuses(name):
    change, error, message = ERRORS[name]
    arguments = {"x": image(2, 4, 8, 8), "kernel": 2, **change}
    with pytest.raises(error, match=f"max_pool: {message}"):
        ops.max_pool(**arguments)


BACKWARD_ERRORS = {
    "grad_y": (dict(grad_y=image(2, 4, 3, 4)), ValueError, "grad_y must have the shape"),
    "grad_y dtype": (
        dict(grad_y=image(2, 4, 4, 4, dtype=torch.int64)),
        TypeError,
        "grad_y must have the dtype of x, got Long",
    ),
    "offsets": (
        dict(offsets=image(2, 4, 4, 3, dtype=torch.uint8)),
        ValueError,
        r"offsets must have the shape of max_pool's output, \[2, 4, 4, 4\], got \[2, 4, 4, 3\]",
    ),
    "offsets dtype": (
        dict(offsets=image(2, 4, 4, 4)),
        TypeError,
        "offsets must be uint8, got Float",
    ),
    "input_size": (dict(input_size=[2, 4, 9, 10]), ValueError, "grad_y must have the shape"),
    "negative input_size": (
        dict(input_size=[-2, 4, 8, 8]),
        ValueError,
        "input_size must be at least 0",
    ),
    "short input_size": (dict(input_size=[4, 8, 8]), ValueError, "input_size must have 4"),
}


@pytest.mark.parametrize("name", BACKWARD_ERRORS)
def test_backward_refuses(name):
    change, error, message = BACKWARD_ERRORS[name]
    arguments = {
        "grad_y": image(2, 4, 4, 4),
        "offsets": image(2, 4, 4, 4, dtype=torch.uint8),
        "input_size": [2, 4, 8, 8],
        **change,
    }
    with pytest.raises(error, match=f"_max_pool_backward: {message}"):
        library._max_pool_backward(*arguments.values(), [2, 2], [2, 2], [0, 0])


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_foreign_offsets_reach_no_other_memory(layout):
    """A tap outside the window, or outside the image, adds to nothing."""
    shape, options = (3, 20, 9, 7), ([3, 3], [2, 2], [1, 1])
    grad_y = LAYOUTS[layout](torch.ones(3, 20, 5, 4))
    for byte in (9, 255):
        offsets = torch.full_like(grad_y, byte, dtype=torch.uint8)
        assert not library._max_pool_backward(grad_y, offsets, shape, *options).any()
    corner = torch.zeros_like(grad_y, dtype=torch.uint8)  # first row and column: in the padding
    grad_x = library._max_pool_backward(grad_y, corner, shape, *options)
    assert grad_x.sum() == 3 * 20 * 4 * 3 and grad_x.max() == 1
