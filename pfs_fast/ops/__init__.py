"""The fused operators, usable alone: ``bn_gate_act``, ``frozen_conv``, ``winograd_conv``,
``conv_bn_gate_act``, ``conv_bn_gate_act_branch``, ``recomputed_bn_gate_act``,
``recomputed_conv_bn_gate_act``, ``max_pool`` and ``gate_step_``.

Each has a twin of the same name and signature in :mod:`pfs_fast.ops.reference`, in plain PyTorch.
The functions here run the compiled kernels and nothing else: without them the first call raises
:class:`pfs_fast.errors.BackendError`. Importing this module never fails for want of a compiler.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pfs_fast._library import require_ops
from pfs_fast.ops import _registration as _registration
from pfs_fast.ops._recomputed import RecomputedConvNormFunction as _RecomputedConvNorm
from pfs_fast.ops._recomputed import RecomputedNormFunction as _RecomputedNorm
from pfs_fast.ops.reference import require_constant as _require_constant
from pfs_fast.ops.reference import update_running_stats as _update_running_stats

__all__ = [
    "bn_gate_act",
    "conv_bn_gate_act",
    "conv_bn_gate_act_branch",
    "frozen_conv",
    "gate_step_",
    "max_pool",
    "recomputed_bn_gate_act",
    "recomputed_conv_bn_gate_act",
    "winograd_conv",
]


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
            _update_running_stats(running_mean, running_var, mean, var, count, momentum)
    return y


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with constant weight and bias, which does not keep its input for backward.

    PyTorch's own convolution keeps its input for a weight gradient even if nobody takes one
    (https://github.com/pytorch/pytorch/issues/133566). This one keeps the weight alone; it is
    differentiable once, in ``x``. ``weight`` and ``bias`` get no gradient, whether they require one
    or not.

    Args:
        x: Input. [N, C_in, *spatial], 3 to 5 dimensions, floating point.
        weight: Kernel. [C_out, C_in / groups, *kernel], dtype of x.
        bias: Shift, or None. [C_out], dtype of x.
        stride: Stride, one number or one per spatial dimension.
        padding: Zeros added on each side, likewise.
        dilation: Distance between kernel elements, likewise.
        groups: Number of groups of channels.

    Returns:
        The convolution, [N, C_out, *spatial_out], as ``torch.nn.functional.conv2d`` (1d, 3d) gives
        it.

    Raises:
        ValueError: A shape or an option does not fit.
        TypeError: ``weight`` or ``bias`` is not of the dtype of ``x``.
        BackendError: The compiled operators are missing.
    """
    require_ops()
    spatial_dims = x.dim() - 2
    return torch.ops.pfs_fast.frozen_conv(
        x,
        weight.detach(),
        None if bias is None else bias.detach(),
        _per_dimension(stride, spatial_dims),
        _per_dimension(padding, spatial_dims),
        _per_dimension(dilation, spatial_dims),
        groups,
    )


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 1,
    *,
    tile: int = 4,
) -> Tensor:
    """``frozen_conv`` of a 3x3 kernel with stride 1 in float32 on the CPU, with fewer products.

    Winograd's minimal filtering F(tile x tile, 3x3) (Lavin and Gray, arXiv 1509.09308): 4 times
    fewer products than a direct convolution with tile 4, 2.25 times fewer with tile 2. The sums are
    the same but for rounding: a relative error of about 2e-7 to 8e-7 (tile 2) or 5e-7 to 3e-6 (tile
    4) for 16 to 600 channels, where a direct convolution has 1e-7 to 1e-6. NaN and infinity in a
    tile spread over the whole tile. Weights are transformed in every call, so that they may change
    between two calls and nothing but the weight is kept for the backward pass. The result does not
    depend on the number of threads. Differentiable once, in ``x``.

    Args:
        x: Input. [N, C_in, H, W], float32, channels_last; other strides are copied first.
        weight: Kernel. [C_out, C_in, 3, 3], float32.
        bias: Shift, or None. [C_out], float32.
        padding: Zeros added on each side, 0 to 2, one number or one per spatial dimension.
        tile: Outputs that are computed together, in each direction: 2 or 4.

    Returns:
        The convolution, [N, C_out, H + 2 * padding - 2, W + 2 * padding - 2], channels_last or
        contiguous as x.

    Raises:
        ValueError: A shape or an option does not fit.
        TypeError: A tensor is not float32.
        NotImplementedError: The tensors are not on the CPU.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import winograd_conv
        >>> winograd_conv(torch.randn(8, 16, 32, 32), torch.randn(24, 16, 3, 3)).shape
        torch.Size([8, 24, 32, 32])
    """
    require_ops()
    return torch.ops.pfs_fast.winograd_conv(
        x,
        weight.detach(),
        None if bias is None else bias.detach(),
        _per_dimension(padding, 2),
        tile,
    )


