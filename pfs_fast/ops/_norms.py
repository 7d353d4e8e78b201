"""Batch norm with gate, residual sum and activation, alone and behind a convolution."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pfs_fast._library import require_ops
from pfs_fast.ops._options import per_dimension
from pfs_fast.ops._recomputed import RecomputedConvNormFunction, RecomputedNormFunction
from pfs_fast.ops.reference import require_constant, update_running_stats


def bn_gate_act(
    x: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    training: bool = True,
    momentum: float | None = None,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """Batch normalisation, channel gate, residual sum and activation in one operator.

    ``y = act(gate * (weight * (x - mean) / sqrt(var + eps) + bias) + residual)``, computed in
    float32 (float64 for float64 input) and rounded once. Only ``x`` is kept for the backward pass,
    and with a residual one bit per value for relu and relu6. Differentiable once in ``x``,
    ``gate``, ``weight``, ``bias`` and ``residual``.

    The order (gate after batch normalisation, before the activation) is that of "Pruning from
    Scratch", arXiv 1909.12579.

    Args:
        x: Input, contiguous or channels_last; other strides are copied first. [N, C, *spatial], 2
            to 5 dimensions; float32, bfloat16 or float64, on CUDA also float16.
        gate: Channel gates. [C], float64 if x is float64, else float32. None is 1.
        weight: Scale of the normalisation. [C], dtype as gate. None is 1.
        bias: Shift of the normalisation. [C], dtype as gate. None is 0.
        residual: Added before the activation. Shape and dtype of x. None is 0.
        running_mean: Mean used if not training; updated in place if training with momentum. [C],
            dtype as gate.
        running_var: Variance, likewise. [C], dtype as gate.
        training: Normalise with the statistics of the batch instead of the running ones.
        momentum: Weight of the batch in the update of the running statistics, as in
            ``nn.BatchNorm2d``; None: no update.
        eps: Added to the variance.
        act: "identity", "relu", "relu6", "silu" or "hardswish".

    Returns:
        y. Shape and dtype of x, contiguous or channels_last as x.

    Raises:
        ValueError: A shape, device, eps or act does not fit; one value per channel when training;
            no running statistics when not training.
        TypeError: A dtype does not fit.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import bn_gate_act
        >>> x = torch.randn(8, 16, 4, 4, requires_grad=True)
        >>> gate = torch.ones(16, requires_grad=True)
        >>> y = bn_gate_act(x, gate, act="relu")
        >>> y.sum().backward()
        >>> y.shape, gate.grad.shape
        (torch.Size([8, 16, 4, 4]), torch.Size([16]))
    """
    require_ops()
    y, mean, var, _ = torch.ops.pfs_fast.bn_gate_act(
        x, gate, weight, bias, residual, running_mean, running_var, training, eps, act
    )
    if training and momentum is not None:
        count = x.numel() // max(x.shape[1], 1)
        if count > 0:
            update_running_stats(running_mean, running_var, mean, var, count, momentum)
    return y


def conv_bn_gate_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    padding: int | tuple[int, int] = 1,
    tile: int = 4,
    momentum: float | None = None,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """``bn_gate_act(winograd_conv(x, ...), ...)`` with the statistics of the batch, in one operator.

    The statistics are added up while the convolution's output is in the cache, and the gradient of
    that output is made block by block where the convolution's own gradient reads it: it never
    exists as a whole. Keeps the convolution's output, the weights, and with a residual one bit per
    value for relu and relu6. Differentiable once in ``x``, ``gate``, ``weight``, ``bias`` and
    ``residual``.

    Args:
        x: Input. [N, C_in, H, W], float32 or bfloat16, channels_last; other strides are copied
            first.
        conv_weight: Kernel. [C, C_in, 3, 3], dtype of x; without gradient.
        conv_bias: Shift of the convolution, or None. [C], dtype of x; without gradient.
        gate: Channel gates. [C], float32. None is 1.
        weight: Scale of the normalisation. [C], float32. None is 1.
        bias: Shift of the normalisation. [C], float32. None is 0.
        residual: Added before the activation. Shape of the result, dtype of x. None is 0.
        running_mean: Moved towards the mean of the batch, in place, with momentum. [C], float32.
        running_var: Likewise. [C], float32.
        padding: Zeros added on each side, 0 to 2, one number or one per spatial dimension.
        tile: As in ``winograd_conv``: 2 or 4.
        momentum: As in ``bn_gate_act``.
        eps: Added to the variance.
        act: "identity", "relu", "relu6", "silu" or "hardswish".

    Returns:
        y. [N, C, H + 2 * padding - 2, W + 2 * padding - 2], channels_last.

    Raises:
        ValueError: A shape or an option does not fit; one value per channel.
        TypeError: A tensor has another dtype.
        NotImplementedError: The tensors are not on the CPU.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import conv_bn_gate_act
        >>> gate = torch.ones(24, requires_grad=True)
        >>> y = conv_bn_gate_act(torch.randn(8, 16, 32, 32), torch.randn(24, 16, 3, 3), gate=gate)
        >>> y.shape
        torch.Size([8, 24, 32, 32])
    """
    require_ops()
    y, _, mean, var, _ = torch.ops.pfs_fast.conv_bn_gate_act(
        x,
        conv_weight.detach(),
        None if conv_bias is None else conv_bias.detach(),
        gate,
        weight,
        bias,
        residual,
        per_dimension(padding, 2),
        tile,
        eps,
        act,
    )
    _track(running_mean, running_var, mean, var, y, momentum)
    return y


def conv_bn_gate_act_branch(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    padding: int | tuple[int, int] = 1,
    tile: int = 4,
    momentum: float | None = None,
    eps: float = 1e-5,
    act: str = "relu",
) -> tuple[Tensor, Tensor]:
    """``conv_bn_gate_act(x, ...)``, and x for whatever else reads it, such as a residual sum.

    The gradient of those readers is added while that of x is made, instead of in a pass over both.
    Arguments and errors are those of ``conv_bn_gate_act``.

    Returns:
        (y, x). Gradients are the same whether other readers take this x or the one passed.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import conv_bn_gate_act_branch
        >>> x = torch.randn(8, 16, 32, 32, requires_grad=True)
        >>> y, same = conv_bn_gate_act_branch(x, torch.randn(16, 16, 3, 3))
        >>> (y + same).sum().backward()
    """
    require_ops()
    y, _, mean, var, _, branch = torch.ops.pfs_fast.conv_bn_gate_act_branch(
        x,
        conv_weight.detach(),
        None if conv_bias is None else conv_bias.detach(),
        gate,
        weight,
        bias,
        residual,
        per_dimension(padding, 2),
        tile,
        eps,
        act,
    )
    _track(running_mean, running_var, mean, var, y, momentum)
    return y, branch


def recomputed_bn_gate_act(
    x: Tensor,
    again: Callable[[Tensor], Tensor],
    source: Tensor,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    momentum: float | None = None,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """``bn_gate_act`` of a constant x that keeps what x was made of, and makes x again in the backward pass.

    For the first layers of a network, whose large outputs follow from the images by little work.
    Differentiable once in ``gate``, ``weight`` and ``bias``; x gets no gradient.

    Args:
        x: ``again(source)``, without gradient. As in ``bn_gate_act``.
        again: Makes x, the same at every call; called in the backward pass under the autocast of
            the forward pass. It must not change anything, running statistics for one.
        source: What x was made of.
        gate: As in ``bn_gate_act``.
        weight: Likewise.
        bias: Likewise.
        running_mean: Moved towards the mean of the batch, in place, with momentum.
        running_var: Likewise.
        momentum: As in ``bn_gate_act``.
        eps: Likewise.
        act: Likewise.

    Returns:
        y. Shape, dtype and layout as of ``bn_gate_act``.

    Raises:
        ValueError: A shape, device or option does not fit; x wants a gradient.
        TypeError: A dtype does not fit.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import recomputed_bn_gate_act
        >>> images, gate = torch.randn(8, 3, 4, 4), torch.ones(3, requires_grad=True)
        >>> recomputed_bn_gate_act(images.sin(), torch.sin, images, gate).sum().backward()
    """
    require_ops()
    require_constant(x)
    y, mean, var = RecomputedNormFunction.apply(x, again, source, gate, weight, bias, eps, act)
    _track(running_mean, running_var, mean, var, y, momentum)
    return y


def recomputed_conv_bn_gate_act(
    x: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None = None,
    gate: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    momentum: float | None = None,
    eps: float = 1e-5,
    act: str = "relu",
) -> Tensor:
    """``bn_gate_act(frozen_conv(x, ...), ...)`` that keeps x, and convolves again in the backward pass.

    For layers that make large tensors of small ones with little work: the first of a network, and
    the 1x1 convolutions of shortcuts, of whose input only the pixels that they read are kept.
    Values and gradients are those of the two operators. Differentiable once in ``x``, ``gate``,
    ``weight`` and ``bias``.

    Args:
        x: Input. [N, C_in, *spatial], 3 to 5 dimensions, a dtype of both operators.
        conv_weight: Kernel. [C, C_in / groups, *kernel], dtype of x; without gradient.
        conv_bias: Shift of the convolution, or None. [C], dtype of x; without gradient.
        gate: Channel gates. [C], float64 if x is float64, else float32. None is 1.
        weight: Scale of the normalisation. [C], dtype as gate. None is 1.
        bias: Shift of the normalisation. [C], dtype as gate. None is 0.
        running_mean: Moved towards the mean of the batch, in place, with momentum. [C], dtype as
            gate.
        running_var: Likewise. [C], dtype as gate.
        stride: As in ``frozen_conv``.
        padding: Likewise.
        dilation: Likewise.
        groups: Likewise.
        momentum: As in ``bn_gate_act``.
        eps: Added to the variance.
        act: "identity", "relu", "relu6", "silu" or "hardswish".

    Returns:
        y. [N, C, *spatial_out], dtype and layout as ``frozen_conv`` gives it.

    Raises:
        ValueError: A shape, device or option does not fit; one value per channel.
        TypeError: A dtype does not fit.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import recomputed_conv_bn_gate_act
        >>> gate = torch.ones(24, requires_grad=True)
        >>> images, kernel = torch.randn(8, 3, 32, 32), torch.randn(24, 3, 3, 3)
        >>> recomputed_conv_bn_gate_act(images, kernel, gate=gate, padding=1).shape
        torch.Size([8, 24, 32, 32])
    """
    require_ops()
    dims = x.dim() - 2
    y, mean, var = RecomputedConvNormFunction.apply(
        x,
        conv_weight.detach(),
        None if conv_bias is None else conv_bias.detach(),
        gate,
        weight,
        bias,
        (*(per_dimension(value, dims) for value in (stride, padding, dilation)), groups),
        eps,
        act,
    )
    _track(running_mean, running_var, mean, var, y, momentum)
    return y


def _track(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    y: Tensor,
    momentum: float | None,
) -> None:
    """Moves the running statistics of a fused norm, if they are to be moved."""
    count = y.numel() // max(y.shape[1], 1)
    if momentum is not None and count > 0:
        update_running_stats(running_mean, running_var, mean, var, count, momentum)
