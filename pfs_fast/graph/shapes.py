"""A run of a graph on fake tensors: the value of every node, its MACs, and what is written in place.

Fake tensors compute nothing, but their bookkeeping takes most of the time of an analysis. Layers whose result is known from
their attributes therefore get it without a call; whatever does not look exactly like that runs as it is.
"""

from __future__ import annotations

import math
import operator
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from .._modules import has_hooks
from ..errors import TraceError
from .counting import quiet_fake_tensors
from .left_state import put_back
from .user_functions import either, is_shown

IMAGES = 2  # batch norm over 1x1 maps needs more than one value a channel
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM_DIMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
_ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU, nn.GELU, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid)
# Operations that multiply no matrices: the counter, which is slow, need not look.
_FREE = (
    *_ACTIVATIONS,
    nn.Identity,
    nn.Dropout,
    nn.MaxPool2d,
    nn.AvgPool2d,
    nn.AdaptiveAvgPool2d,
    nn.LayerNorm,
    nn.Flatten,
)
_FREE_FUNCTIONS = (
    operator.add,
    operator.iadd,
    operator.mul,
    operator.imul,
    operator.getitem,
    getattr,
    torch.add,
    torch.cat,
    torch.chunk,
    torch.flatten,
    torch.transpose,
    torch.nn.functional.relu,
)
_FREE_METHODS = frozenset("view reshape permute transpose chunk size mean contiguous".split())


