"""Norms that keep what their input was made of for the backward pass, and make it again there."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format
from torch.autograd.function import once_differentiable

from pfs_fast.ops._options import ConvOptions


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
        conv_options: ConvOptions,
        eps: float,
        act: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        kernels = torch.ops.pfs_fast
        kept, kept_options = _pixels_read(x, conv_weight, conv_options)
        ctx.autocast = _autocast(x)
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
        grad_u, grads = _norm_backward(
            grad_y,
            u,
            mean,
            var,
            aux,
            (gate, weight, bias),
            ctx.norm_options,
            wants_x,
            wants_channels,
        )
        grad_x = None
        if wants_x:
            low_weight = conv_weight.to(grad_u.dtype)
            shape, dtype, layout = ctx.x_like
            grad_x = kernels._frozen_conv_backward(grad_u, low_weight, shape, *ctx.conv_options)
            grad_x = grad_x.to(dtype).contiguous(memory_format=layout)
        return grad_x, None, None, *grads, None, None, None


class RecomputedNormFunction(torch.autograd.Function):
    """``bn_gate_act(x)`` of an x without gradient. See ``ops.recomputed_bn_gate_act``."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        again: Callable[[Tensor], Tensor],
        source: Tensor,
        gate: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        act: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, mean, var, aux = torch.ops.pfs_fast.bn_gate_act(
            x, gate, weight, bias, None, None, None, True, eps, act
        )
        ctx.save_for_backward(source, gate, weight, bias, mean, var, aux)
        ctx.autocast, ctx.again, ctx.norm_options = _autocast(x), again, (True, eps, act, False)
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        source, gate, weight, bias, mean, var, aux = ctx.saved_tensors
        with torch.autocast(**ctx.autocast):
            x = ctx.again(source)
        wants = ctx.needs_input_grad[3:6]
        _, grads = _norm_backward(
            grad_y, x, mean, var, aux, (gate, weight, bias), ctx.norm_options, False, wants
        )
        return None, None, None, *grads, None, None


def _autocast(x: Tensor) -> dict[str, Any]:
    """Autocast as it is now: what the backward pass makes again must be the same."""
    kind = x.device.type
    return {
        "device_type": kind,
        "dtype": torch.get_autocast_dtype(kind),
        "enabled": torch.is_autocast_enabled(kind),
    }


def _norm_backward(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    aux: Tensor,
    channels: Sequence[Tensor | None],
    options: tuple[bool, float, str, bool],
    wants_x: bool,
    wants: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """Gradients of a norm's input, and of gate, weight and bias where they are wanted."""
    full = [None if t is None else t.to(mean.dtype) for t in channels]
    grad_x, *grads, _ = torch.ops.pfs_fast._bn_gate_act_backward(
        grad_y, x, mean, var, *full, aux, *options, [wants_x, *wants, False]
    )
    return grad_x, [
        grad.to(t.dtype) if wanted else None
        for grad, t, wanted in zip(grads, channels, wants, strict=True)
    ]


def _pixels_read(
    x: Tensor, conv_weight: Tensor, options: ConvOptions
) -> tuple[Tensor, ConvOptions]:
    """A smaller input, and options, of the same convolution: without the pixels that a 1x1 kernel with a stride passes over."""
    stride, padding, dilation, groups = options
    fits = len(stride) == x.dim() - 2 and all(
        step >= 1 for step in stride
    )  # else the operator says so
    if not fits or math.prod(conv_weight.shape[2:]) > 1 or math.prod(stride) == 1 or any(padding):
        return x, options
    read = x[(..., *(slice(None, None, step) for step in stride))]
    return read.contiguous(memory_format=suggest_memory_format(x)), (
        [1] * len(stride),
        padding,
        dilation,
        groups,
    )
