"""Questions about modules that several parts ask: whether an entry point takes a model, whether hooks run with one."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from .errors import ModelError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def require_module(function: str, model: nn.Module) -> None:
    """Refuse what is no ``nn.Module`` with initialised parameters, each whole on one process.

    Raises:
        ModelError: Names the parameter and what to do.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{function}: model must be an nn.Module, got {type(model).__name__}; pass an instance, not a class or factory"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(
                f"{function}: model must be initialised, got the lazy parameter {name}; call the model once first"
            )
        if hasattr(parameter, "placements"):  # a DTensor, whose class is slow to import
            raise ModelError(
                f"{function}: model must have whole parameters, got '{name}' in shards ({type(parameter).__name__}); pass the "
                "module before fully_shard, or a copy with the full state"
            )


def copied(function: str, model: nn.Module, memo: dict[int, Any] | None = None) -> nn.Module:
    """A deep copy of a model.

    Args:
        memo: As of ``copy.deepcopy``: what stands in the place of what.

    Raises:
        ModelError: It has something that cannot be copied.
    """
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # whatever the model's attributes raise
        raise ModelError(
            f"{function}: model must be one that copy.deepcopy copies, got {type(error).__name__}: {error}; use "
            "torch.nn.utils.parametrizations instead of weight_norm or spectral_norm, and keep no activations, locks or "
            "open files on the model"
        ) from error


def require_plain(function: str, model: nn.Module) -> None:
    """Refuse what is not an uncompiled, unwrapped ``nn.Module`` with initialised parameters.

    Raises:
        ModelError: Names the wrapper and what to pass instead.
    """
    require_module(function, model)
    if isinstance(model, _PARALLEL):
        raise ModelError(
            f"{function}: model must be a plain module, got {type(model).__name__}; pass model.module"
        )
    if hasattr(model, "_orig_mod"):
        raise ModelError(
            f"{function}: model must be uncompiled, got {type(model).__name__}; pass the module that was given to "
            "torch.compile (model._orig_mod) and compile the result"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise ModelError(
            f"{function}: model must be a Python module, got {type(model).__name__}; pass the module before "
            "torch.jit.script or torch.jit.trace"
        )


def has_hooks(module: nn.Module) -> bool:
    """Whether functions of the user run before or after its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
