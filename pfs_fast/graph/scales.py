"""Parameters with one number for each channel that a forward multiplies on by itself, as layer scale: ``x * self.gamma``.

They are narrowed like the parameters of a norm, under their own name (``stages.0.blocks.1.gamma``).
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import fx, nn

_MOVES = frozenset(("view", "reshape", "unsqueeze"))
_PRODUCTS = (operator.mul, operator.imul, torch.mul, torch.multiply)


@dataclass(frozen=True)
class Scale:
    """A parameter that is an attribute of some module.

    Attributes:
        owner: The module.
        attribute: Name of the parameter in it.
    """

    owner: nn.Module
    attribute: str

    @property
    def parameter(self) -> nn.Parameter:
        return self.owner._parameters[self.attribute]

    @property
    def width(self) -> int:
        return self.parameter.numel()

    @property
    def dim(self) -> int:
        """The dimension along which it holds a number for each channel."""
        return max(range(self.parameter.dim()), key=lambda d: self.parameter.size(d))


def find_scales(model: nn.Module, names: Iterable[str]) -> dict[str, Scale]:
    """Those of some names that are parameters with at most one dimension of more than 1. ``{name: scale}``."""
    modules = dict(model.named_modules(remove_duplicate=False))
    found = {}
    for name in names:
        path, _, attribute = name.rpartition(".")
        owner = modules.get(path)
        if name in modules or owner is None:
            continue
        if _is_per_channel(owner._parameters.get(attribute)):
            found[name] = Scale(owner, attribute)
    return found


def scales_of(graphs: tuple[fx.GraphModule, ...]) -> dict[str, int]:
    """Parameters of traced forwards that are multiplied onto something, and nothing else. ``{name: width}``."""
    root = graphs[0]
    nodes: dict[str, list[fx.Node]] = {}
    called: set[int] = set()
    for graph_module in graphs:
        for node in graph_module.graph.nodes:
            if node.op == "get_attr":
                nodes.setdefault(node.target, []).append(node)
            elif node.op == "call_module":
                called |= {id(p) for p in root.get_submodule(node.target).parameters()}
    holders = Counter(id(p) for m in root.modules() for p in m._parameters.values())
    return {
        name: scale.width
        for name, scale in find_scales(root, nodes).items()
        if scale.width > 1
        and id(scale.parameter) not in called
        and holders[id(scale.parameter)] == 1
        and all(map(_only_multiplies, nodes[name]))
    }


def _is_per_channel(tensor: object) -> bool:
    return isinstance(tensor, nn.Parameter) and sum(size > 1 for size in tensor.shape) <= 1


def _only_multiplies(node: fx.Node) -> bool:
    for user in node.users:
        written = user.args[:1] == (node,) and user.target in (operator.imul, "mul_")
        product = user.target in ((*_PRODUCTS,) if user.op == "call_function" else ("mul", "mul_"))
        if product and not written:
            continue
        moved = user.op == "call_method" and user.target in _MOVES
        if not moved or not _only_multiplies(user):
            return False
    return bool(node.users)
