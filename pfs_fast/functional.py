"""Functional forms of layers: ``F.conv2d(x, self.conv.weight, ...)`` that means ``self.conv(x)`` becomes that call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn


def call_layers(graph: fx.Graph, root: nn.Module) -> None:
    """Rewrite functions on a layer's own parameters as calls of the layer, where both compute the same.

    Whatever differs in any option stays a function, whose channels the propagation holds whole.

    Args:
        graph: Changed in place.
        root: The module that the graph was traced from.
    """
    modules = dict(root.named_modules())
    for node in list(graph.nodes):
        form = _FORMS.get(node.target) if node.op == "call_function" else None
        arguments = None if form is None else _arguments(node, form[1])
        if arguments is None:
            continue
        owner = _owner(arguments["weight"], "weight", modules)
        module = modules.get(owner) if owner is not None else None
        if type(module) is not form[0] or module._forward_hooks or module._forward_pre_hooks:
            continue
        if not _is_own(arguments.pop("bias"), owner, "bias", module):
            continue
        del arguments["weight"]
        x = arguments.pop("input")
        if not isinstance(x, fx.Node) or not form[2](module, arguments):
            continue
        with graph.inserting_before(node):
            call = graph.call_module(owner, (x,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _same_convolution(module: nn.Module, options: dict[str, Any]) -> bool:
    dims = len(module.kernel_size)

    def spread(value: Any) -> Any:
        return tuple(value) if isinstance(value, (tuple, list)) else (value,) * dims

    return (
        module.padding_mode == "zeros"
        and not isinstance(module.padding, str)
        and options["groups"] == module.groups
        # The number of groups stands in the code, but that of a depthwise layer changes with its width.
        and (module.groups == 1 or module.groups != module.in_channels)
        and all(
            spread(options[name]) == getattr(module, name)
            for name in ("stride", "padding", "dilation")
        )
    )


_CONV_OPTIONS = {
    "input": None,
    "weight": None,
    "bias": None,
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
}
_Form = tuple[type[nn.Module], dict[str, Any], Callable[[nn.Module, dict[str, Any]], bool]]
_FORMS: dict[Any, _Form] = {
    torch.conv1d: (nn.Conv1d, _CONV_OPTIONS, _same_convolution),
    torch.conv2d: (nn.Conv2d, _CONV_OPTIONS, _same_convolution),
    torch.conv3d: (nn.Conv3d, _CONV_OPTIONS, _same_convolution),
    F.linear: (nn.Linear, {"input": None, "weight": None, "bias": None}, lambda *_: True),
}


def _arguments(node: fx.Node, defaults: dict[str, Any]) -> dict[str, Any] | None:
    names = list(defaults)
    if len(node.args) > len(names) or set(node.kwargs) - set(names):
        return None
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def _owner(value: Any, parameter: str, modules: dict[str, nn.Module]) -> str | None:
    """Name of the module whose parameter a node reads."""
    if not isinstance(value, fx.Node) or value.op != "get_attr":
        return None
    owner, _, name = value.target.rpartition(".")
    return owner if name == parameter and owner in modules else None


def _is_own(value: Any, owner: str, parameter: str, module: nn.Module) -> bool:
    if module._parameters.get(parameter) is None:
        return value is None
    return isinstance(value, fx.Node) and value.target == f"{owner}.{parameter}"
