"""Model and example input -> ``torch.fx`` graphs with the shape of every value.

The train and the eval forward may differ (auxiliary heads, stochastic depth), so both are traced; they share the modules
of one deep copy, and the user's model is never touched.
"""

from __future__ import annotations

import copy
import inspect
import operator
import os
import threading
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map
from torchvision.ops import FrozenBatchNorm2d

from .._ambient import turn
from .._modules import copied, require_plain
from ..errors import ModelError, TraceError
from .functional import call_layers, is_same_padded
from .left_state import Left, ModuleState
from .shapes import infer_values
from .size_values import NotASize, SizeValues
from .tensor_questions import questions_answered
from .user_functions import functions_kept

_TORCH_FOLDER = str(Path(torch.__file__).parent) + os.sep  # not torchvision
# Layers that stay one node, also as subclasses with the forward of their base.
_LAYERS = (_ConvNd, nn.Linear, _NormBase, nn.GroupNorm, FrozenBatchNorm2d)
_OWN_FOLDER = str(Path(__file__).parent) + os.sep


@dataclass(frozen=True)
class TracedModel:
    """The forward of a model as graphs over one copy of its modules.

    Attributes:
        train: Graph of the forward in train mode; ``node.meta["val"]`` holds a fake tensor (or another value) per node,
            for a batch of two, ``writes`` and ``stale`` what an operation overwrites (``shapes.infer_values``).
        eval: Graph in eval mode; the same object as ``train`` where both are equal.
        macs: MACs of the eval forward of one image, all operations that ``torch.utils.flop_counter`` knows.
        params: Parameters of the model, each counted once, also of modules that the forward never calls.
        opaque: Modules that could not be traced and are one node each: name -> why. Their channels are held whole.
        shapes: Shapes of one image, one for each input, where the forward asked for sizes (``if height == 7``): the graphs
            hold for these alone. None: it did not ask.
        uncalled: Layers whose weight the graphs read without calling them (weight standardisation): name -> why their channels
            are held whole.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    macs: int
    params: int
    opaque: dict[str, str] = field(default_factory=dict)
    shapes: tuple[tuple[int, ...], ...] | None = None
    uncalled: dict[str, str] = field(default_factory=dict)

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        return (self.train,) if self.train is self.eval else (self.train, self.eval)


class _Proxy(fx.Proxy):
    """Records ``y += z`` as what it is: torch.fx would take it for ``y = y + z``, and other names of y for unchanged."""

    def __iadd__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iadd, other)

    def __isub__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.isub, other)

    def __imul__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imul, other)

    def __itruediv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.itruediv, other)

    def __ipow__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.ipow, other)

    def __ifloordiv__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.ifloordiv, other)

    def __imod__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.imod, other)

    def __iand__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.iand, other)

    def __ior__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.ior, other)

    def __ixor__(self, other: Any) -> fx.Proxy:
        return self._in_place(operator.ixor, other)

    def _in_place(self, operation: Any, other: Any) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", operation, (self, other), {})

    # Where Python needs a number of a size, it gets that of the example.

    def __getattr__(self, k: str) -> fx.Proxy:
        if k in ("shape", "ndim"):  # as proxies of this class, where torch.fx has one of its own
            return self.tracer.create_proxy("call_function", getattr, (self, k), {})
        return super().__getattr__(k)

    def __index__(self) -> int:
        return operator.index(self.tracer.number(self))

    def __int__(self) -> int:
        return int(self.tracer.number(self))

    def __float__(self) -> float:
        return float(self.tracer.number(self))

    def __round__(self, digits: int | None = None) -> float:
        return round(self.tracer.number(self), digits)

    def __len__(self) -> int:
        return len(self.tracer.elements(self))


class _Tracer(fx.Tracer):
    """Keeps every layer that pruning narrows as one node, and remembers where it is."""

    def __init__(self, opaque: set[type[nn.Module]], inputs: tuple[torch.Tensor, ...]) -> None:
        super().__init__()
        self.path: list[str] = []
        self._opaque = opaque
        self._thread = threading.get_ident()  # torch.fx patches nn.Module for all threads
        self._size_values = SizeValues(self, inputs)

    def trace(self, root: nn.Module, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        self._size_values.begin(root)
        with functions_kept(self), questions_answered(_Proxy, self.value):
            return super().trace(root, concrete_args)

    def create_args_for_root(
        self, root_fn: Any, is_module: bool, concrete_args: Any = None
    ) -> tuple[Any, list[Any]]:
        """The forward that runs may be one of the instance: ``model.forward = model.forward_features``."""
        own = vars(self.root).get("forward")
        if own is None:
            return super().create_args_for_root(root_fn, is_module, concrete_args)
        if not inspect.ismethod(own):
            forward, args = super().create_args_for_root(own, False, concrete_args)
            return forward, args
        forward, args = super().create_args_for_root(own.__func__, True, concrete_args)
        return forward, [own.__self__, *args[1:]]

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def value(self, obj: fx.Proxy) -> Any:
        """What stands for an object where the forward asks whether it is a tensor."""
        try:
            return self._size_values.known(obj.node)
        except NotASize as error:
            raise fx.proxy.TraceError(
                f"the forward asks what '{obj.node.name}' is, but {error}"
            ) from None

    def to_bool(self, obj: fx.Proxy) -> bool:
        return bool(self.number(obj))

    def iter(self, obj: fx.Proxy) -> Iterator[fx.Proxy]:
        """Every size of a shape, still as something that follows the shape."""
        return (obj[i] for i in range(len(self.elements(obj))))

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def example(self, nested: Any) -> Any:
        """Tensors of zeros, or plain values, in the place of what was traced."""

        def stand_in(v: Any) -> Any:
            value = self.value(v) if isinstance(v, fx.Proxy) else v
            fake = value is not v and isinstance(value, torch.Tensor)
            return (
                torch.zeros(value.shape, dtype=value.dtype, device=value.device) if fake else value
            )

        return tree_map(stand_in, nested, is_leaf=lambda v: isinstance(v, fx.Proxy))

    def number(self, obj: fx.Proxy) -> Any:
        """What Python makes control flow of, or an index."""
        try:
            value = self._size_values(obj.node)
        except NotASize as error:
            raise fx.proxy.TraceError(
                f"the forward asks for '{obj.node.name}', but {error}"
            ) from None
        if not isinstance(value, (bool, int, float)):
            raise fx.proxy.TraceError(f"the forward asks for '{obj.node.name}', which is no number")
        return value

    def elements(self, obj: fx.Proxy) -> tuple[Any, ...]:
        """A shape, of which only the length is used."""
        try:
            return self._size_values.shape(obj.node)
        except NotASize as error:
            raise fx.proxy.TraceError(
                f"the forward goes through '{obj.node.name}', but {error}"
            ) from None

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if type(m) in self._opaque:
            return True
        if "forward" in vars(m):  # not the forward of its class
            return False
        if is_same_padded(m):
            return True
        for base in _LAYERS:
            # A subclass with the forward of its base (weight standardisation has one of its own) is that layer.
            if isinstance(m, base):
                own = type(m)
                torch_class = _torch_class(own)
                if own.forward is torch_class.forward:
                    return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not in a finally: after an error the last entry says where it happened
        return result


@turn()
def trace(
    model: nn.Module,
    example_input: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    values: bool = True,
) -> TracedModel:
    """Trace the forward of a model in train and in eval mode.

    Args:
        model: Any fx-traceable module. Not modified.
        example_input: Input as the model takes it, [N, C, ...]; only shape, dtype and device are used. A tuple for
            several inputs. Where the forward asks for sizes, the graphs hold for images of this shape (``TracedModel.shapes``).
        values: The graphs are to be run on numbers, so a model on the meta device is refused.

    Raises:
        ModelError: The model is wrapped, cannot be copied, or its parameters lie on several devices.
        TraceError: The forward depends on data, or does not take such an input; the message names the place.
    """
    _check_model(model, values)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    replica = copied("trace", model)
    graphs, inside, untraceable = _trace_modes(replica, inputs)
    for layer in inside:
        # What the subclass does besides stands in the graph; the layer itself is that of its base.
        layer.__class__ = _torch_class(type(layer))
        vars(layer).pop("forward", None)
    train, eval_ = graphs
    assumed = [n for g in graphs for n in g.graph.nodes if "assumed" in n.meta]
    if _same(train.graph, eval_.graph):
        for node, twin in zip(train.graph.nodes, eval_.graph.nodes, strict=True):
            node.meta |= twin.meta
        eval_ = train
    try:
        if train is not eval_:
            infer_values(train.train(), inputs, count=False)
        macs = infer_values(eval_.eval(), inputs)
    except TraceError:
        nodes = (n for g in (train, eval_) for n in g.graph.nodes)
        failed = next((n for n in nodes if "val" not in n.meta), None)
        if failed is not None and failed.op == "call_module":
            error = untraceable.get(type(_get(replica, failed.target)))
            if error is not None:  # not for its sizes alone, as it turns out where it is run
                raise error from None
        raise
    opaque = {
        name: f"module '{name}' ({type(module).__name__}) cannot be traced"
        for name, module in replica.named_modules()
        if type(module) in untraceable
    }
    shapes = tuple(tuple(x.shape[1:]) for x in inputs) if assumed else None
    # Everything below looks for modules in the graph of train mode.
    for node in eval_.graph.nodes:
        if node.op == "call_module":
            train.add_submodule(node.target, eval_.get_submodule(node.target))
    params = sum(p.numel() for p in model.parameters())
    return TracedModel(train, eval_, macs, params, opaque, shapes, _uncalled(graphs, replica))


def _uncalled(graphs: list[fx.GraphModule], model: nn.Module) -> dict[str, str]:
    modules = dict(model.named_modules())
    read = (n.target for g in graphs for n in g.graph.nodes if n.op == "get_attr")
    owners = (owner for owner, _, name in (t.rpartition(".") for t in read) if name == "weight")
    return {
        owner: f"the forward computes with its weight instead of calling it ({type(layer).__name__})"
        for owner in owners
        if isinstance(layer := modules.get(owner), (_ConvNd, nn.Linear))
    }


def _trace_modes(
    model: nn.Module, inputs: tuple[torch.Tensor, ...]
) -> tuple[list[fx.GraphModule], set[nn.Module], dict[type[nn.Module], TraceError]]:
    """Graphs in train and eval mode, layers with a forward of their own, and classes that had to stay one node.

    A module whose forward asks for what no size says (``if x.is_contiguous()``) cannot be traced, but run as it is.
    """
    untraceable: dict[type[nn.Module], TraceError] = {}
    while True:
        graphs, inside = [], set()
        try:
            states = []
            for training in (True, False):
                graph_module, layers, left = _trace_mode(model, inputs, set(untraceable), training)
                graphs.append(graph_module)
                inside |= layers
                states += [left] if left else []
            for left in states:
                _require_stateless(model, inputs, set(untraceable), graphs, left)
            return graphs, inside, untraceable
        except _Untraceable as error:
            kind = type(error.module)
            if error.module is model or kind in untraceable or kind.__module__.startswith("torch."):
                raise next(iter(untraceable.values()), error.error) from None
            untraceable[kind] = error.error


class _Untraceable(Exception):
    """A module that torch.fx does not trace, and the error that says so."""

    def __init__(self, module: nn.Module, error: TraceError) -> None:
        super().__init__(str(error))
        self.module, self.error = module, error


def _check_model(model: nn.Module, values: bool) -> None:
    """Refuse what cannot be copied and traced as a plain module."""
    require_plain("trace", model)
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise ModelError(
            f"trace: model must lie on one device, got tensors on {', '.join(devices)}; use model.to(device)"
        )
    if values and devices == ["meta"]:
        raise ModelError(
            "trace: model must hold values, got tensors on the meta device; use model.to_empty() and initialise it"
        )


def _trace_mode(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    opaque: set[type[nn.Module]],
    training: bool,
) -> tuple[fx.GraphModule, set[nn.Module], list[Left]]:
    """The graph, layers with a forward of their own that became calls of their base, and what the forward left on modules."""
    model.train(training)
    state, tracer = ModuleState(model), _Tracer(opaque, inputs)
    try:
        with warnings.catch_warnings():
            # What traced control flow warns of becomes an error below if it matters.
            warnings.simplefilter("ignore")
            graph = tracer.trace(model)
    except Exception as error:  # whatever the user's forward raises under tracing
        where = tracer.path[-1] if tracer.path else "the model itself"
        module = _get(model, where)
        named = TraceError(
            f"trace: model must be traceable by torch.fx, but module '{where}' ({type(module).__name__}) "
            f"is not{_user_line(error)}: {type(error).__name__}: {error}; make its control flow independent of tensor "
            "values, hide the step behind torch.fx.wrap, or pass a part without it, as the backbone of a detector"
        )
        named.__cause__ = error
        raise _Untraceable(module, named) from error
    finally:
        left = state.undo(fx.Proxy)
    left = [Left(found.module, found.name, tracer.example(found.value)) for found in left]
    inside = call_layers(graph, tracer.root)
    return fx.GraphModule(tracer.root, graph, class_name=type(model).__name__), inside, left


def _require_stateless(
    model: nn.Module,
    inputs: tuple[torch.Tensor, ...],
    opaque: set[type[nn.Module]],
    graphs: list[fx.GraphModule],
    left: list[Left],
) -> None:
    """Trace again with what a forward left on the modules: each must do the same as from the start."""
    for graph_module, training in zip(graphs, (True, False), strict=True):
        state = ModuleState(model)
        for found in left:
            vars(found.module)[found.name] = copy.copy(found.value)
        try:
            again = _trace_mode(model, inputs, opaque, training)[0]
        except _Untraceable:
            again = None
        finally:
            state.restore(left)
        if again is None or not _alike(graph_module, again):
            names = {id(m): name for name, m in model.named_modules()}
            first = left[0]
            where = f"{names[id(first.module)]}.{first.name}".lstrip(".")
            raise _Untraceable(
                first.module,
                TraceError(
                    f"trace: model must compute the same whatever an earlier forward left on it, but its forward reads "
                    f"'{where}', which it sets; keep no tensors on modules between two forwards"
                ),
            )


def _torch_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The library's class that a layer is derived from."""
    return next(
        c for c in kind.__mro__ if c is FrozenBatchNorm2d or c.__module__.startswith("torch.nn.")
    )


