"""Fake kernels and autocast of the operators; schemas, kernels and gradients are registered in C++
(csrc/).

Where the compiled library is missing there are no schemas, and nothing is registered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from pfs_fast._library import is_loaded

_IMPL = torch.library.Library("pfs_fast", "IMPL") if is_loaded() else None

# --- fake: shapes, dtypes and strides without data ------------------------------------------------


def _acc_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _empty_like_layout(x: Tensor) -> Tensor:
    """An empty tensor like x, in the contiguous or channels_last layout that x is closest to."""
    return torch.empty(
        x.shape, dtype=x.dtype, device=x.device, memory_format=suggest_memory_format(x)
    )


def _bn_gate_act_fake(
    x: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean = x.new_empty((x.shape[1],), dtype=_acc_dtype(x))
    if residual is None or act == "identity":
        aux = x.new_empty((0,), dtype=torch.uint8)
    elif act in ("relu", "relu6"):
        aux = x.new_empty(((x.numel() + 7) // 8,), dtype=torch.uint8)
    else:
        aux = _empty_like_layout(x)
    return _empty_like_layout(x), mean, torch.empty_like(mean), aux


def _bn_gate_act_backward_fake(
    grad_y: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    aux: Tensor,
    training: bool,
    eps: float,
    act: str,
    has_residual: bool,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    acc = _acc_dtype(x)

    def like_x(wanted: bool) -> Tensor:
        return _empty_like_layout(x) if wanted else x.new_empty((0,))

    def per_channel(wanted: bool) -> Tensor:
        return x.new_empty((x.shape[1] if wanted else 0,), dtype=acc)

    wants_x, wants_gate, wants_weight, wants_bias, wants_residual = output_mask
    return (
        like_x(wants_x),
        per_channel(wants_gate),
        per_channel(wants_weight),
        per_channel(wants_bias),
        like_x(wants_residual),
    )


def _frozen_conv_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    no_output_padding = [0] * len(stride)
    return torch.ops.aten.convolution(
        x, weight, bias, stride, padding, dilation, False, no_output_padding, groups
    )


def _frozen_conv_backward_fake(
    grad_y: Tensor,
    weight: Tensor,
    input_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return torch.empty(
        tuple(input_size),
        dtype=grad_y.dtype,
        device=grad_y.device,
        memory_format=suggest_memory_format(grad_y),
    )


def _winograd_conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int], tile: int
) -> Tensor:
    height, width = (size + 2 * pad - 2 for size, pad in zip(x.shape[2:], padding, strict=True))
    return torch.empty(
        (x.shape[0], weight.shape[0], height, width),
        dtype=x.dtype,
        device=x.device,
        memory_format=suggest_memory_format(x),
    )


def _winograd_conv_backward_fake(
    grad_y: Tensor, weight: Tensor, padding: Sequence[int], tile: int
) -> Tensor:
    height, width = (
        size + 2 - 2 * pad for size, pad in zip(grad_y.shape[2:], padding, strict=True)
    )
    return torch.empty(
        (grad_y.shape[0], weight.shape[1], height, width),
        dtype=grad_y.dtype,
        device=grad_y.device,
        memory_format=suggest_memory_format(grad_y),
    )


def _conv_bn_gate_act_fake(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    padding: Sequence[int],
    tile: int,
    eps: float,
    act: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    u = _winograd_conv_fake(x, conv_weight, conv_bias, padding, tile)
    u = torch.empty_like(u, memory_format=torch.channels_last)
    y, mean, var, aux = _bn_gate_act_fake(
        u, gate, weight, bias, residual, None, None, True, eps, act
    )
    return y, u, mean, var, aux


def _conv_bn_gate_act_backward_fake(
    grad_y: Tensor,
    u: Tensor,
    mean: Tensor,
    var: Tensor,
    conv_weight: Tensor,
    gate: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    aux: Tensor,
    padding: Sequence[int],
    tile: int,
    eps: float,
    act: str,
    has_residual: bool,
    output_mask: Sequence[bool],
    grad_branch: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    last = {"memory_format": torch.channels_last}
    grad_x, *per_channel, grad_residual = _bn_gate_act_backward_fake(
        grad_y, u, mean, var, gate, weight, bias, aux, True, eps, act, has_residual, output_mask
    )
    if output_mask[0]:
        grad_x = _winograd_conv_backward_fake(grad_y, conv_weight, padding, tile)
        grad_x = torch.empty_like(grad_x, **last)
    if output_mask[4]:
        grad_residual = torch.empty_like(grad_residual, **last)
    return grad_x, *per_channel, grad_residual


def _pooled(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[int, ...]:
    spatial = zip(x.shape[2:], kernel, stride, padding, strict=True)
    return (*x.shape[:2], *((size + 2 * pad - k) // step + 1 for size, k, step, pad in spatial))


def _max_pool_fake(
    x: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
) -> tuple[Tensor, Tensor]:
    size, layout = _pooled(x, kernel, stride, padding), suggest_memory_format(x)
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=layout)
    return y, torch.empty(size, dtype=torch.uint8, device=x.device, memory_format=layout)


def _max_pool_backward_fake(
    grad_y: Tensor,
    offsets: Tensor,
    input_size: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    return torch.empty(
        tuple(input_size),
        dtype=grad_y.dtype,
        device=grad_y.device,
        memory_format=suggest_memory_format(offsets),
    )


def _gate_step_fake(*args: Any) -> None:
    return None


# --- autocast: x decides; what is per channel stays float32 ---------------------------------------


def _bn_gate_act_autocast(device_type: str) -> Any:
    def run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        per_channel_and_residual, options = args[:6], args[6:]
        gate, weight, bias, residual, running_mean, running_var = per_channel_and_residual
        acc = _acc_dtype(x)
        with torch.autocast(device_type, enabled=False):
            return torch.ops.pfs_fast.bn_gate_act(
                x,
                *(None if t is None else t.to(acc) for t in (gate, weight, bias)),
                None if residual is None else residual.to(x.dtype),
                *(None if t is None else t.to(acc) for t in (running_mean, running_var)),
                *options,
            )

    return run


def _frozen_conv_autocast(device_type: str) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        # As for PyTorch's own convolution; float64 is never lowered.
        low = x.dtype if x.dtype == torch.float64 else torch.get_autocast_dtype(device_type)
        with torch.autocast(device_type, enabled=False):
            lowered_bias = None if bias is None else bias.to(low)
            return torch.ops.pfs_fast.frozen_conv(x.to(low), weight.to(low), lowered_bias, *options)

    return run


def _winograd_conv_autocast(device_type: str) -> Any:
    def run(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
        # Its sums are float32 in any case; bfloat16 is for those who bring it themselves.
        with torch.autocast(device_type, enabled=False):
            full_bias = None if bias is None else bias.float()
            return torch.ops.pfs_fast.winograd_conv(x.float(), weight.float(), full_bias, *options)

    return run


def _conv_bn_gate_act_autocast(device_type: str, operator: Any) -> Any:
    def run(x: Tensor, *args: Any) -> tuple[Tensor, ...]:
        # Its sums are float32 in any case; bfloat16 is for those who bring it themselves.
        full = (None if t is None else t.float() for t in args[:6])
        with torch.autocast(device_type, enabled=False):
            return operator(x.float(), *full, *args[6:])

    return run


def _register() -> None:
    library = torch.library
    fakes = {
        "bn_gate_act": _bn_gate_act_fake,
        "_bn_gate_act_backward": _bn_gate_act_backward_fake,
        "frozen_conv": _frozen_conv_fake,
        "_frozen_conv_backward": _frozen_conv_backward_fake,
        "winograd_conv": _winograd_conv_fake,
        "_winograd_conv_backward": _winograd_conv_backward_fake,
        "max_pool": _max_pool_fake,
        "_max_pool_backward": _max_pool_backward_fake,
        "conv_bn_gate_act": _conv_bn_gate_act_fake,
        "_conv_bn_gate_act_backward": _conv_bn_gate_act_backward_fake,
        "gate_step_": _gate_step_fake,
    }
    for name, fake in fakes.items():
        library.register_fake(f"pfs_fast::{name}", fake)
    for device_type, key in (("cpu", "AutocastCPU"), ("cuda", "AutocastCUDA")):
        _IMPL.impl("bn_gate_act", _bn_gate_act_autocast(device_type), key)
        _IMPL.impl("frozen_conv", _frozen_conv_autocast(device_type), key)
        _IMPL.impl("winograd_conv", _winograd_conv_autocast(device_type), key)
        for name in ("conv_bn_gate_act", "conv_bn_gate_act_branch"):
            operator = getattr(torch.ops.pfs_fast, name)
            _IMPL.impl(name, _conv_bn_gate_act_autocast(device_type, operator), key)


if _IMPL is not None:
    _register()
