"""frozen_conv_branch is frozen_conv and a strided view of its input: the same values and gradients, added elsewhere."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pfs_fast import ops
from pfs_fast.ops import reference

LAST = torch.channels_last
# shape of x, shape of the kernel, options, step
CASES = {
    "block": ((4, 20, 8, 8), (16, 20, 3, 3), {"stride": 2, "padding": 1}, 2),
    "odd sizes": ((3, 9, 7, 5), (12, 9, 3, 3), {"stride": 2, "padding": 1}, 2),
    "unequal steps": ((2, 8, 9, 8), (8, 8, 1, 1), {}, (3, 2)),
    "step larger than the image": ((2, 8, 3, 3), (8, 8, 3, 3), {"padding": 1}, 5),
    "step of one": ((2, 8, 4, 4), (8, 8, 3, 3), {"padding": 1}, 1),
    "bottleneck": ((2, 64, 6, 6), (16, 64, 1, 1), {}, 2),
    "groups, dilation": ((2, 8, 9, 9), (16, 2, 3, 3), {"groups": 4, "dilation": 2}, 2),
    "one dimension": ((3, 4, 17), (6, 4, 3), {"stride": 2}, 2),
    "three dimensions": ((2, 3, 4, 6, 6), (5, 3, 3, 3, 3), {"padding": 1}, (1, 2, 2)),
}


def inputs(case: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict]:
    shape, kernel, options, step = CASES[case]
    torch.manual_seed(len(case))
    x = torch.randn(shape, dtype=dtype)
    if x.dim() == 4:
        x = x.contiguous(memory_format=LAST)
    return x.requires_grad_(), torch.randn(kernel, dtype=dtype) / kernel[1], {**options, "step": step}  # fmt: skip


def two_readers(x: Tensor, weight: Tensor, step: int | tuple[int, ...], **options):
    steps = [step] * (x.dim() - 2) if isinstance(step, int) else step
    return ops.frozen_conv(x, weight, None, **options), x[(..., *(slice(None, None, s) for s in steps))]  # fmt: skip


def gradient(outputs: tuple[Tensor, Tensor], x: Tensor) -> Tensor:
    y, pixels = outputs
    return torch.autograd.grad(y.sin().sum() + 2 * pixels.cos().sum(), x)[0]


@pytest.mark.parametrize("case", CASES)
def test_is_a_convolution_and_a_view_of_its_input(case: str) -> None:
    x, weight, options = inputs(case)
    y, pixels = ops.frozen_conv_branch(x, weight, None, **options)
    expected = two_readers(x, weight, **options)
    assert torch.equal(y, expected[0]) and torch.equal(pixels, expected[1])
    assert y.stride() == expected[0].stride()
    assert pixels.is_contiguous(memory_format=LAST if x.dim() == 4 else torch.contiguous_format)
    assert pixels.data_ptr() != x.data_ptr()  # a copy, also where it has every pixel
    found, wanted = gradient((y, pixels), x), gradient(expected, x)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert found.stride() == x.stride()


@pytest.mark.parametrize("case", CASES)
def test_is_its_twin_in_float64(case: str) -> None:
    x, weight, options = inputs(case, torch.float64)
    own = ops.frozen_conv_branch(x, weight, None, **options)
    twin = reference.frozen_conv_branch(x, weight, None, **options)
    for found, expected in zip(own, twin, strict=True):
        assert found.stride() == expected.stride()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient(own, x), gradient(twin, x), rtol=1e-10, atol=1e-12)


def test_gradient_of_one_reader_alone() -> None:
    x, weight, options = inputs("block")
    y, pixels = ops.frozen_conv_branch(x, weight, None, **options)
    plain, view = two_readers(x, weight, **options)
    for found, expected in ((y, plain), (pixels, view)):
        grad = torch.autograd.grad(found.sin().sum(), x, retain_graph=True)[0]
        assert torch.equal(grad, torch.autograd.grad(expected.sin().sum(), x)[0])
        assert grad.is_contiguous(memory_format=LAST)


def test_incoming_gradients_are_left_as_they_are() -> None:
    x, weight, options = inputs("block")
    y, pixels = ops.frozen_conv_branch(x, weight, None, **options)
    given = torch.randn_like(y), torch.randn_like(pixels)
    copies = [t.clone() for t in given]
    torch.autograd.backward((y, pixels), given)
    assert all(torch.equal(t, copy) for t, copy in zip(given, copies, strict=True))


def test_autocast_casts_the_convolution_alone() -> None:
    x, weight, options = inputs("block")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = ops.frozen_conv_branch(x, weight, None, **options)
        expected = two_readers(x, weight, **options)
    assert [t.dtype for t in found] == [torch.bfloat16, torch.float32]
    assert torch.equal(found[0], expected[0])
    grad = gradient(found, x)
    assert grad.dtype == torch.float32
    torch.testing.assert_close(grad, gradient(expected, x), rtol=1e-5, atol=1e-6)


def test_x_without_gradient_stays_without() -> None:
    x, weight, options = inputs("block")
    results = ops.frozen_conv_branch(x.detach(), weight, None, **options)
    assert not any(result.requires_grad for result in results)


def test_second_derivative_is_refused() -> None:
    x, weight, options = inputs("block")
    y, _ = ops.frozen_conv_branch(x, weight, None, **options)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


class Maps(TorchDispatchMode):
    """Sizes of what sums and fills write."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(("aten.add", "aten.zero", "aten.fill", "aten.slice_backward")):
            self.sizes += [t.numel() for t in tree_leaves(result) if isinstance(t, Tensor)]
        return result


def test_nothing_is_added_or_filled_over_the_whole_image() -> None:
    x, weight, options = inputs("block")
    largest = []
    for operator in (two_readers, lambda *args, **kw: ops.frozen_conv_branch(*args, None, **kw)):
        y, pixels = operator(x, weight, **options)
        with Maps() as maps:
            torch.autograd.grad((y, pixels), x, (torch.ones_like(y), torch.ones_like(pixels)))
        largest.append(max(maps.sizes))
    assert largest == [x.numel(), x.numel() // 4]


@pytest.mark.parametrize("operators", [ops, reference], ids=["ops", "reference"])
@pytest.mark.parametrize("step", [0, -1, (2,), (2, 0), (2, 2, 2)], ids=str)
def test_bad_step_is_named(operators, step) -> None:
    x, weight, options = inputs("block")
    with pytest.raises(ValueError, match=r"frozen_conv_branch: step must be .* got"):
        operators.frozen_conv_branch(x, weight, None, **options | {"step": step})


def test_bad_input_is_that_of_frozen_conv() -> None:
    x, weight, options = inputs("block")
    with pytest.raises(ValueError, match="x must have 3 to 5 dimensions"):
        ops.frozen_conv_branch(x[:, :, 0, 0], weight, None, **options)
    with pytest.raises(TypeError, match="weight must have the dtype"):
        ops.frozen_conv_branch(x, weight.double(), None, **options)
    with pytest.raises(ValueError, match="padding"):
        ops.frozen_conv_branch(x, weight, None, **options | {"padding": -1})