def _get(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name) if name and name != "the model itself" else model


def _user_line(error: Exception) -> str:
    """`` (file:line: code)`` of the innermost frame outside torch and this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((_TORCH_FOLDER, _OWN_FOLDER)):
            return f" ({frame.filename}:{frame.lineno}: {frame.line})"
    return ""


def _alike(a: fx.GraphModule, b: fx.GraphModule) -> bool:
    """``_same`` but for the names of constants, which every trace makes anew."""
    if len(a.graph.nodes) != len(b.graph.nodes):
        return False
    place = {n: f"%{i}" for g in (a.graph, b.graph) for i, n in enumerate(g.nodes)}

    def constant(graph_module: fx.GraphModule, node: fx.Node) -> Any:
        return getattr(graph_module, node.target) if node.op == "get_attr" else None

    for x, y in zip(a.graph.nodes, b.graph.nodes, strict=True):
        if x.op != y.op:
            return False
        made = all(str(n.target).startswith("_tensor_constant") for n in (x, y))
        if made and x.op == "get_attr":
            if not torch.equal(constant(a, x), constant(b, y)):
                return False
            continue
        arguments = [str(fx.map_arg((n.args, n.kwargs), place.get)) for n in (x, y)]
        if x.target != y.target or arguments[0] != arguments[1]:
            return False
    return True


def _same(a: fx.Graph, b: fx.Graph) -> bool:
    def form(graph: fx.Graph) -> Iterator[tuple]:
        for node in graph.nodes:
            yield node.op, str(node.target), str(node.args), str(node.kwargs)

    return list(form(a)) == list(form(b))
