"""Runs the graphs of a traced model on labels instead of numbers."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import fx, nn

from .. import rules
from ..trace import TracedModel
from .call import Call
from .constraints import Constraints
from .table import OPERATIONS, layer_rule
from .values import Value, flatten, holds_tensors, unlabelled


class Propagation:
    """Follows every channel through both graphs of a traced model.

    Attributes:
        constraints: What was found.
        outputs: ``{(graph index, node name): value}``, for every node whose result is one tensor.
        counts: Whether the graph that is walked is the one whose MACs count.
    """

    def __init__(self, traced: TracedModel) -> None:
        self.constraints = Constraints()
        self.outputs: dict[tuple[int, str], Value] = {}
        self._modules = dict(traced.train.named_modules())
        self._shared = _shared_weights(traced.train)
        for index, graph_module in enumerate(traced.graphs):
            self._index = index
            self.counts = graph_module is traced.eval
            self._run(graph_module.graph)

    def _run(self, graph: fx.Graph) -> None:
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            result = self._node(node, args, kwargs)
            env[node] = result
            if isinstance(result, Value):
                self.outputs[self._index, node.name] = result
                if rules.writes_in_place(node, self._module(node)):
                    env[node.args[0]] = result  # later readers of the operand see the new values

    def _node(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return unlabelled(node.meta["val"])
        module = self._module(node)
        name = rules.plain_name(node, module) if node.op != "output" else "output"
        values = [v for v in flatten((args, kwargs)) if isinstance(v, Value)]
        call = Call(self, node, name, module, args, kwargs, values)
        if node.op == "output":
            call.fix_all(args, "it is an output of the network")
            return None
        rule = layer_rule(module)
        if rule is not None:
            return rule(call)
        if not values:  # arithmetic on sizes and other plain values
            return unlabelled(call.meta)
        return self._operation(call)

    def _operation(self, call: Call) -> Any:
        target, meta = call.node.target, call.meta
        if call.name == "getitem" and not isinstance(call.args[0], Value):
            return call.args[0][call.args[1]]  # one of several results
        if isinstance(target, type) and issubclass(target, tuple):
            return call.values  # a named tuple of results
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
            return f"layer '{name}' shares its weight with '{self._shared[name]}'"
        if hasattr(module, "parametrizations") or "weight" not in module._parameters:
            return f"the weight of layer '{name}' is computed (a parametrisation or weight norm)"
        return None

    def counts_channels(self, size: fx.Node, x: Value) -> bool:
        """Whether a size was computed from tensors with the channels of ``x``: another tensor may keep another number."""
        sources, seen = [size], set()
        while sources:
            source = sources.pop()
            if source in seen:
                continue
            seen.add(source)
            if not isinstance(source.meta["val"], torch.Tensor):
                sources += source.all_input_nodes
                continue
            value = self.outputs.get((self._index, source.name))
            if value is None or value.dim is None or not np.isin(x.labels, value.labels).all():
                return False
        return True


def _shared_weights(root: nn.Module) -> dict[str, str]:
    """Layers whose weight another layer holds as well, by name."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in root.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders[id(weight)].append(name)
    return {
        n: next(m for m in names if m != n)
        for names in holders.values()
        if len(names) > 1
        for n in names
    }
