"""Sizes while a forward is traced: ``if height == 7``, ``max(pad, 0)``, ``range(width)`` get the example's numbers.

What was answered stays noted on its node (``meta["assumed"]``): the graphs hold for images of that size alone, and the
propagation holds every channel whose number such an answer depends on. What depends on values, or on the number of images,
gets no answer.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .shapes import IMAGES, fake_run, leaves

_SHAPE_METHODS = frozenset(("size", "dim", "ndimension", "numel", "nelement"))
_SHAPE_ATTRIBUTES = frozenset(("shape", "ndim"))


class NotASize(Exception):
    """A value that is asked for is not one that the sizes of an image decide; the text says why."""


class SizeValues:
    """Values of the plain nodes of a graph that is still being traced, for batches of two sizes.

    Args:
        tracer: The tracer, before it starts.
        inputs: Example inputs; shape, dtype and device are used.
    """

    def __init__(self, tracer: fx.Tracer, inputs: tuple[Tensor, ...]) -> None:
        self._tracer, self._inputs = tracer, inputs
        self._plain_module = nn.Module.__call__, nn.Module.__getattr__
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._runs: tuple[dict[fx.Node, Any], ...] = ({}, {})
        self._attributes: dict[str, Tensor] = {}

    def begin(self, root: nn.Module) -> None:
        """Note the parameters and buffers of what is traced, which its forward may set to something else."""
        self._attributes = dict(root.named_parameters(remove_duplicate=False))
        self._attributes |= dict(root.named_buffers(remove_duplicate=False))

    def __call__(self, node: fx.Node) -> Any:
        """The value of a node, a number or a tuple of numbers, noted on it as assumed.

        Raises:
            NotASize: It is a tensor, or depends on values or on the number of images.
        """
        first, second = self._advance()
        value = first.get(node)
        if node not in first or node not in second or _holds_tensors(value):
            raise NotASize("it depends on the values of a tensor")
        self._require_sizes(node)
        if depends(node, self._is_tensor, lambda n: first[n] != second[n]):
            raise NotASize("it depends on the number of images")
        node.meta["assumed"] = True
        return value

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """A shape, of which only the number of dimensions is used: nothing is assumed.

        Raises:
            NotASize: It is something else.
        """
        run = self._advance()[0]
        if node not in run or not _is_shape(node, self._is_tensor):
            raise NotASize("it is not the shape of a tensor")
        return run[node]

    def known(self, node: fx.Node) -> Any:
        """The value of any node, of which only the kind is used: nothing is assumed.

        Raises:
            NotASize: It cannot be run on the example.
        """
        run = self._runs[0]
        if node not in run:
            self._advance()
        if node not in run:
            raise NotASize("it cannot be computed for the example input")
        return run[node]

    def _is_tensor(self, node: fx.Node) -> bool:
        return _holds_tensors(self._runs[0][node])

    def _require_sizes(self, node: fx.Node) -> None:
        """Of tensors nothing but their shape may be read: other properties are not the same in a search."""
        queue, seen = [node], set()
        while queue:
            n = queue.pop()
            if n in seen:
                continue
            seen.add(n)
            tensors = [s for s in n.all_input_nodes if self._is_tensor(s)]
            if tensors and not _reads_shape(n):
                raise NotASize(f"it depends on '{n.name}', which is not a size")
            queue += [s for s in n.all_input_nodes if s not in tensors]

    def _advance(self) -> tuple[dict[fx.Node, Any], ...]:
        """Run what has been traced since the last question. Nodes that fail have no value, nor have their users."""
        nodes = list(self._tracer.graph.nodes)
        with self._untraced(), fake_run(self._tracer.root, self._mode):
            for run, images in zip(self._runs, (IMAGES, IMAGES + 1), strict=True):
                inputs = iter(self._inputs)
                for node in nodes:
                    if node in run:
                        continue
                    try:
                        run[node] = self._run(node, run, inputs, images)
                    except Exception:  # whatever an operation raises; all of it is run again later
                        continue
        return self._runs

    def _run(
        self, node: fx.Node, run: dict[fx.Node, Any], inputs: Iterator[Tensor], images: int
    ) -> Any:
        if node.op == "placeholder":
            x = next(inputs, None)
            if x is None:
                return node.args[0]
            return torch.empty((images, *x.shape[1:]), dtype=x.dtype, device=x.device)
        if node.op == "get_attr":
            return self._attribute(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: run[n])
        if node.op == "call_module":
            return self._tracer.root.get_submodule(node.target)(*args, **kwargs)
        if node.op == "call_method":
            return getattr(args[0], node.target)(*args[1:], **kwargs)
        return node.target(*args, **kwargs)

    def _attribute(self, name: str) -> Any:
        """An attribute as it was before the forward set it, to what is traced."""
        if name not in self._attributes:
            self._attributes |= {name: t for t, name in self._tracer.tensor_attrs.items()}
        if name in self._attributes:
            return self._attributes[name]
        return operator.attrgetter(name)(self._tracer.root)

    @contextmanager
    def _untraced(self) -> Iterator[None]:
        """Modules as they are outside of tracing, where torch.fx replaces their call and their parameters."""
        traced = nn.Module.__call__, nn.Module.__getattr__
        nn.Module.__call__, nn.Module.__getattr__ = self._plain_module
        try:
            yield
        finally:
            nn.Module.__call__, nn.Module.__getattr__ = traced


def depends(
    node: fx.Node, is_tensor: Callable[[fx.Node], bool], changed: Callable[[fx.Node], bool]
) -> bool:
    """Whether a plain value depends on something, of which every shape that depends on it shows a change.

    Arithmetic hides a change (``channels > 100``), so whatever is computed from a value that depends on it does too. One
    size of a shape is not computed from the others.

    Args:
        node: A node that is no tensor.
        is_tensor: Whether a node holds tensors.
        changed: Whether the value of a plain node shows a change.
    """
    known: dict[fx.Node, bool] = {}

    def ask(n: fx.Node) -> bool:
        if n not in known:
            plain = [s for s in n.all_input_nodes if not is_tensor(s)]
            if _is_shape(n, is_tensor) or _is_one_size(n, is_tensor):
                known[n] = changed(n)
            else:
                known[n] = changed(n) or any(map(ask, plain))
        return known[n]

    return ask(node)


def _reads_shape(node: fx.Node) -> bool:
    if node.op == "call_method":
        return node.target in _SHAPE_METHODS
    return node.target is getattr and node.args[1] in _SHAPE_ATTRIBUTES


def _is_shape(node: fx.Node, is_tensor: Callable[[fx.Node], bool]) -> bool:
    """``x.shape``, ``x.size()``, or a slice of one with numbers in the code."""
    if not node.all_input_nodes or any(isinstance(a, fx.Node) for a in node.args[1:]):
        return False
    if _reads_shape(node):
        return is_tensor(node.args[0])
    return (
        node.target is operator.getitem
        and len(node.all_input_nodes) == 1
        and isinstance(node.args[1], slice)
        and _is_shape(node.args[0], is_tensor)
    )


def _is_one_size(node: fx.Node, is_tensor: Callable[[fx.Node], bool]) -> bool:
    """``x.shape[2]``"""
    return (
        node.target is operator.getitem
        and isinstance(node.args[1], int)
        and isinstance(node.args[0], fx.Node)
        and _is_shape(node.args[0], is_tensor)
    )


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in leaves(value))
