"""The layers that a gated network puts in the place of a model's: fused norms, frozen convolutions, gated outputs, pools."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ..graph import rules
from . import winograd
from .gates import GateBank

MIN_SAVED = 1 / 256  # values of memory for each product that a convolution computes again
MAX_TAPS = 255  # of a window of ``max_pool``, whose offsets are bytes
_FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float64})
_POOL_DTYPES = {"cpu": _FLOATS, "cuda": _FLOATS | {torch.float16}}


class FusedNorm(nn.Module):
    """Batch norm, gate, residual sum and activation: ``act(gate * bn(x) + residual)``."""

    def __init__(
        self, bn: _BatchNorm, name: str, act: str, bank: GateBank, ops: ModuleType, track: bool
    ) -> None:
        super().__init__()
        self.bn, self.act, self.track = bn, act, track
        self._name, self._bank, self._ops = name, bank if name in bank.layers else None, ops

    @property
    def gated(self) -> bool:
        return self._bank is not None

    @property
    def gate(self) -> Tensor | None:
        """Its gates, [C]; None without."""
        return self._bank.vector(self._name) if self._bank else None

    @property
    def uses_batch(self) -> bool:
        """Whether the statistics are those of the batch."""
        return self.training or self.bn.running_mean is None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        options = self.options()
        residual = None if residual is None else residual.to(x.dtype)
        return self._ops.bn_gate_act(x, residual=residual, training=self.uses_batch, **options)

    def options(self) -> dict[str, Any]:
        """What every operator with a norm in it takes, by name; an update of the running statistics is counted."""
        return self.options_without_update() | {"momentum": self.momentum()}

    def options_without_update(self) -> dict[str, Any]:
        """The same, for a pass that leaves the running statistics as they are."""
        bn = self.bn
        return {
            "gate": self.gate,
            "weight": bn.weight,
            "bias": bn.bias,
            "running_mean": bn.running_mean,
            "running_var": bn.running_var,
            "eps": bn.eps,
            "act": self.act,
        }

    def momentum(self) -> float | None:
        """Of the next update of the running statistics, which is counted; None: they are not tracked."""
        if not (self.training and self.track) or self.bn.running_mean is None:
            return None
        self.bn.num_batches_tracked += 1
        # momentum None is nn.BatchNorm's cumulative average.
        return (
            self.bn.momentum
            if self.bn.momentum is not None
            else 1.0 / float(self.bn.num_batches_tracked)
        )


class FrozenConv(nn.Module):
    """A convolution that keeps nothing but its weight for the backward pass.

    Args:
        conv: The layer.
        ops: ``pfs_fast.ops`` or ``pfs_fast.ops.reference``.
        fast: Use ``winograd_conv`` for the inputs that `winograd.tile_of` names.
        dense: The pixels that a 1x1 kernel reads have been picked: its stride is 1.
    """

    def __init__(
        self, conv: _ConvNd, ops: ModuleType, fast: bool = False, *, dense: bool = False
    ) -> None:
        super().__init__()
        self.conv, self._ops, self.fast = conv, ops, fast and winograd.can_use(conv)
        self.stride = (1,) * len(conv.stride) if dense else conv.stride

    def tile(self, input: Tensor) -> int:
        """Tile of ``winograd_conv`` for an input; `winograd.DIRECT` where another convolution serves it."""
        return winograd.tile_of(self.conv, input) if self.fast else winograd.DIRECT

    def taken(self, input: Tensor) -> Tensor:
        """An input in the dtype of the weight: a cast in the model's forward means the dtype that the model had."""
        return input.to(self.conv.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:  # the name that torch gives it, for layer(input=x)
        c, input = self.conv, self.taken(input)
        tile = self.tile(input)
        if tile != winograd.DIRECT:
            return self._ops.winograd_conv(input, c.weight, c.bias, c.padding, tile=tile)
        return self._ops.frozen_conv(
            input, c.weight, c.bias, self.stride, c.padding, c.dilation, c.groups
        )


class BranchedConv(nn.Module):
    """Returns the pixels of its input too that a 1x1 convolution with a stride reads beside it.

    Args:
        layer: The convolution.
        step: Stride of the other one.
        ops: ``pfs_fast.ops`` or ``pfs_fast.ops.reference``.
    """

    def __init__(self, layer: FrozenConv, step: tuple[int, ...], ops: ModuleType) -> None:
        super().__init__()
        self.layer, self._step, self._ops = layer, step, ops

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        c = self.layer.conv
        return self._ops.frozen_conv_branch(
            self.layer.taken(input),
            c.weight,
            c.bias,
            self.layer.stride,
            c.padding,
            c.dilation,
            c.groups,
            step=self._step,
        )


class FusedConvNorm(nn.Module):
    """A convolution and the norm that alone reads it: one operator where both of its halves would be fast ones.

    Args:
        conv: Its convolution.
        norm: What follows.
        ops: ``pfs_fast.ops`` or ``pfs_fast.ops.reference``.
    """

    def __init__(self, conv: FrozenConv, norm: FusedNorm, ops: ModuleType) -> None:
        super().__init__()
        self.layer, self.norm, self._ops = conv, norm, ops

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        input = self.layer.taken(input)
        tile = self.layer.tile(input)
        if not self.serves(tile):
            return self.norm(self.layer(input), residual)
        return self.run(self._ops.conv_bn_gate_act, input, residual, tile)

    def serves(self, tile: int) -> bool:
        """Whether the operator takes inputs of this tile in this mode; elsewhere its two halves run."""
        return tile != winograd.DIRECT and self.norm.uses_batch

    def run(
        self, operator: Callable[..., Any], input: Tensor, residual: Tensor | None, tile: int
    ) -> Any:
        conv = self.layer.conv
        return operator(
            input,
            conv.weight,
            conv.bias,
            residual=None if residual is None else residual.to(input.dtype),
            padding=conv.padding,
            tile=tile,
            **self.norm.options(),
        )


class BranchedConvNorm(FusedConvNorm):
    """Returns its input too, for those that read it later: their gradients are added where its own is made."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        input = self.layer.taken(input)
        tile = self.layer.tile(input)
        if not self.serves(tile):
            return self.norm(self.layer(input), residual), input
        return self.run(self._ops.conv_bn_gate_act_branch, input, residual, tile)


class RecomputedConvNorm(FusedConvNorm):
    """Keeps its input for the backward pass and convolves again there, where that saves memory at a small price."""

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        conv, norm = self.layer.conv, self.norm
        input = self.layer.taken(input)
        serves = self.serves(self.layer.tile(input))
        if serves or residual is not None or not norm.uses_batch or not self.pays():
            return super().forward(input, residual)
        return self._ops.recomputed_conv_bn_gate_act(
            input,
            conv.weight,
            conv.bias,
            stride=self.layer.stride,
            padding=conv.padding,
            dilation=conv.dilation,
            groups=conv.groups,
            **norm.options(),
        )

    def pays(self) -> bool:
        """Whether an output is larger than what it is made of, by enough values for each of its products."""
        conv = self.layer.conv
        taps = math.prod(conv.kernel_size)
        kept = conv.in_channels * (math.prod(conv.stride) if taps > 1 else 1)
        products = conv.out_channels * conv.in_channels // conv.groups * taps
        return conv.out_channels - kept >= MIN_SAVED * products


class ChainedConvNorm(FusedConvNorm):
    """The first gated layer behind one without gates: it keeps the images, and both are made again in the backward pass.

    Args:
        first: The layer that reads the images.
        conv: The convolution that reads its output.
        norm: What follows.
        ops: ``pfs_fast.ops`` or ``pfs_fast.ops.reference``.
    """

    def __init__(
        self, first: RecomputedConvNorm, conv: FrozenConv, norm: FusedNorm, ops: ModuleType
    ) -> None:
        super().__init__(conv, norm, ops)
        self.first = first

    def forward(self, input: Tensor, images: Tensor) -> Tensor:
        norm = self.norm
        if input.requires_grad or not (norm.uses_batch and self.first.norm.uses_batch):
            return super().forward(input)
        return self._ops.recomputed_bn_gate_act(
            self.layer(input), self._again, images, **norm.options()
        )

    def _again(self, images: Tensor) -> Tensor:
        norm = self.first.norm
        options = norm.options_without_update()
        made = self._ops.bn_gate_act(self.first.layer(images), training=True, **options)
        return self.layer(made)


class GatedOutput(nn.Module):
    """A layer without batch norm, its output channels multiplied by gates."""

    def __init__(self, layer: nn.Module, name: str, bank: GateBank, channel_dim: int) -> None:
        super().__init__()
        self.layer, self._name, self._bank, self._channel_dim = layer, name, bank, channel_dim

    def forward(self, input: Tensor) -> Tensor:  # the name that torch gives it, for layer(input=x)
        y = self.layer(input)
        shape = [1] * y.dim()
        shape[self._channel_dim] = -1
        return y * self._bank.vector(self._name).to(y.dtype).view(shape)


class MaxPool(nn.Module):
    """A max pool that keeps a byte for each of its outputs, in place of its input and int64 indices.

    Args:
        pool: A layer that `can_pool` accepts.
        ops: ``pfs_fast.ops`` or ``pfs_fast.ops.reference``.
    """

    def __init__(self, pool: nn.MaxPool2d, ops: ModuleType) -> None:
        super().__init__()
        self.pool, self._ops = pool, ops

    def forward(self, input: Tensor) -> Tensor:  # the name that torch gives it, for layer(input=x)
        pool = self.pool
        if input.dim() != 4 or input.dtype not in _POOL_DTYPES.get(input.device.type, ()):
            return pool(input)  # without a batch dimension, or of numbers that the operator has not
        return self._ops.max_pool(input, pool.kernel_size, pool.stride, pool.padding)


class GlobalPool(nn.Module):
    """``nn.AdaptiveAvgPool2d(1)`` whose gradient stays one value a channel until it is used.

    PyTorch's writes it to every pixel first, in NCHW, and the layer before lays it out again: two tensors at the turn from forward to
    backward, where most memory is in use.
    """

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, input: Tensor) -> Tensor:  # the name that torch gives it, for layer(input=x)
        if input.dim() != 4 or input.dtype not in (torch.float32, torch.float64):
            return self.pool(input)  # in fewer bits the quotient would be rounded twice
        return input.sum((2, 3), keepdim=True) / (input.shape[2] * input.shape[3])


def is_global_pool(module: nn.Module) -> bool:
    """A plain ``nn.AdaptiveAvgPool2d`` to one value a channel."""
    return type(module) is nn.AdaptiveAvgPool2d and module.output_size in (1, (1, 1), [1, 1])


def can_pool(module: nn.Module) -> bool:
    """Whether a module has the form that ``ops.max_pool`` computes: a plain ``nn.MaxPool2d``, not dilated, sizes rounded down, no
    indices asked for, at most 255 values a window."""
    if type(module) is not nn.MaxPool2d:
        return False
    options = (module.kernel_size, module.stride, module.padding, module.dilation)
    if not all(_is_size(value) for value in options):
        return False
    height, width = _pair(module.kernel_size)
    return (
        height * width <= MAX_TAPS
        and _pair(module.dilation) == (1, 1)
        and not module.ceil_mode
        and not module.return_indices
    )


def pool_of_call(node: fx.Node) -> nn.MaxPool2d | None:
    """The module that a call of ``F.max_pool2d`` or ``torch.max_pool2d`` amounts to; None for other nodes, and where an option is
    computed in the graph."""
    if node.op != "call_function" or rules.plain_name(node, None) != "max_pool2d":
        return None
    names = (*_POOL_OPTIONS, "return_indices")
    if len(node.args) > 1 + len(names):
        return None
    options = dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
    images = [node.args[0]] if node.args else [options.pop("input", None)]
    if "input" in options or not isinstance(images[0], fx.Node) or len(node.all_input_nodes) != 1:
        return None
    if options.get("stride") in ((), []):  # torch.max_pool2d's default
        options["stride"] = None
    try:
        return nn.MaxPool2d(**options)
    except TypeError:  # options that torch refuses: let the call tell
        return None


_POOL_OPTIONS = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")


def _is_size(value: Any) -> bool:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return len(values) in (1, 2) and all(type(v) is int for v in values)


def _pair(value: Any) -> tuple[int, int]:
    values = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    return values * 2 if len(values) == 1 else values
