"""A model's tensors as one thing: decay groups, a state to go back to, a moving average."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from .onednn import in_layout


def parameter_groups(
    model: nn.Module, weight_decay: float, decay_bn_bias: bool
) -> list[dict[str, Any]]:
    """Optimiser groups of all parameters that need a gradient.

    Args:
        weight_decay: Decay of weights.
        decay_bn_bias: False: none on batch norm, biases and depthwise convolutions (paper, ImageNet).
    """
    spared: set[Tensor] = set()
    if not decay_bn_bias:
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                depthwise = isinstance(module, _ConvNd) and module.groups == module.in_channels > 1
                if isinstance(module, _BatchNorm) or name == "bias" or depthwise:
                    spared.add(parameter)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trained if p not in spared], "weight_decay": weight_decay},
        {"params": [p for p in trained if p in spared], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def finite_buffers(model: nn.Module) -> frozenset[str]:
    """Names of the floating-point buffers without NaN and infinity. Not all: masks hold infinity on purpose."""
    named = dict(model.named_buffers())
    return frozenset(named) - _not_finite(named)


def not_finite(model: nn.Module, buffers: Collection[str]) -> tuple[str, float] | None:
    """Name and value of one NaN or infinity in the trained parameters and those buffers. Waits for the device."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    named |= {name: buffer for name, buffer in model.named_buffers() if name in buffers}
    found = _not_finite(named)
    name = next((name for name in named if name in found), None)
    return None if name is None else (name, named[name][~named[name].isfinite()][0].item())


@torch.no_grad()
def _not_finite(named: Mapping[str, Tensor]) -> set[str]:
    some = {name: t.detach() for name, t in named.items() if t.is_floating_point() and t.numel()}
    if not some:
        return set()
    largest = torch._foreach_norm(list(some.values()), float("inf"))  # the 2-norm could overflow
    finite = torch.stack([norm.isfinite() for norm in largest]).tolist()
    return {name for name, good in zip(some, finite, strict=True) if not good}


class Placement:
    """Device and strides that a model's tensors have, to go back to; their values are `Snapshot`'s."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places = [(tensor.device, _strides(tensor)) for tensor in _tensors(model)]

    @torch.no_grad()
    def restore(self) -> None:
        """Puts every tensor back to its device and strides, with the values that it has now."""
        for tensor, (device, strides) in zip(_tensors(self._model), self._places, strict=True):
            if tensor.device != device:
                tensor.data = tensor.data.to(device)
            if strides is not None and tensor.stride() != strides:
                tensor.data = tensor.new_empty_strided(tensor.shape, strides).copy_(tensor)


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _strides(tensor: Tensor) -> tuple[int, ...] | None:
    return tensor.stride() if tensor.layout == torch.strided else None


def lay_out(model: nn.Module, layout: torch.memory_format) -> None:
    """Moves all 4-d parameters to a layout; a module of 3-d convolutions cannot be moved as a whole."""
    for parameter in model.parameters():
        if parameter.dim() == 4:
            parameter.data = in_layout(parameter.data, layout)


class Snapshot:
    """A copy of all parameters and buffers, on their device, that can be taken anew and put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies = [tensor.detach().clone() for tensor in _tensors(model)]

    @torch.no_grad()
    def take(self) -> Snapshot:
        """Overwrites the copy with the present state."""
        _copy(self._copies, _tensors(self._model))
        return self

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copy back into the model."""
        _copy(_tensors(self._model), self._copies)


class Average:
    """Exponential moving average of all floating-point parameters and buffers.

    The decay of step t is ``min(decay, (1 + t) / (10 + t))``, so that the random start is forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._live = [tensor.detach() for tensor in _tensors(model) if tensor.is_floating_point()]
        self._average = [tensor.clone() for tensor in self._live]
        self._decay = decay
        self._step = 0

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the present state."""
        self._step += 1
        decay = min(self._decay, (1 + self._step) / (10 + self._step))
        torch._foreach_lerp_(self._average, self._live, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the average and the model's present state."""
        held = [tensor.clone() for tensor in self._live]
        _copy(self._live, self._average)
        _copy(self._average, held)


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    if targets:
        torch._foreach_copy_(targets, sources)
