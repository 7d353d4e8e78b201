"""A convolution and its norm that keep the convolution's input for the backward pass, and convolve again there."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd.function import once_differentiable

Options = tuple[list[int], list[int], list[int], int]  # stride, padding, dilation, groups


class RecomputedConvNormFunction(torch.autograd.Function):
    """``bn_gate_act(frozen_conv(x))`` with the statistics of the batch. See ``ops.recomputed_conv_bn_gate_act``.

    In Python, unlike the gradients of the other operators: a network has few such layers.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        conv_weight: Tensor,
        conv_bias: Tensor | None,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        conv_options: Options,
        eps: float,
        act: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = torch.ops.pfs_fast
        kept, kept_options = _pixels_read(x, conv_weight, conv_options)
        # As it was here: the convolution of the backward pass must be this one.
        ctx.autocast = {
            "device_type": x.device.type,
            "dtype": torch.get_autocast_dtype(x.device.type),
            "enabled": torch.is_autocast_enabled(x.device.type),
        }
        u = kernels.frozen_conv(kept, conv_weight, conv_bias, *kept_options)
        y, mean, var, aux = kernels.bn_gate_act(
            u, gate, weight, bias, None, None, None, True, eps, act
        )
        ctx.save_for_backward(kept, conv_weight, conv_bias, gate, weight, bias, mean, var, aux)
        ctx.conv_options, ctx.kept_options = conv_options, kept_options
        ctx.norm_options = (True, eps, act, False)
        ctx.x_like = (x.shape, x.dtype, suggest_memory_format(x))
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        kernels = torch.ops.pfs_fast
        kept, conv_weight, conv_bias, gate, weight, bias, mean, var, aux = ctx.saved_tensors
        wants_x, _, _, *wants_channels = ctx.needs_input_grad[:6]
        with torch.autocast(**ctx.autocast):
            u = kernels.frozen_conv(kept, conv_weight, conv_bias, *ctx.kept_options)
        channels = [None if t is None else t.to(mean.dtype) for t in (gate, weight, bias)]
        grad_u, *grads, _ = kernels._bn_gate_act_backward(
            grad_y,
            u,
            mean,
            var,
            *channels,
            aux,
            *ctx.norm_options,
            [wants_x, *wants_channels, False],
        )
        grads = [
            grad.to(t.dtype) if wants else None
            for grad, t, wants in zip(grads, (gate, weight, bias), wants_channels, strict=True)
        ]
        grad_x = None
        if wants_x:
            low_weight = conv_weight.to(grad_u.dtype)
            shape, dtype, layout = ctx.x_like
            grad_x = kernels._frozen_conv_backward(grad_u, low_weight, shape, *ctx.conv_options)
            grad_x = grad_x.to(dtype).contiguous(memory_format=layout)
        return grad_x, None, None, *grads, None, None, None


def _pixels_read(x: Tensor, conv_weight: Tensor, options: Options) -> tuple[Tensor, Options]:
    """A smaller input, and options, of the same convolution: without the pixels that a 1x1 kernel with a stride passes over."""
    stride, padding, dilation, groups = options
    if math.prod(conv_weight.shape[2:]) > 1 or max(stride) == 1 or any(padding):
        return x, options
    read = x[(..., *(slice(None, None, step) for step in stride))]
    return read.contiguous(memory_format=suggest_memory_format(x)), (
        [1] * len(stride),
        padding,
        dilation,
        groups,
    )
