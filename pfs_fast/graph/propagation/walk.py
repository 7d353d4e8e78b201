"""Runs the graphs of a traced model on labels instead of numbers."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import is_dataclass
from typing import Any

import torch
from torch import fx, nn

from .. import rules
from ..scales import scales_of
from ..trace import TracedModel
from ..user_functions import either, is_shown, settle
from .call import Call
from .constraints import Constraints
from .movement import movement
from .pieces import pieces
from .sizes import Sizes
from .table import OPERATIONS, layer_rule
from .values import Value, flatten, holds_tensors, unlabelled


class Propagation:
    """Follows every channel through both graphs of a traced model.

    Attributes:
        constraints: What was found.
        outputs: ``{(graph index, node name): value}``, for every node whose result is one tensor.
        counts: Whether the graph that is walked is the one whose MACs count.
        sizes: Arithmetic on sizes in the graph that is walked.
    """

    def __init__(self, traced: TracedModel) -> None:
        self.constraints = Constraints()
        self.outputs: dict[tuple[int, str], Value] = {}
        self._modules = dict(traced.train.named_modules())
        self._opaque = traced.opaque
        self._shared = _read_elsewhere(traced)
        self._scales = scales_of(traced.graphs)
        self._index = 0
        self.sizes = Sizes(lambda node: self.outputs.get((self._index, node.name)))
        for index, graph_module in enumerate(traced.graphs):
            self._index = index
            self.counts = graph_module is traced.eval
            self._run(graph_module.graph)
        for index, graph_module in enumerate(traced.graphs):
            for gone, call in settle(graph_module).items():
                if (index, gone.name) in self.outputs:
                    self.outputs[index, call.name] = self.outputs[index, gone.name]

    def _run(self, graph: fx.Graph) -> None:
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            result = env[node] = self._node(node, args, kwargs)
            if isinstance(result, Value):
                self.outputs[self._index, node.name] = result
            if node.meta["writes"]:
                self._overwrite(node, env)
            if "assumed" in node.meta:
                for value in self.sizes.deciding(node):
                    reason = f"the forward decides by their number ('{node.name}')"
                    self.constraints.fix(value.labels, reason)

    def _overwrite(self, node: fx.Node, env: dict[fx.Node, Any]) -> None:
        """Later readers of an operand that was written in place see the new values."""
        result = env[node]
        for stale in node.meta["stale"]:
            old, new = stale.meta["val"], node.meta["val"]
            if isinstance(result, Value) and _same_memory(old, new):
                env[stale] = result
                continue
            # A view of what was written, or an operation that writes one thing and gives another.
            reason = f"'{node.name}' writes in place what '{stale.name}' shows, which is read later"
            for value in flatten((result, env[stale])):
                if isinstance(value, Value) and value.dim is not None:
                    self.constraints.fix(value.labels, reason)

    def _node(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        if node.op == "get_attr" and node.target in self._scales:
            return self._scale(node)
        if node.op in ("placeholder", "get_attr"):
            return unlabelled(node.meta["val"])
        module = self._module(node)
        name = rules.plain_name(node, module) if node.op != "output" else "output"
        values = [v for v in flatten((args, kwargs)) if isinstance(v, Value)]
        call = Call(self, node, name, module, args, kwargs, values)
        if node.op == "output":
            call.fix_all(args, "it is an output of the network")
            self._fix_counted(call)
            return None
        if module is not None and node.target in self._opaque:
            return call.refuse(self._opaque[node.target])
        if node.meta["hooked"]:
            return call.refuse(f"a forward hook of '{node.target}' changes what it takes or gives")
        rule = layer_rule(module)
        if rule is not None:
            return rule(call)
        if is_shown(node):
            return unlabelled(call.meta)  # beside it the graph has what its forward does
        if node.target is either:
            return args[0]
        if holds_tensors(call.meta):
            self._fix_counted(call)
        if not values:  # arithmetic on sizes and other plain values
            return unlabelled(call.meta)
        return self._operation(call)

    def _scale(self, node: fx.Node) -> Value:
        shape, size = tuple(node.meta["val"].shape), self._scales[node.target]
        labels = self.constraints.scale_labels(node.target, size)
        return Value(shape, shape.index(size), labels, zero=False)

    def _fix_counted(self, call: Call) -> None:
        """Hold channels fixed whose number goes into a result otherwise than as its shape (``x / x.size(1)``)."""
        moves = OPERATIONS.get(call.name) in (movement, pieces)
        exempt = (
            call.values[0] if moves and call.values and call.values[0].dim is not None else None
        )
        for value in self.sizes.influences((call.node.args, call.node.kwargs), exempt):
            self.constraints.fix(value.labels, f"'{call.node.name}' computes with their number")

    def _operation(self, call: Call) -> Any:
        target, meta = call.node.target, call.meta
        if call.name == "getitem" and not isinstance(call.args[0], Value):
            return call.args[0][call.args[1]]  # one of several results
        if isinstance(target, type) and (issubclass(target, tuple) or is_dataclass(target)):
            return call.values  # several results by name
        if not isinstance(meta, torch.Tensor) and not holds_tensors(meta):
            return unlabelled(meta)  # x.shape, x.size(0), x.dim()
        if all(v.dim is None for v in call.values):
            return unlabelled(meta)
        return OPERATIONS.get(call.name, Call.not_understood)(call)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    # -- asked by the rules ----------------------------------------------------------------------------------------

    def unprunable(self, name: str) -> str | None:
        """Why the weight of a layer cannot be narrowed, or None."""
        module = self._modules[name]
        if name in self._shared:
            return f"a parameter of layer '{name}' is read by {self._shared[name]} as well"
        if hasattr(module, "parametrizations") or (
            "weight" not in module._parameters and "weight" not in module._buffers
        ):
            return f"the weight of layer '{name}' is computed (a parametrisation or weight norm)"
        return None


def _same_memory(a: Any, b: Any) -> bool:
    return (
        isinstance(a, torch.Tensor)
        and isinstance(b, torch.Tensor)
        and a.shape == b.shape
        and a.stride() == b.stride()
        and a.storage_offset() == b.storage_offset()
        and a.untyped_storage()._cdata == b.untyped_storage()._cdata
    )


def _read_elsewhere(traced: TracedModel) -> dict[str, str]:
    """Modules with a parameter or buffer that something else reads too: name -> what."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in traced.train.named_modules():
        for tensor in {id(t): t for t in (*module._parameters.values(), *module._buffers.values())}:
            holders[tensor].append(name)
    holders.pop(id(None), None)
    found = {
        name: f"'{next(other for other in names if other != name)}'"
        for names in holders.values()
        if len(names) > 1
        for name in names
    }
    modules = dict(traced.train.named_modules())
    hidden = {
        id(p): name for name in traced.opaque if name in modules for p in modules[name].parameters()
    }
    for graph_module in traced.graphs:
        for node in graph_module.graph.nodes:
            if node.op == "call_module" and node.target not in traced.opaque:
                for parameter in modules.get(node.target, nn.Module()).parameters(recurse=False):
                    if id(parameter) in hidden:
                        found.setdefault(node.target, f"'{hidden[id(parameter)]}'")
            elif node.op == "get_attr":
                tensor = _attribute(graph_module, node.target)
                for name in holders.get(id(tensor), ()):
                    found.setdefault(name, f"the forward itself ('{node.name}')")
    return found


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value