def infer_values(
    graph_module: fx.GraphModule, inputs: tuple[Tensor, ...], *, count: bool = True
) -> int:
    """Store the value of every node in its ``meta``, for a batch of two.

    ``meta["val"]``: a fake tensor, or another value. ``meta["writes"]``: nodes whose tensor the operation overwrites.
    ``meta["stale"]``: nodes that share memory with those, or are those, and are read later. ``meta["hooked"]``: forward
    hooks change what a module takes or gives. ``meta["images"]``: how many images a value stands for; 1 where it depends on
    parameters alone.

    Args:
        graph_module: In train or eval mode.
        inputs: Example inputs; shape, dtype and device are used.
        count: Count MACs, which takes longer.

    Returns:
        int: MACs of one image; less where they are not counted.

    Raises:
        TraceError: A node does not take what it gets.
    """
    with fake_run(graph_module), put_back(graph_module, FakeTensor):
        fakes = [
            torch.empty((IMAGES, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in inputs
        ]
        recorder = _Recorder(graph_module, count)
        recorder.run(*fakes)
    _find_stale(graph_module.graph)
    return recorder.macs // IMAGES


@contextmanager
def fake_run(module: nn.Module, mode: FakeTensorMode | None = None) -> Iterator[None]:
    """Inside, operations compute nothing, and the buffers of ``module`` stay as they are.

    Args:
        module: What is run.
        mode: To go on with tensors of an earlier run; default: a new one.
    """
    # Fake tensors carry small integers as values: a batch norm would count this run in its real buffer.
    buffers = (b for b in module.buffers() if isinstance(b, Tensor))  # in tracing: not yet set
    counters = [(b, b.clone()) for b in buffers if not b.is_floating_point()]
    # The fused attention of nn.MultiheadAttention is one operation that the counter does not know.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with (
            mode or FakeTensorMode(allow_non_fake_inputs=True),
            sdpa_kernel(SDPBackend.MATH),
            quiet_fake_tensors(),
            torch.no_grad(),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
        for buffer, value in counters:
            buffer.copy_(value)


class _Recorder(fx.Interpreter):
    """Runs a graph and stores what every node gives."""

    def __init__(self, graph_module: fx.GraphModule, count: bool) -> None:
        super().__init__(graph_module, garbage_collect_values=False)
        self.extra_traceback = False  # the error below says more
        self._count = count
        self.macs = 0  # of all images
        self._named = dict(graph_module.named_modules())

    def run_node(self, n: fx.Node) -> Any:
        operands = [(s, self.env[s]) for s in n.all_input_nodes]
        before = [v._version if isinstance(v, Tensor) else 0 for _, v in operands]
        n.meta["hooked"] = False
        counted = self.macs
        value = self._known(n)
        if value is None:
            value = self._run(n)
        batched = n.op == "placeholder" or any(s.meta["images"] > 1 for s in n.all_input_nodes)
        n.meta["images"] = IMAGES if batched else 1
        if not batched:  # computed from parameters alone: one image alone costs as much
            self.macs += (IMAGES - 1) * (self.macs - counted)
        n.meta["val"] = value
        n.meta["writes"] = tuple(
            s
            for (s, v), version in zip(operands, before, strict=True)
            if isinstance(v, Tensor) and v._version != version
        )
        return value

    def _run(self, n: fx.Node) -> Any:
        counted = self._count and not self._is_free(n)
        counter = FlopCounterMode(display=False) if counted else nullcontext()
        hooked = n.op == "call_module" and has_hooks(self._named[n.target])
        try:
            with counter, _Watch(self._named[n.target]) if hooked else nullcontext() as watch:
                value = super().run_node(n)
        except Exception as error:
            raise TraceError(
                f"trace: example_input must fit the model, but {n.op} '{n.target}' fails: {type(error).__name__}: "
                f"{error}; pass an input of the shape and dtype that the model takes"
            ) from error
        if isinstance(counter, FlopCounterMode):
            self.macs += counter.get_total_flops() // 2
        if hooked:
            n.meta["hooked"] = watch.changed(self.fetch_args_kwargs_from_env(n)[0], value)
        return value

    def _is_free(self, n: fx.Node) -> bool:
        if n.op == "call_module":
            module = self._named[n.target]
            return type(module) in _FREE and not has_hooks(module)
        if n.op == "call_function":
            return n.target in _FREE_FUNCTIONS or n.target is either or is_shown(n)
        return n.op != "call_method" or n.target in _FREE_METHODS

    def _known(self, n: fx.Node) -> Tensor | None:
        """The result of a plain layer, without running it; None where anything is unusual."""
        if n.op != "call_module" or len(n.args) != 1 or n.kwargs:
            return None
        if not isinstance(n.args[0], fx.Node):  # a list of tensors
            return None
        module, x = self._named[n.target], self.env[n.args[0]]
        if not isinstance(x, Tensor) or has_hooks(module):
            return None
        if type(module) in _ACTIVATIONS and not getattr(module, "inplace", False):
            return torch.empty_like(x)
        if type(module) in _NORM_DIMS:
            return self._batch_norm(module, x)
        weight = module._parameters.get("weight")
        if weight is None or weight.dtype != x.dtype or weight.device != x.device:
            return None
        if type(module) is nn.LayerNorm and x.shape[-len(module.normalized_shape) :] == (
            module.normalized_shape
        ):
            return torch.empty_like(x)
        if type(module) in _CONVOLUTIONS:
            return self._convolution(module, x)
        return self._linear(module, x) if type(module) is nn.Linear else None

    @staticmethod
    def _batch_norm(bn: _BatchNorm, x: Tensor) -> Tensor | None:
        tensors = [t for t in (bn.weight, bn.running_mean) if t is not None]
        plain = (
            x.dim() in _NORM_DIMS[type(bn)]
            and x.size(1) == bn.num_features
            and all(t.dtype == x.dtype and t.device == x.device for t in tensors)
        )
        return torch.empty_like(x) if plain else None

    def _convolution(self, conv: nn.Module, x: Tensor) -> Tensor | None:
        dims = len(conv.kernel_size)
        if x.dim() != dims + 2 or x.size(1) != conv.in_channels or isinstance(conv.padding, str):
            return None
        size = [
            (length + 2 * p - d * (k - 1) - 1) // s + 1
            for length, p, d, k, s in zip(
                x.shape[2:],
                conv.padding,
                conv.dilation,
                conv.kernel_size,
                conv.stride,
                strict=True,
            )
        ]
        if conv.padding_mode != "zeros" or min(size) < 1:
            return None
        y = x.new_empty((x.size(0), conv.out_channels, *size))
        self.macs += y.numel() * math.prod(conv.weight.shape[1:])
        return y

    def _linear(self, linear: nn.Linear, x: Tensor) -> Tensor | None:
        if x.dim() < 2 or x.size(-1) != linear.in_features:
            return None
        y = x.new_empty((*x.shape[:-1], linear.out_features))
        self.macs += y.numel() * linear.in_features
        return y


class _Watch:
    """Whether the forward hooks of a module change what it takes or gives: the graph shows the module without them."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._args: tuple[Any, ...] = ()
        self._output: Any = None
        self._version = 0

    def __enter__(self) -> _Watch:
        def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
            self._args = args

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
            self._output, self._version = output, getattr(output, "_version", 0)

        self._handles = (
            self._module.register_forward_pre_hook(before),
            self._module.register_forward_hook(after, prepend=True),
        )
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def changed(self, args: tuple[Any, ...], output: Any) -> bool:
        taken = len(args) == len(self._args) and all(
            a is b for a, b in zip(args, self._args, strict=True)
        )
        return (
            not taken
            or output is not self._output
            or getattr(output, "_version", 0) != self._version
        )


def _find_stale(graph: fx.Graph) -> None:
    """For every write in place: nodes with the same memory that somebody reads afterwards."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    if not any(node.meta["writes"] for node in graph.nodes):
        for node in graph.nodes:
            node.meta["stale"] = ()
        return
    holders: dict[int, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for memory in memories(node):
            holders[memory].append(node)
    for node in graph.nodes:
        shared = {h: None for w in node.meta["writes"] for m in memories(w) for h in holders[m]}
        node.meta["stale"] = tuple(
            h
            for h in shared
            if order[h] < order[node] and any(order[user] > order[node] for user in h.users)
        )


def memories(node: fx.Node) -> set[int]:
    """What the tensors of a node's value are stored in."""
    values = leaves(node.meta["val"])
    return {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}


def leaves(nested: Any, whole: type | tuple[type, ...] = ()) -> list[Any]:
    """What nested lists, tuples, dictionaries and dataclasses hold; those of class ``whole`` are leaves."""
    if isinstance(nested, whole):
        return [nested]
    if is_dataclass(nested) and not isinstance(nested, (type, dict)):
        nested = [getattr(nested, f.name) for f in fields(nested)]
    if isinstance(nested, dict):
        nested = list(nested.values())
    if isinstance(nested, (tuple, list)):
        return [leaf for value in nested for leaf in leaves(value, whole)]
    return [nested]
