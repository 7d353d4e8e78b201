"""``torch.autograd.Function`` in a forward: its own backward stays, and its forward tells where the channels go.

While a forward is traced, ``F.apply(x)`` becomes one call of the function, beside it what its forward does, and an ``either`` of
the two. The propagation follows the channels through the forward; afterwards ``settle`` leaves the call alone.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx

_APPLY = torch.autograd.Function.__dict__["apply"]


def _plain_apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
    return _APPLY.__get__(None, kind)(*args, **kwargs)


def either(_traced: Any, applied: Any) -> Any:
    """The result of a function, twice: as its traced forward gives it, and as its call does."""
    return applied


@functools.cache
def call_of(kind: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The function that calls one, named as it is: a bound ``apply`` would be taken for a part of PyTorch."""

    def apply(*args: Any, **kwargs: Any) -> Any:
        return _plain_apply(kind, *args, **kwargs)

    apply.__module__, apply.__qualname__ = kind.__module__, f"{kind.__qualname__}.apply"
    apply.__name__ = f"{kind.__name__}_apply"
    return apply


def is_shown(node: fx.Node) -> bool:
    """Whether a node calls such a function, and others show what its forward does."""
    return "shown" in node.meta


@contextmanager
def functions_kept(tracer: fx.Tracer) -> Iterator[None]:
    """Inside, calls of user functions on what is traced are recorded as said above."""

    def apply(kind: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
        traced = any(isinstance(a, fx.Proxy) for a in (*args, *kwargs.values()))
        if not traced or kind.__module__.startswith(
            "torch."
        ):  # PyTorch's own compute what they look like
            return _plain_apply(kind, *args, **kwargs)
        return _record(tracer, kind, args, kwargs)

    torch.autograd.Function.apply = classmethod(apply)
    try:
        yield
    finally:
        torch.autograd.Function.apply = _APPLY


def _record(
    tracer: fx.Tracer, kind: type[torch.autograd.Function], args: tuple, kwargs: dict[str, Any]
) -> Any:
    before = set(tracer.graph.nodes)
    try:
        result = _plain_apply(kind, *args, **kwargs)
    except (
        Exception
    ):  # whatever it asks of a tensor: then it is one node, whose channels are held whole
        result = None
    inside = [n for n in tracer.graph.nodes if n not in before]
    if any(n.op == "call_module" for n in inside):
        raise fx.proxy.TraceError(f"the function '{kind.__name__}' calls modules")
    several = isinstance(result, tuple)
    shown = all(isinstance(r, fx.Proxy) for r in (result if several else (result,)))
    if not shown:
        for node in reversed(inside):
            tracer.graph.erase_node(node)
    applied = tracer.create_proxy("call_function", call_of(kind), args, kwargs)
    if not shown:
        return applied
    applied.node.meta["shown"] = True
    for node in inside:
        node.meta["inside"] = True

    def both(traced: fx.Proxy, call: fx.Proxy) -> fx.Proxy:
        return tracer.create_proxy("call_function", either, (traced, call), {})

    if not several:
        return both(result, applied)
    parts = [
        tracer.create_proxy("call_function", operator.getitem, (applied, i), {})
        for i in range(len(result))
    ]
    return tuple(map(both, result, parts))


def settle(graph_module: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Leave the calls in a graph, and drop what their forwards do.

    Returns:
        ``{either: call}`` of nodes that are gone and those in their place.
    """
    graph = graph_module.graph
    replaced = {n: n.args[1] for n in graph.nodes if n.target is either}
    if not replaced:
        return {}
    for node, applied in replaced.items():
        node.replace_all_uses_with(applied)
        graph.erase_node(node)
    for node in reversed(list(graph.nodes)):
        if "inside" in node.meta and not node.users:
            graph.erase_node(node)
    graph_module.recompile()
    return replaced