def max_pool(
    x: Tensor,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """Maximum over windows, which keeps one byte for each value of its output.

    ``torch.nn.functional.max_pool2d`` keeps its input and an int64 index for each output. This one
    gives the same values, bit for bit, and keeps where in its window each maximum was. Of equal
    maxima the first in the window counts, a NaN is the maximum, and where windows overlap gradients
    add up in float32 (float64 for float64), in one order whatever the number of threads.
    Differentiable once.

    Args:
        x: Input, contiguous or channels_last; other strides are copied first. [N, C, H, W];
            float32, bfloat16 or float64, on CUDA also float16.
        kernel: Height and width of a window, at most 255 values; one number is both.
        stride: Distance between windows, likewise. None is ``kernel``.
        padding: Rows and columns of -infinity added on each side, likewise; at most half of
            ``kernel``.

    Returns:
        The maxima, [N, C, H_out, W_out] with ``H_out = (H + 2 * padding - kernel) // stride + 1``,
        dtype of x, contiguous or channels_last as x.

    Raises:
        ValueError: A shape or an option does not fit.
        TypeError: The dtype is not supported.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import max_pool
        >>> max_pool(torch.randn(8, 16, 32, 32), 2).shape
        torch.Size([8, 16, 16, 16])
    """
    require_ops()
    options = (kernel, kernel if stride is None else stride, padding)
    y, _ = torch.ops.pfs_fast.max_pool(x, *(_per_dimension(value, 2) for value in options))
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
        x: Input. [N, C_in, H, W], float32, channels_last; other strides are copied first.
        conv_weight: Kernel. [C, C_in, 3, 3], float32; without gradient.
        conv_bias: Shift of the convolution, or None. [C], float32; without gradient.
        gate: Channel gates. [C], float32. None is 1.
        weight: Scale of the normalisation. [C], float32. None is 1.
        bias: Shift of the normalisation. [C], float32. None is 0.
        residual: Added before the activation. Shape of the result. None is 0.
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
        TypeError: A tensor is not float32.
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
        _per_dimension(padding, 2),
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
        _per_dimension(padding, 2),
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
    _require_constant(x)
    y, mean, var = _RecomputedNorm.apply(x, again, source, gate, weight, bias, eps, act)
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
    y, mean, var = _RecomputedConvNorm.apply(
        x,
        conv_weight.detach(),
        None if conv_bias is None else conv_bias.detach(),
        gate,
        weight,
        bias,
        (*(_per_dimension(value, dims) for value in (stride, padding, dilation)), groups),
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
        _update_running_stats(running_mean, running_var, mean, var, count, momentum)


def gate_step_(
    gates: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    died_at: Tensor,
    *,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    gamma: float,
    target: float,
    num_gates: int | None = None,
) -> None:
    """One optimiser step on all gates at once, in place.

    In this order: ``step += 1``; add the gradient of the regulariser ``gamma * (m - target)^2``
    with ``m = sum |gates| / num_gates``, which is ``2 * gamma * (m - target) / num_gates *
    sign(gates)``; one step of Adam as ``torch.optim.Adam`` does it, without decay; clamp to [0, 1];
    note in ``died_at`` the step at which a gate became 0. A NaN gradient makes a NaN gate, so that
    the caller sees it. On CUDA nothing waits for the device.

    Args:
        gates: Gates, changed in place. [G], float32 or float64, contiguous.
        grad: Gradient of the classification loss alone. [G], dtype of gates.
        exp_avg: Adam's first moment, changed in place. [G], dtype of gates, contiguous.
        exp_avg_sq: Adam's second moment, changed in place. [G], dtype of gates, contiguous.
        step: Steps taken so far, changed in place. [1], int64, on the device of gates.
        died_at: Step at which each gate became 0, -1 where it is above 0; changed in place. [G],
            int32, contiguous.
        lr: Learning rate.
        betas: Adam's decay rates, in [0, 1).
        eps: Adam's term in the denominator.
        gamma: Weight of the regulariser.
        target: Wanted mean of the gates (r in the paper).
        num_gates: Gates over which the regulariser takes its mean; default G. Larger where gates at
            0 were removed.

    Raises:
        ValueError: A shape, device or option does not fit.
        TypeError: A dtype does not fit.
        BackendError: The compiled operators are missing.
    """
    require_ops()
    if num_gates is None:
        num_gates = gates.numel()
    torch.ops.pfs_fast.gate_step_(
        gates, grad, exp_avg, exp_avg_sq, step, died_at, lr, *betas, eps, gamma, target, num_gates
    )


def _per_dimension(value: int | tuple[int, ...], spatial_dims: int) -> list[int]:
    return [value] * spatial_dims if isinstance(value, int) else list(value)
