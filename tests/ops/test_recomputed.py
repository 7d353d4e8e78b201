"""The recomputed operators are their parts, with what these are made of kept in place of their outputs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks.footprint import saved_bytes
from pfs_fast import ops
from pfs_fast.ops import reference

LAST = torch.channels_last
# shape of x, shape of the kernel, options
CASES = {
    "stem": ((5, 3, 16, 14), (20, 3, 3, 3), {"padding": 1}),
    "stem with a stride": ((3, 3, 17, 16), (16, 3, 7, 7), {"stride": 2, "padding": 3}),
    "shortcut": ((4, 20, 9, 8), (40, 20, 1, 1), {"stride": 2}),
    "shortcut of unequal strides": ((4, 8, 9, 8), (24, 8, 1, 1), {"stride": (3, 2)}),
    "padded 1x1": ((4, 8, 9, 8), (24, 8, 1, 1), {"stride": 2, "padding": 1}),
    "groups, dilation": ((4, 8, 12, 12), (32, 2, 3, 3), {"groups": 4, "dilation": 2}),
    "one dimension": ((6, 4, 33), (12, 4, 1), {"stride": 2}),
    "three dimensions": ((2, 3, 5, 8, 8), (8, 3, 3, 3, 3), {"padding": 1, "stride": (1, 2, 2)}),
}
CHANNELS = ("gate", "weight", "bias")


def inputs(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict, dict]:
    shape, kernel, options = CASES[case]
    torch.manual_seed(len(case))
    x = torch.randn(shape, dtype=dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=LAST)
    weight = torch.randn(kernel, dtype=dtype) / kernel[1]
    channels = {name: torch.rand(kernel[0], dtype=dtype).requires_grad_() for name in CHANNELS}
    return x.requires_grad_(), weight, channels, options


def two_halves(operators, x: Tensor, weight: Tensor, channels: dict, options: dict) -> Tensor:
    return operators.bn_gate_act(operators.frozen_conv(x, weight, None, **options), **channels)


def gradients(y: Tensor, x: Tensor, channels: dict) -> tuple[Tensor, ...]:
    torch.manual_seed(0)
    return torch.autograd.grad(y, (x, *channels.values()), torch.randn(y.shape, dtype=y.dtype))


@pytest.mark.parametrize("case", CASES)
def test_is_its_two_halves(case: str) -> None:
    x, weight, channels, options = inputs(case)
    expected = two_halves(ops, x, weight, channels, options)
    y = ops.recomputed_conv_bn_gate_act(x, weight, **channels, **options)
    assert y.stride() == expected.stride()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(
        gradients(y, x, channels), gradients(expected, x, channels), strict=True
    ):
        assert found.stride() == wanted.stride()
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
def test_is_its_twin_in_float64(case: str) -> None:
    x, weight, channels, options = inputs(case, torch.float64)
    results = []
    for operators in (ops, reference):
        y = operators.recomputed_conv_bn_gate_act(x, weight, **channels, **options)
        results.append((y, *gradients(y, x, channels)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_keeps_the_pixels_that_it_reads() -> None:
    _, weight, channels, options = inputs("shortcut")
    large = torch.randn(16, 20, 32, 32).contiguous(memory_format=LAST).requires_grad_()
    kept = saved_bytes(
        lambda: ops.recomputed_conv_bn_gate_act(large, weight, **channels, **options),
        without=[weight],
    )
    assert kept == 16 * 20 * 16 * 16 * 4


def test_images_need_no_gradient() -> None:
    x, weight, channels, options = inputs("stem")
    y = ops.recomputed_conv_bn_gate_act(x.detach(), weight, gate=channels["gate"], **options)
    y.sum().backward()
    expected = two_halves(ops, x.detach(), weight, {"gate": channels["gate"]}, options)
    (grad,) = torch.autograd.grad(expected.sum(), channels["gate"])
    torch.testing.assert_close(channels["gate"].grad, grad, rtol=1e-5, atol=1e-5)


def test_running_statistics_move_once() -> None:
    x, weight, _, options = inputs("stem")
    running = [torch.zeros(20), torch.ones(20)]
    expected = [torch.zeros(20), torch.ones(20)]
    y = ops.recomputed_conv_bn_gate_act(
        x, weight, None, None, None, None, *running, momentum=0.1, **options
    )
    y.sum().backward()
    u = ops.frozen_conv(x, weight, None, **options)
    ops.bn_gate_act(u, None, None, None, None, *expected, momentum=0.1)
    for found, wanted in zip(running, expected, strict=True):
        torch.testing.assert_close(found, wanted)


def test_convolves_in_backward_as_under_the_autocast_of_forward() -> None:
    x, weight, channels, options = inputs("stem")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.recomputed_conv_bn_gate_act(x, weight, **channels, **options)
        expected = two_halves(ops, x, weight, channels, options)
    assert y.dtype == torch.bfloat16
    for found, wanted in zip(
        gradients(y, x, channels), gradients(expected, x, channels), strict=True
    ):
        assert found.dtype == wanted.dtype == torch.float32
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_second_derivative_is_refused() -> None:
    x, weight, channels, options = inputs("stem")
    y = ops.recomputed_conv_bn_gate_act(x, weight, **channels, **options)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_bad_input_names_the_argument() -> None:
    x, weight, _, options = inputs("stem")
    with pytest.raises(ValueError, match="gate"):
        ops.recomputed_conv_bn_gate_act(x, weight, gate=torch.ones(7), **options)
    with pytest.raises(TypeError, match="weight"):
        ops.recomputed_conv_bn_gate_act(x, weight.double(), **options)
    with pytest.raises(ValueError, match="x must have 3 to 5 dimensions"):
        ops.recomputed_conv_bn_gate_act(x[:, :, 0, 0], weight, **options)
    x, weight, _, _ = inputs("shortcut")
    for stride in (0, (2,), (-1, 2)):
        with pytest.raises(ValueError, match="stride"):
            ops.recomputed_conv_bn_gate_act(x, weight, stride=stride)


def chain(operators, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict]:
    """A norm of a wide, constant map made of narrow images."""
    torch.manual_seed(0)
    images = torch.randn(6, 3, 12, 12, dtype=dtype)
    weight = torch.randn(24, 3, 3, 3, dtype=dtype)
    channels = {name: torch.rand(24, dtype=dtype).requires_grad_() for name in CHANNELS}

    def again(source: Tensor) -> Tensor:
        return operators.frozen_conv(source, weight, None, padding=1).relu()

    return operators.recomputed_bn_gate_act(again(images), again, images, **channels), channels


def test_norm_of_a_constant_is_bn_gate_act_and_its_twin() -> None:
    results = []
    for operators in (ops, reference):
        y, channels = chain(operators, torch.float64)
        torch.manual_seed(1)
        grad = torch.randn(y.shape, dtype=y.dtype)
        results.append((y, *torch.autograd.grad(y, [*channels.values()], grad)))
    for found, wanted in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_norm_of_a_constant_keeps_its_source() -> None:
    assert saved_bytes(lambda: chain(ops)[0]) == 6 * 3 * 12 * 12 * 4


def test_norm_of_a_constant_makes_it_again_under_the_same_autocast() -> None:
    seen = []

    def again(source: Tensor) -> Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return source * 2

    source, gate = torch.randn(4, 3, 5, 5), torch.ones(3, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.recomputed_bn_gate_act(again(source), again, source, gate)
    y.sum().backward()
    assert seen == [True, True]


@pytest.mark.parametrize("operators", [ops, reference])
def test_norm_of_a_constant_refuses_what_is_none(operators) -> None:
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    with pytest.raises(ValueError, match="x must be a constant"):
        operators.recomputed_bn_gate_act(x, lambda source: source, x)
