"""A forward pass without computing: fake tensors at every node of a traced network."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from .left_state import put_back
from .shapes import leaves


class ForwardRecord(fx.Interpreter):
    """Runs a traced network in eval mode on fake tensors, and keeps every value.

    Args:
        graph_module: Traced network. Its modes are as before afterwards; nothing else is touched.
        inputs: Only shape, dtype and device are used.

    Attributes:
        values: The value of every node: fake tensors, nests of them, plain numbers.
        constants: Storages of parameters, buffers and constants.
    """

    def __init__(self, graph_module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__(graph_module, garbage_collect_values=False)  # so storages stay apart
        self.values: dict[fx.Node, Any] = {}
        self.constants: set[int] = set()
        modes = [(module, module.training) for module in graph_module.modules()]
        try:
            graph_module.eval()
            with (
                put_back(graph_module, FakeTensor),
                FakeTensorMode(allow_non_fake_inputs=True) as mode,
                torch.no_grad(),
            ):
                self.constants |= {
                    storage_of(t) for t in [*graph_module.parameters(), *graph_module.buffers()]
                }
                self.run(*(mode.from_tensor(x) for x in inputs))
        finally:
            for module, training in modes:
                module.training = training

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "get_attr":
            self.constants |= {storage_of(t) for t in tensors_of(value)}
        self.values[n] = value
        return value


def storage_of(tensor: torch.Tensor) -> int:
    """What views of the same memory have in common, while that memory lives."""
    return tensor.untyped_storage()._cdata


def tensors_of(value: Any) -> list[torch.Tensor]:
    """All tensors of a nest."""
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]
