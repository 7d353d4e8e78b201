"""A model's tensors as one thing: decay groups, a state to go back to, a moving average."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


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


@torch.no_grad()
def all_finite(model: nn.Module) -> bool:
    """Whether no trained parameter holds NaN or infinity (a buffer may, as masks do). Waits for the device."""
    trained = [p.detach() for p in model.parameters() if p.requires_grad and p.numel()]
    if not trained:
        return True
    largest = torch._foreach_norm(trained, float("inf"))  # the 2-norm could overflow
    return bool(torch.stack([norm.isfinite() for norm in largest]).all())


class Snapshot:
    """A copy of all parameters and buffers, on their device, that can be taken anew and put back."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._copies = [tensor.detach().clone() for tensor in self._live()]

    @torch.no_grad()
    def take(self) -> Snapshot:
        """Overwrites the copy with the present state."""
        _copy(self._copies, self._live())
        return self

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the copy back into the model."""
        _copy(self._live(), self._copies)

    def _live(self) -> list[Tensor]:
        return [*self._model.parameters(), *self._model.buffers()]


class Average:
    """Exponential moving average of all floating-point parameters and buffers.

    The decay of step t is ``min(decay, (1 + t) / (10 + t))``, so that the random start is forgotten quickly.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        tensors = (*model.parameters(), *model.buffers())
        self._live = [tensor.detach() for tensor in tensors if tensor.is_floating_point()]
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
