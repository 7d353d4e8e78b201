"""One node of the graph as the rules see it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import fx, nn

from .constraints import Constraints
from .values import Value, flatten, unlabelled

if TYPE_CHECKING:
    from .walk import Propagation


@dataclass(frozen=True)
class Call:
    """An operation with the labels of its operands.

    Attributes:
        walk: The propagation, for rules that look around.
        node: The node.
        name: Plain name of the operation (``rules.plain_name``).
        module: The called module, None for functions and methods.
        args: Positional arguments, tensors as ``Value``.
        kwargs: Keyword arguments, tensors as ``Value``.
        values: Every ``Value`` among the arguments.
    """

    walk: Propagation
    node: fx.Node
    name: str
    module: nn.Module | None
    args: tuple
    kwargs: dict[str, Any]
    values: list[Value]

    @property
    def constraints(self) -> Constraints:
        return self.walk.constraints

    @property
    def meta(self) -> Any:
        """Fake result: a tensor, or a nest of tensors."""
        return self.node.meta["val"]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.meta.shape)

    def argument(self, position: int, *names: str, default: Any = None) -> Any:
        """An argument by its position or one of its names."""
        for name in names:
            if name in self.kwargs:
                return self.kwargs[name]
        return self.args[position] if len(self.args) > position else default

    def refuse(self, reason: str, values: list[Any] | None = None) -> Any:
        """Hold the channels of all operands (or of ``values``) fixed; the result carries none."""
        self.fix_all(self.values if values is None else values, reason)
        return unlabelled(self.meta)

    def not_understood(self) -> Any:
        return self.refuse(f"the operation '{self.name}' ({self.node.name}) is not understood")

    def fix_all(self, nested: Any, reason: str) -> None:
        for value in flatten(nested):
            if isinstance(value, Value) and value.dim is not None:
                self.constraints.fix(value.labels, reason)

    def maps_zero_to_zero(self) -> bool:
        """Runs an operation whose f(0) depends on its arguments (``clamp(min=0.1)``) on a zero."""

        def plain(n: fx.Node) -> Any:
            return torch.zeros(1) if isinstance(n.meta["val"], torch.Tensor) else n.meta["val"]

        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), plain)
        return not bool(self.run(args, kwargs).any())

    def run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The operation itself, on other arguments."""
        if self.module is not None:
            return self.module(*args, **kwargs)
        if self.node.op == "call_method":
            return getattr(args[0], self.node.target)(*args[1:], **kwargs)
        return self.node.target(*args, **kwargs)


Rule = Callable[[Call], Any]
