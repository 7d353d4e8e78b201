"""Questions about modules that several parts ask: whether an entry point takes a model, whether hooks run with one."""

from __future__ import annotations

import torch
from torch import nn

from .errors import ModelError

_PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def require_plain(function: str, model: nn.Module) -> None:
    """Refuse what is not an uncompiled, unwrapped ``nn.Module`` with initialised parameters.

    Raises:
        ModelError: Names the wrapper and what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"{function}: model must be an nn.Module, got {type(model).__name__}; pass an instance, not a class or factory"
        )
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
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise ModelError(
                f"{function}: model must be initialised, got the lazy parameter {name}; call the model once first"
            )


def has_hooks(module: nn.Module) -> bool:
    """Whether functions of the user run before or after its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)
