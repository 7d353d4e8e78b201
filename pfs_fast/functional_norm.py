"""Batch norms with a forward of their own: ``F.batch_norm`` on a module's own tensors becomes a call of a plain norm.

Batch norm and activation in one module (timm's ``BatchNormAct2d``) is such a forward. Traced, it is the function on the
module's buffers and parameters, followed by what the module does besides.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

_DEFAULTS = {
    "input": None,
    "running_mean": None,
    "running_var": None,
    "weight": None,
    "bias": None,
    "training": False,
    "momentum": 0.1,
    "eps": 1e-5,
}
_TENSORS = ("running_mean", "running_var", "weight", "bias")


def call_norms(graph: fx.Graph, root: nn.Module) -> set[str]:
    """Rewrite ``F.batch_norm`` on all tensors of one batch norm as a call of that module.

    The call stands for the plain norm alone: ``as_plain_norms`` must follow once all graphs are traced.

    Args:
        graph: Changed in place.
        root: What the graph was traced from, still in the mode it was traced in.

    Returns:
        Names of the norms that are called so.
    """
    modules = dict(root.named_modules())
    found = set()
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not F.batch_norm:
            continue
        name = _owner(node, modules)
        if name is None:
            continue
        with graph.inserting_before(node):
            call = graph.call_module(name, (_arguments(node)["input"],))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        found.add(name)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return found


def as_plain_norms(root: nn.Module, names: Iterable[str]) -> None:
    """Take the forward of their own from these norms: the graphs run the rest of it as nodes of their own."""
    for name in names:
        module = root.get_submodule(name)
        module.__class__ = _torch_class(module)


def _torch_class(module: nn.Module) -> type[nn.Module]:
    return next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))


def _arguments(node: fx.Node) -> dict[str, Any]:
    return _DEFAULTS | dict(zip(_DEFAULTS, node.args, strict=False)) | node.kwargs


def _owner(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """The batch norm whose plain forward the function computes, or None."""
    arguments = _arguments(node)
    targets = {
        key: value.target
        for key in _TENSORS
        if isinstance(value := arguments[key], fx.Node) and value.op == "get_attr"
    }
    owners = {target.rpartition(".")[0] for target in targets.values()}
    if len(owners) != 1:
        return None
    (name,) = owners
    module = modules.get(name)
    if not isinstance(module, _BatchNorm) or module._forward_hooks or module._forward_pre_hooks:
        return None
    if _torch_class(module).__name__ not in ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d"):
        return None
    for key in _TENSORS:
        if arguments[key] is not None and targets.get(key) != f"{name}.{key}":
            return None
        # Without statistics of its own a norm in train mode is given none, whatever buffers it has.
        unused = key.startswith("running") and module.training and not module.track_running_stats
        if arguments[key] is None and getattr(module, key) is not None and not unused:
            return None
    same = (
        arguments["training"] is (module.training or module.running_mean is None)
        and arguments["eps"] == module.eps
        and (arguments["momentum"] == module.momentum or not module.training)
    )
    return name if same else None
