"""Functional forms of layers: ``F.conv2d(x, self.conv.weight, ...)`` that means ``self.conv(x)`` becomes that call.

The same holds inside subclasses with a forward of their own, as batch norms with an activation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .._modules import has_hooks


def call_layers(graph: fx.Graph, root: nn.Module) -> set[nn.Module]:
    """Rewrite functions on a layer's own parameters as calls of the layer, where both compute the same.

    Whatever differs in any option stays a function, whose channels the propagation holds whole.

    Args:
        graph: Changed in place.
        root: The module that the graph was traced from.

    Returns:
        set[nn.Module]: Layers of a class whose own forward is not the one that is called.
    """
    modules = dict(root.named_modules())
    inside = set()
    for node in list(graph.nodes):
        alone = node.op == "call_function" and "inside" not in node.meta
        form = _FORMS.get(node.target) if alone else None
        arguments = None if form is None else _arguments(node, form.defaults)
        if arguments is None:
            continue
        owner = _owner(arguments, modules)
        module = modules.get(owner) if owner is not None else None
        x = arguments["input"]
        if not isinstance(module, form.layer) or not isinstance(x, fx.Node) or has_hooks(module):
            continue
        own = all(_is_own(arguments[name], owner, name, module) for name in form.tensors)
        if not own or not form.same(module, arguments):
            continue
        with graph.inserting_before(node):
            call = graph.call_module(owner, (x,))
        node.replace_all_uses_with(call)
        graph.erase_node(node)
        if type(module).forward is not form.forward or "forward" in vars(module):
            inside.add(module)
    for node in reversed(list(graph.nodes)):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    return inside


def is_same_padded(module: nn.Module) -> bool:
    """timm's convolution that pads with zeros as TensorFlow does: a convolution whose padding its input decides."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__name__}" == "timm.layers.conv2d_same.Conv2dSame"


def _same_convolution(module: nn.Module, options: dict[str, Any]) -> bool:
    def spread(value: Any) -> Any:
        return (
            tuple(value) if isinstance(value, (tuple, list)) else (value,) * len(module.kernel_size)
        )

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


def _same_batch_norm(module: nn.Module, options: dict[str, Any]) -> bool:
    batch_statistics = module.training or module.running_mean is None
    return options["training"] is batch_statistics and options["eps"] == module.eps


@dataclass(frozen=True)
class _Form:
    """A function that some layer's forward consists of.

    Attributes:
        layer: Class of the layer.
        forward: Its forward.
        defaults: Arguments of the function, with their defaults.
        tensors: Those that must be the layer's own.
        same: Whether the others are what the layer would pass.
    """

    layer: type[nn.Module]
    forward: Callable[..., Any]
    defaults: dict[str, Any]
    tensors: tuple[str, ...]
    same: Callable[[nn.Module, dict[str, Any]], bool]


def _convolution(layer: type[nn.Module]) -> _Form:
    defaults = dict.fromkeys(("input", "weight", "bias"))
    defaults |= {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    return _Form(layer, layer.forward, defaults, ("weight", "bias"), _same_convolution)


_FORMS: dict[Any, _Form] = {
    torch.conv1d: _convolution(nn.Conv1d),
    torch.conv2d: _convolution(nn.Conv2d),
    torch.conv3d: _convolution(nn.Conv3d),
    F.linear: _Form(
        nn.Linear,
        nn.Linear.forward,
        dict.fromkeys(("input", "weight", "bias")),
        ("weight", "bias"),
        lambda *_: True,
    ),
    F.batch_norm: _Form(
        _BatchNorm,
        _BatchNorm.forward,
        dict.fromkeys(("input", "running_mean", "running_var", "weight", "bias"))
        | {"training": False, "momentum": 0.1, "eps": 1e-5},
        ("running_mean", "running_var", "weight", "bias"),
        _same_batch_norm,
    ),
}


def _arguments(node: fx.Node, defaults: dict[str, Any]) -> dict[str, Any] | None:
    names = list(defaults)
    if len(node.args) > len(names) or set(node.kwargs) - set(names):
        return None
    return defaults | dict(zip(names, node.args, strict=False)) | node.kwargs


def _owner(arguments: dict[str, Any], modules: dict[str, nn.Module]) -> str | None:
    """Name of the module whose weight, or running mean where there is none, a node reads."""
    for name in ("weight", "running_mean"):
        tensor = arguments.get(name)
        if isinstance(tensor, fx.Node) and tensor.op == "get_attr":
            owner, _, attribute = tensor.target.rpartition(".")
            return owner if attribute == name and owner in modules else None
    return None


def _is_own(value: Any, owner: str, name: str, module: nn.Module) -> bool:
    if getattr(module, name) is None:
        return value is None
    return isinstance(value, fx.Node) and value.target == f"{owner}.{name}"
