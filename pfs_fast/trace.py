"""Model and example input -> ``torch.fx`` graphs with the shape of every value.

The train and the eval forward may differ (auxiliary heads, stochastic depth), so both are traced; they share the modules
of one deep copy, and the user's model is never touched.
"""

from __future__ import annotations

import copy
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from ._modules import require_plain
from .errors import ModelError, TraceError
from .functional_norm import as_plain_norms, call_norms

_TORCH_FOLDER = str(Path(torch.__file__).parent)
_OWN_FOLDER = str(Path(__file__).parent)


@dataclass(frozen=True)
class TracedModel:
    """The forward of a model as graphs over one copy of its modules.

    Attributes:
        train: Graph of the forward in train mode; ``node.meta["val"]`` holds a fake tensor (or another value) per node,
            for a batch of two.
        eval: Graph in eval mode; the same object as ``train`` where both are equal.
        macs: MACs of the eval forward of one image, all operations that ``torch.utils.flop_counter`` knows.
        params: Parameters of the model, each counted once, also of modules that the forward never calls.
    """

    train: fx.GraphModule
    eval: fx.GraphModule
    macs: int
    params: int

    @property
    def graphs(self) -> tuple[fx.GraphModule, ...]:
        return (self.train,) if self.train is self.eval else (self.train, self.eval)


class _Tracer(fx.Tracer):
    """Keeps every layer that pruning narrows as one node, and remembers where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.path: list[str] = []

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        for base in (_ConvNd, nn.Linear, _BatchNorm):
            # A subclass with the forward of its base (weight standardisation has one of its own) is that layer.
            if isinstance(m, base):
                own = type(m)
                torch_class = next(c for c in own.__mro__ if c.__module__.startswith("torch.nn."))
                if own.forward is torch_class.forward:
                    return True
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        self.path.append(self.path_of_module(m))
        result = super().call_module(m, forward, args, kwargs)
        self.path.pop()  # not in a finally: after an error the last entry says where it happened
        return result


def trace(model: nn.Module, example_input: torch.Tensor | tuple[torch.Tensor, ...]) -> TracedModel:
    """Trace the forward of a model in train and in eval mode.

    Args:
        model: Any fx-traceable module. Not modified.
        example_input: Input as the model takes it, [N, C, ...]; only shape, dtype and device are used. A tuple for
            several inputs.

    Raises:
        ModelError: The model is wrapped, cannot be copied, or its parameters lie on several devices.
        TraceError: The forward depends on data, or does not take such an input; the message names the place.
    """
    _check_model(model)
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    replica = _copied(model)
    graphs = []
    norms: set[str] = set()
    for training in (True, False):
        replica.train(training)
        graphs.append(_trace_mode(replica, norms))
    as_plain_norms(replica, norms)
    train, eval_ = graphs
    if _same(train.graph, eval_.graph):
        eval_ = train
    if train is not eval_:
        _infer_values(train.train(), inputs)
    macs = _infer_values(eval_.eval(), inputs)
    return TracedModel(train, eval_, macs, sum(p.numel() for p in model.parameters()))


def _check_model(model: nn.Module) -> None:
    """Refuse what cannot be copied and traced as a plain module."""
    require_plain("trace", model)
    tensors = [*model.parameters(), *model.buffers()]
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) > 1:
        raise ModelError(
            f"trace: model must lie on one device, got tensors on {', '.join(devices)}; use model.to(device)"
        )
    if devices == ["meta"]:
        raise ModelError(
            "trace: model must hold values, got tensors on the meta device; use model.to_empty() and initialise it"
        )


def _copied(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as error:  # whatever the model's attributes raise
        raise ModelError(
            f"trace: model must be one that copy.deepcopy copies, got {type(error).__name__}: {error}; use "
            "torch.nn.utils.parametrizations instead of weight_norm or spectral_norm, and keep no activations, locks or "
            "open files on the model"
        ) from error


def _trace_mode(model: nn.Module, norms: set[str]) -> fx.GraphModule:
    """Adds to ``norms`` the batch norms whose own forward the graph replaces."""
    tracer = _Tracer()
    try:
        with warnings.catch_warnings():
            # What traced control flow warns of becomes an error below if it matters.
            warnings.simplefilter("ignore")
            graph = tracer.trace(model)
    except Exception as error:  # whatever the user's forward raises under tracing
        where = tracer.path[-1] if tracer.path else "the model itself"
        raise TraceError(
            f"trace: model must be traceable by torch.fx, but module '{where}' ({type(_get(model, where)).__name__}) "
            f"is not{_user_line(error)}: {type(error).__name__}: {error}; make its control flow independent of tensor "
            "values, or hide the step behind torch.fx.wrap"
        ) from error
    norms |= call_norms(graph, tracer.root)
    return fx.GraphModule(tracer.root, graph, class_name=type(model).__name__)


def _get(model: nn.Module, name: str) -> nn.Module:
    return model.get_submodule(name) if name and name != "the model itself" else model


def _user_line(error: Exception) -> str:
    """`` (file:line: code)`` of the innermost frame outside torch and this package."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith((_TORCH_FOLDER, _OWN_FOLDER)):
            return f" ({frame.filename}:{frame.lineno}: {frame.line})"
    return ""


def _same(a: fx.Graph, b: fx.Graph) -> bool:
    def form(graph: fx.Graph) -> Iterator[tuple]:
        for node in graph.nodes:
            yield node.op, str(node.target), str(node.args), str(node.kwargs)

    return list(form(a)) == list(form(b))


class _ValueRecorder(fx.Interpreter):
    def run_node(self, n: fx.Node) -> Any:
        try:
            value = super().run_node(n)
        except Exception as error:
            raise TraceError(
                f"trace: example_input must fit the model, but {n.op} '{n.target}' fails: {type(error).__name__}: "
                f"{error}; pass an input of the shape and dtype that the model takes"
            ) from error
        n.meta["val"] = value
        return value


def _infer_values(graph_module: fx.GraphModule, inputs: tuple[torch.Tensor, ...]) -> int:
    """Store the (fake) value of every node; returns the MACs of one image."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Fake tensors carry small integers as values: a batch norm would count this run in its real buffer.
    counters = [(b, b.clone()) for b in graph_module.buffers() if not b.is_floating_point()]
    with mode:
        # Two images: batch norm over 1x1 maps needs more than one value a channel.
        fakes = [torch.empty((2, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in inputs]
        # The fused attention of nn.MultiheadAttention is one operation that the counter does not know.
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with (
                FlopCounterMode(display=False) as counter,
                sdpa_kernel(SDPBackend.MATH),
                torch.no_grad(),
            ):
                _ValueRecorder(graph_module).run(*fakes)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
    for buffer, value in counters:
        buffer.copy_(value)
    return counter.get_total_flops() // 4  # two operations a MAC, two images
