"""A convolution that passes on the pixels of its input which the 1x1 convolution beside it reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd.function import once_differentiable

from pfs_fast.ops._options import ConvOptions


def _pixels(x: Tensor, step: Sequence[int]) -> Tensor:
    """A view of every step-th pixel in each dimension, from the first on. [N, C, *ceil(spatial / step)]."""
    return x[(..., *(slice(None, None, s) for s in step))]


class FrozenConvBranchFunction(torch.autograd.Function):
    """``frozen_conv(x)`` and some pixels of x. See ``ops.frozen_conv_branch``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: ConvOptions,
        step: list[int],
    ) -> tuple[Tensor, Tensor]:
        y = torch.ops.pfs_fast.frozen_conv(x, weight, bias, *options)
        ctx.save_for_backward(weight)
        ctx.set_materialize_grads(False)
        ctx.options, ctx.step = options, step
        layout = suggest_memory_format(x)
        ctx.x_like = (x.shape, x.dtype, layout)
        return y, _pixels(x, step).clone(memory_format=layout)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_y: Tensor | None, grad_pixels: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        shape, dtype, layout = ctx.x_like
        if grad_y is not None:
            low_weight = weight.to(grad_y.dtype)  # autocast's
            grad_x = torch.ops.pfs_fast._frozen_conv_backward(
                grad_y, low_weight, shape, *ctx.options
            )
            grad_x = grad_x.to(dtype).contiguous(memory_format=layout)
        elif grad_pixels is not None:
            grad_x = grad_pixels.new_empty(shape).contiguous(memory_format=layout).zero_()
        else:
            return (None,) * 5
        if grad_pixels is not None:
            _pixels(grad_x, ctx.step).add_(grad_pixels)  # nobody else has seen grad_x
        return grad_x, None, None, None, None
