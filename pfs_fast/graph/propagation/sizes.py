"""Arithmetic on sizes, as it would come out for other numbers of channels.

A slim network runs the same code, so a size that was computed from a tensor follows its channels, and a number in the code
does not. Which is which is found by evaluating the code for a network with several times as many channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import fx

from ..size_values import depends
from .values import Value, holds_tensors

FACTORS = (1, 2, 3)  # numbers of channels to try, as multiples


class Sizes:
    """Evaluates arguments for scaled numbers of channels.

    Args:
        value_of: Labels of a node of the graph that is walked, or None.
    """

    def __init__(self, value_of: Callable[[fx.Node], Value | None]) -> None:
        self._value_of = value_of

    def at(self, nested: Any, x: Value, factor: int) -> Any:
        """Arguments if all tensors that hold every channel of ``x`` had ``factor`` times as many."""
        return self._evaluate(nested, lambda v: factor if _covers(v, x) else 1)

    def influences(self, nested: Any, exempt: Value | None = None) -> list[Value]:
        """Labelled tensors whose number of channels decides these arguments; not those that cover ``exempt``."""
        plain = _plain_nodes(nested)
        sources = [
            v
            for v in self._sources(plain)
            if v.dim is not None and not (exempt is not None and _covers(v, exempt))
        ]
        if not sources:
            return []
        kept = {id(v) for v in sources}
        try:
            once, twice = (
                self._evaluate(plain, lambda v, f=f: f if id(v) in kept else 1) for f in (1, 2)
            )
        except (
            Exception
        ):  # arithmetic of the model that other numbers do not fit, whatever it raises
            return sources
        return sources if once != twice else []

    def deciding(self, node: fx.Node) -> list[Value]:
        """Labelled tensors whose number of channels a number that the forward asked for depends on."""

        def is_tensor(n: fx.Node) -> bool:
            return holds_tensors(n.meta["val"])

        def changed(n: fx.Node, source: Value) -> bool:
            try:
                once, twice = (
                    self._evaluate(n, lambda v, f=f: f if v is source else 1) for f in (1, 2)
                )
            except Exception:  # as above
                return True
            return once != twice

        labelled = [v for v in self._sources([node]) if v.dim is not None]
        return [v for v in labelled if depends(node, is_tensor, partial(changed, source=v))]

    def _sources(self, plain: list[fx.Node]) -> Iterable[Value]:
        """Labels of the tensors that these arguments were computed from."""
        queue, seen = list(plain), set()
        while queue:
            node = queue.pop()
            if node in seen:
                continue
            seen.add(node)
            if not isinstance(node.meta["val"], torch.Tensor):
                queue += node.all_input_nodes
            elif (value := self._value_of(node)) is not None:
                yield value

    def _evaluate(self, nested: Any, factor_of: Callable[[Value], int]) -> Any:
        done: dict[fx.Node, Any] = {}

        def value(node: fx.Node) -> Any:
            if node not in done:
                done[node] = run(node)
            return done[node]

        def run(node: fx.Node) -> Any:
            found = node.meta["val"]
            if isinstance(found, torch.Tensor):
                known, shape = self._value_of(node), list(found.shape)
                if known is not None and known.dim is not None:
                    shape[known.dim] *= factor_of(known)
                return torch.empty(shape, dtype=found.dtype, device="meta")
            if node.op not in ("call_function", "call_method"):
                return found
            args, kwargs = fx.map_arg((node.args, node.kwargs), value)
            if node.op == "call_method":
                return getattr(args[0], node.target)(*args[1:], **kwargs)
            return node.target(*args, **kwargs)

        return fx.map_arg(nested, value)


def _covers(value: Value, x: Value) -> bool:
    return value.dim is not None and bool(np.isin(x.labels, value.labels).all())


def _plain_nodes(nested: Any) -> list[fx.Node]:
    """Nodes among arguments that are neither tensors nor nests of them."""
    found: list[fx.Node] = []

    def note(node: fx.Node) -> fx.Node:
        if not holds_tensors(node.meta["val"]):
            found.append(node)
        return node

    fx.map_arg(nested, note)
    return found
