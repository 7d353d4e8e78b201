"""Plain PyTorch twins of the operators in :mod:`pfs_fast.ops`: the definition of correct.

Same names, same arguments, differentiable by PyTorch's own autograd, any device and dtype that
PyTorch itself can do. Nothing here is fast. Callers choose ``pfs_fast.ops`` or
``pfs_fast.ops.reference``; neither falls back to the other.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._prims_common import suggest_memory_format

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda z: z,
    "relu": F.relu,
    "relu6": F.relu6,
    "silu": F.silu,
    "hardswish": F.hardswish,
}


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
    """``act(gate * batch_norm(x) + residual)``; see :func:`pfs_fast.ops.bn_gate_act`.

    Computes in float32 (float64 for float64 input) and rounds once, to the dtype of ``x``.
    """
    if act not in ACTIVATIONS:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f'bn_gate_act: act must be one of {names}, got "{act}"')
    acc = torch.float64 if x.dtype == torch.float64 else torch.float32
    values = x.to(acc)
    per_channel = [1, x.shape[1]] + [1] * (x.dim() - 2)
    reduced = [d for d in range(x.dim()) if d != 1]
    if not training:
        if running_mean is None or running_var is None:
            missing = "running_mean" if running_mean is None else "running_var"
            raise ValueError(
                f"bn_gate_act: {missing} must be given when training is False, got None; "
                "pass it or set training=True"
            )
        mean, var = running_mean.to(acc), running_var.to(acc)
        centred = values - mean.view(per_channel)
    else:
        count = x.numel() // max(x.shape[1], 1)
        if count == 1:
            raise ValueError(
                "bn_gate_act: x must have more than 1 value per channel when training, "
                f"got shape {list(x.shape)}; use a larger batch or training=False"
            )
        # The sums of an empty batch are 0, its means would be NaN.
        mean = values.sum(reduced) / max(count, 1)
        centred = values - mean.view(per_channel)
        var = centred.square().sum(reduced) / max(count, 1)
        if momentum is not None and count > 0:
            update_running_stats(running_mean, running_var, mean, var, count, momentum)
    z = centred * torch.rsqrt(var + eps).view(per_channel)
    if weight is not None:
        z = z * weight.view(per_channel)
    if bias is not None:
        z = z + bias.view(per_channel)
    if gate is not None:
        z = z * gate.view(per_channel)
    if residual is not None:
        z = z + residual.to(acc)
    return ACTIVATIONS[act](z).to(x.dtype)


def update_running_stats(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    var: Tensor,
    count: int,
    momentum: float,
) -> None:
    """Moves the running statistics as ``nn.BatchNorm`` does: towards the mean and the unbiased
    variance of the batch.

    Args:
        running_mean: Changed in place unless None. [C].
        running_var: Changed in place unless None. [C].
        mean: Mean of the batch. [C].
        var: Biased variance of the batch. [C].
        count: Values per channel, at least 2.
        momentum: Weight of the batch, in [0, 1].
    """
    with torch.no_grad():
        if running_mean is not None:
            running_mean.lerp_(mean.detach().to(running_mean.dtype), momentum)
        if running_var is not None:
            unbiased = var.detach() * (count / (count - 1))
            running_var.lerp_(unbiased.to(running_var.dtype), momentum)


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with constant weight and bias; see :func:`pfs_fast.ops.frozen_conv`."""
    conv = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}[x.dim()]
    weight = weight.detach()
    bias = None if bias is None else bias.detach()
    return conv(x, weight, bias, stride, padding, dilation, groups)


def frozen_conv_branch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    step: int | tuple[int, ...] = 2,
) -> tuple[Tensor, Tensor]:
    """The convolution, and pixels of its input; see :func:`pfs_fast.ops.frozen_conv_branch`."""
    steps = checked_step(step, x.dim() - 2)
    y = frozen_conv(x, weight, bias, stride, padding, dilation, groups)
    return y, x[(..., *(slice(None, None, s) for s in steps))].clone(
        memory_format=suggest_memory_format(x)
    )


def checked_step(step: int | tuple[int, ...], dims: int) -> list[int]:
    """The step of ``frozen_conv_branch`` in each dimension; ValueError where it is none."""
    steps = [step] * dims if isinstance(step, int) else list(step)
    if len(steps) != dims or any(s < 1 for s in steps):
        raise ValueError(
            f"frozen_conv_branch: step must be a number of at least 1 or one for each of the {dims} spatial dimensions, got {step}; "
            "pass the stride of the 1x1 convolution"
        )
    return steps


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 1,
    *,
    tile: int = 4,
) -> Tensor:
    """The convolution that :func:`pfs_fast.ops.winograd_conv` computes, directly; ``tile`` is not used."""
    return frozen_conv(x, weight, bias, 1, padding)


def max_pool(
    x: Tensor,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """Maximum over windows, by PyTorch; see :func:`pfs_fast.ops.max_pool`."""
    return F.max_pool2d(x, kernel, stride, padding)


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
    """The convolution and what follows it, one after the other; see :func:`pfs_fast.ops.conv_bn_gate_act`."""
    u = winograd_conv(x, conv_weight, conv_bias, padding, tile=tile)
    options = {"training": True, "momentum": momentum, "eps": eps, "act": act}
    return bn_gate_act(u, gate, weight, bias, residual, running_mean, running_var, **options)


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
    """The result of ``conv_bn_gate_act``, and x; see :func:`pfs_fast.ops.conv_bn_gate_act_branch`."""
    layers = (conv_weight, conv_bias, gate, weight, bias, residual, running_mean, running_var)
    options = {"padding": padding, "tile": tile, "momentum": momentum, "eps": eps, "act": act}
    return conv_bn_gate_act(x, *layers, **options), x


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
    """``bn_gate_act`` of x, which is kept; see :func:`pfs_fast.ops.recomputed_bn_gate_act`."""
    require_constant(x)
    options = {"training": True, "momentum": momentum, "eps": eps, "act": act}
    return bn_gate_act(x, gate, weight, bias, None, running_mean, running_var, **options)


def require_constant(x: Tensor) -> None:
    """ValueError where the x of ``recomputed_bn_gate_act`` wants a gradient, which it could not get."""
    if x.requires_grad:
        raise ValueError(
            "recomputed_bn_gate_act: x must be a constant, got one that wants a gradient; use bn_gate_act"
        )


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
    """The convolution and its norm; see :func:`pfs_fast.ops.recomputed_conv_bn_gate_act`."""
    u = frozen_conv(x, conv_weight, conv_bias, stride, padding, dilation, groups)
    options = {"training": True, "momentum": momentum, "eps": eps, "act": act}
    return bn_gate_act(u, gate, weight, bias, None, running_mean, running_var, **options)


@torch.no_grad()
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
    """One regularised Adam step on all gates; see :func:`pfs_fast.ops.gate_step_`."""
    num_gates = gates.numel() if num_gates is None else num_gates
    beta1, beta2 = betas
    step += 1
    if gates.numel() == 0:
        return
    count = step.to(torch.float64)
    share = gates.abs().sum() / num_gates
    grad = grad + (2 * gamma / num_gates) * (share - target) * gates.sign()
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    step_size = (lr / (1 - beta1**count)).to(gates.dtype)
    root_correction = (1 - beta2**count).sqrt().to(gates.dtype)
    denom = exp_avg_sq.sqrt() / root_correction + eps
    gates.sub_(step_size * exp_avg / denom).clamp_(0, 1)
    just_died = (gates == 0) & (died_at < 0)
    died_at.copy_(torch.where(just_died, step.to(died_at.dtype), died_at))
    died_at.masked_fill_(gates > 0, -1)
