"""conv_bn_gate_act equals its twin in float64 but for rounding, and its two halves on their own; keeps and repeats as they do."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from pfs_fast import ops
from pfs_fast.ops import reference

library = torch.ops.pfs_fast
LAST = torch.channels_last

# N, C_in, C, H, W, padding
SHAPES = (
    (2, 16, 16, 8, 8, (1, 1)),
    (3, 5, 9, 7, 6, (1, 1)),  # maps that no tile divides, channels that fill no vector
    (2, 20, 12, 9, 9, (0, 0)),
    (2, 8, 8, 5, 5, (2, 2)),
    (2, 4, 6, 3, 11, (0, 2)),
    (40, 8, 24, 16, 16, (1, 1)),  # blocks that begin within an image
    (70, 16, 20, 32, 32, (1, 1)),  # several blocks for each thread
    (5, 1, 3, 6, 6, (1, 1)),
    (5, 3, 1, 6, 6, (1, 1)),  # one channel, whose layout has two names
    (9, 6, 7, 1, 1, (1, 1)),  # maps of one pixel
    (5, 352, 368, 3, 3, (1, 1)),  # weights that are transformed by chunks
)


def make(shape, with_residual, dtype=torch.float32):
    batch, c_in, channels, height, width, padding = shape
    torch.manual_seed(sum(shape[:5]))
    size = (batch, channels, height + 2 * padding[0] - 2, width + 2 * padding[1] - 2)
    tensors = {
        "x": torch.randn(batch, c_in, height, width),
        "conv_weight": torch.randn(channels, c_in, 3, 3),
        "conv_bias": torch.randn(channels),
        "gate": torch.rand(channels),
        "weight": torch.rand(channels) + 0.5,
        "bias": torch.randn(channels),
        "residual": torch.randn(size) if with_residual else None,
    }
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    maps = ("x", "conv_weight", "conv_bias", "residual")
    tensors = {k: t if t is None else t.to(dtype if k in maps else acc) for k, t in tensors.items()}
    for name in ("x", "residual"):
        if tensors[name] is not None:
            tensors[name] = tensors[name].contiguous(memory_format=LAST)
    return tensors


def leaves(tensors):
    names = ("x", "gate", "weight", "bias", "residual")
    return [tensors[n].requires_grad_() for n in names if tensors[n] is not None]


def run(operator, tensors, shape, grad_y, **options):
    inputs = leaves(tensors)
    y = operator(**tensors, padding=shape[5], **options)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y.to(y.dtype))]


@pytest.mark.parametrize("act", ["identity", "relu", "relu6", "silu", "hardswish"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(shape, with_residual, act):
    for tile in (2, 4):
        tensors = make(shape, with_residual)
        y = ops.conv_bn_gate_act(**tensors, padding=shape[5], tile=tile, act=act)
        grad_y = torch.randn_like(y)
        # Where rounding could decide on a slope, the gradient must not matter.
        exact = {k: None if t is None else t.double() for k, t in tensors.items()}
        z = reference.conv_bn_gate_act(**exact, padding=shape[5], act="identity")
        for edge in (0.0, 6.0, 3.0, -3.0):
            grad_y[(z - edge).abs() < 1e-3] = 0
        found = run(ops.conv_bn_gate_act, tensors, shape, grad_y, tile=tile, act=act)
        expected = run(reference.conv_bn_gate_act, exact, shape, grad_y, act=act)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == torch.float32
            # Relative to the whole tensor: 3e-6 of the convolution, and sums that cancel.
            assert (a.double() - b).norm() <= 2e-5 * b.norm() + 1e-5


@pytest.mark.parametrize("act", ["identity", "relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_bfloat16_agrees_with_float64(shape, with_residual, act):
    for tile in (2, 4):
        tensors = make(shape, with_residual, torch.bfloat16)
        y = ops.conv_bn_gate_act(**tensors, padding=shape[5], tile=tile, act=act)
        grad_y = torch.randn_like(y)
        exact = {k: None if t is None else t.double() for k, t in tensors.items()}
        z = reference.conv_bn_gate_act(**exact, padding=shape[5], act="identity")
        grad_y[z.abs() < 3e-2] = 0  # where rounding could decide on a slope
        found = run(ops.conv_bn_gate_act, tensors, shape, grad_y, tile=tile, act=act)
        expected = run(reference.conv_bn_gate_act, exact, shape, grad_y, act=act)
        maps = (True, True, False, False, False, True)[: len(found)]
        for a, b, is_map in zip(found, expected, maps, strict=True):
            assert a.dtype == (torch.bfloat16 if is_map else torch.float32)
            # A few roundings by at most 2^-8 of a value; in sums of values of about 1 that cancel, those of each.
            each = 1e-2 if is_map else 2**-8 * grad_y.numel() ** 0.5
            assert (a.double() - b).norm() <= 1e-2 * b.norm() + each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_its_halves(shape, with_residual, dtype):
    """But for the order in which the statistics are added up, which may change how a value is rounded to bfloat16."""

    def halves(x, conv_weight, conv_bias, gate, weight, bias, residual, *, padding, tile):
        u = ops.winograd_conv(x, conv_weight, conv_bias, padding, tile=tile)
        return ops.bn_gate_act(u, gate, weight, bias, residual, act="silu")

    for tile in (2, 4):
        tensors = make(shape, with_residual, dtype)
        grad_y = torch.randn_like(halves(**tensors, padding=shape[5], tile=tile))
        found = run(ops.conv_bn_gate_act, tensors, shape, grad_y, tile=tile, act="silu")
        expected = run(halves, tensors, shape, grad_y, tile=tile)
        for a, b in zip(found, expected, strict=True):
            share = 2e-6 if dtype == torch.float32 else 2e-4
            assert (a - b).float().norm() <= share * b.float().norm() + 1e-5


def test_any_mix_of_wanted_gradients():
    shape = SHAPES[1]
    tensors = make(shape, True)
    names = ("x", "gate", "weight", "bias", "residual")
    y = ops.conv_bn_gate_act(**tensors, padding=shape[5])
    grad_y = torch.randn_like(y)
    every = dict(
        zip(names, run(ops.conv_bn_gate_act, make(shape, True), shape, grad_y)[1:], strict=True)
    )
    for count in range(1, 5):
        for wanted in itertools.combinations(names, count):
            tensors = make(shape, True)
            inputs = [tensors[n].requires_grad_() for n in wanted]
            y = ops.conv_bn_gate_act(**tensors, padding=shape[5])
            for name, grad in zip(wanted, torch.autograd.grad(y, inputs, grad_y), strict=True):
                assert torch.equal(grad, every[name]), (wanted, name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [SHAPES[5], SHAPES[6], SHAPES[10]], ids=str)
def test_result_does_not_depend_on_number_of_threads(shape, dtype):
    before, results = torch.get_num_threads(), []
    grad_y = torch.randn_like(make(shape, True, dtype)["residual"])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(ops.conv_bn_gate_act, make(shape, True, dtype), shape, grad_y))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(map(torch.equal, result, results[0]))


@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], SHAPES[3]], ids=str)
def test_any_layout(shape):
    expected_tensors = make(shape, True)
    grad_y = torch.randn_like(expected_tensors["residual"])
    expected = run(ops.conv_bn_gate_act, expected_tensors, shape, grad_y)
    tensors = make(shape, True)
    for name in ("x", "residual", "conv_weight"):
        tensors[name] = tensors[name].detach().contiguous()
    found = run(ops.conv_bn_gate_act, tensors, shape, grad_y.contiguous())
    assert found[0].is_contiguous(memory_format=LAST)
    assert found[1].is_contiguous()
    assert all(map(torch.equal, found, expected))


def test_keeps_the_convolved_and_a_bit_a_value():
    shape = SHAPES[5]
    tensors, saved = make(shape, True), []
    leaves(tensors)
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.conv_bn_gate_act(**tensors, padding=shape[5])
    large = sorted(t.nbytes for t in saved if t.nbytes > 10_000)
    assert large == [y.numel() // 8, y.nbytes]


def test_moves_running_statistics():
    shape = SHAPES[0]
    tensors, found, expected = make(shape, False), [], []
    for operator, stats in ((ops, found), (reference, expected)):
        stats += [torch.zeros(16), torch.ones(16)]
        operator.conv_bn_gate_act(
            **tensors, running_mean=stats[0], running_var=stats[1], momentum=0.3, padding=(1, 1)
        )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 4, 5, 6, 6, (1, 1)), (2, 0, 5, 6, 6, (1, 1))], ids=str)
def test_empty(shape):
    tensors = make(shape, True)
    inputs = leaves(tensors)
    y = ops.conv_bn_gate_act(**tensors, padding=shape[5])
    grads = torch.autograd.grad(y.sum(), inputs)
    assert [g.shape for g in grads] == [t.shape for t in inputs]
    assert all(bool(g.isfinite().all()) for g in grads)


def arguments(tensors, shape, tile=2, act="relu"):
    return (*tensors.values(), list(shape[5]), tile, 1e-5, act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ["relu", "silu"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1]], ids=str)
def test_opcheck(shape, with_residual, act, dtype):
    tensors = make(shape, with_residual, dtype)
    leaves(tensors)
    torch.library.opcheck(library.conv_bn_gate_act, arguments(tensors, shape, act=act))
    plain = {k: None if t is None else t.detach() for k, t in tensors.items()}
    y, u, mean, var, aux = library.conv_bn_gate_act(*arguments(plain, shape, act=act))
    saved = (torch.randn_like(y), u, mean, var, plain["conv_weight"], plain["gate"])
    for wanted in ([True] * 4 + [with_residual], [False] * 5, [False, True, False, False, False]):
        options = (list(shape[5]), 2, 1e-5, act, with_residual, wanted)
        torch.library.opcheck(
            library._conv_bn_gate_act_backward,
            (*saved, plain["weight"], plain["bias"], aux, *options),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiles_whole():
    shape = SHAPES[0]
    grad_y = torch.randn_like(make(shape, True)["residual"])
    compiled = torch.compile(ops.conv_bn_gate_act, fullgraph=True, backend="aot_eager")
    expected = run(ops.conv_bn_gate_act, make(shape, True), shape, grad_y)
    assert all(map(torch.equal, run(compiled, make(shape, True), shape, grad_y), expected))


def test_autocast_keeps_float32():
    shape = SHAPES[0]
    tensors = make(shape, False)
    tensors["x"] = tensors["x"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.conv_bn_gate_act(**tensors, padding=shape[5])
    tensors["x"] = tensors["x"].float()
    assert torch.equal(y, ops.conv_bn_gate_act(**tensors, padding=shape[5]))


def test_second_derivative_is_refused():
    shape = SHAPES[0]
    tensors = make(shape, False)
    x = tensors["x"].requires_grad_()
    y = ops.conv_bn_gate_act(**tensors, padding=shape[5])
    (grad_x,) = torch.autograd.grad(y, x, torch.randn_like(y).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="conv_bn_gate_act: the gradient must be taken once"):
        grad_x.sum().backward()


ERRORS = {
    "x dtype": (
        dict(x=torch.ones(2, 16, 8, 8).double()),
        TypeError,
        "x must be float32 or bfloat16",
    ),
    "kernel": (dict(conv_weight=torch.ones(16, 16, 5, 5)), ValueError, "weight must have shape"),
    "gate": (dict(gate=torch.ones(7)), ValueError, r"gate must have shape \[C\] with C = 16"),
    "residual": (
        dict(residual=torch.ones(2, 16, 4, 4)),
        ValueError,
        "residual must have the shape of x",
    ),
    "tile": (dict(tile=3), ValueError, "tile must be 2 or 4, got 3"),
    "act": (dict(act="gelu"), ValueError, "act must be one of identity, relu"),
    "one value": (
        dict(x=torch.ones(1, 16, 1, 1)),
        ValueError,
        "x must have more than 1 value per channel",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_refuses(name):
    change, error, message = ERRORS[name]
    options = {"x": torch.ones(2, 16, 8, 8), "conv_weight": torch.ones(16, 16, 3, 3), **change}
    with pytest.raises(error, match=f"conv_bn_gate_act: {message}"):
        ops.conv_bn_gate_act(**options)


def test_backward_refuses_what_forward_did_not_give():
    shape = SHAPES[0]
    tensors = make(shape, False)
    y, u, mean, var, aux = library.conv_bn_gate_act(*arguments(tensors, shape))
    rest = (tensors["conv_weight"], None, None, None, aux, [1, 1], 2, 1e-5, "relu", False)
    with pytest.raises(ValueError, match="u must be dense in channels_last"):
        library._conv_bn_gate_act_backward(y, u.contiguous(), mean, var, *rest, [True] * 5)
    with pytest.raises(TypeError, match="_conv_bn_gate_act_backward: "):
        library._conv_bn_gate_act_backward(y.bfloat16(), u, mean, var, *rest, [True] * 5)
    low = (tensors["conv_weight"].bfloat16(), *rest[1:])
    with pytest.raises(TypeError, match="_conv_bn_gate_act_backward: grad_y must"):
        library._conv_bn_gate_act_backward(y.bfloat16(), u, mean, var, *low, [True] * 5)
    with pytest.raises(
        ValueError, match="_conv_bn_gate_act_backward: grad_y must have the shape of x"
    ):
        library._conv_bn_gate_act_backward(y[:1], u, mean, var, *rest, [True] * 5)
