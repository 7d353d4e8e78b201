"""The gated network: frozen weights, gates folded into batch norm, fused where the graph allows it.

Every batch norm with the residual sum and the activation that follow it becomes one ``bn_gate_act``; every convolution
becomes one that does not keep its input; everything else runs as the model wrote it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..errors import ModelError
from ..graph import rules
from ..graph.analysis import ChannelGraph
from ..graph.functional import is_same_padded
from ..graph.narrow import NORMS
from ..graph.shapes import memories
from .gated_layers import (
    FrozenConv,
    FusedNorm,
    GatedOutput,
    GlobalPool,
    MaxPool,
    can_pool,
    is_global_pool,
    pool_of_call,
)
from .gates import GateBank

# Layers with weights that were cast to the dtype of the search.
_LAYERS = (FrozenConv, FusedNorm, GatedOutput, _ConvNd, nn.Linear, nn.PReLU, *NORMS)
_ACTIVATIONS = frozenset({"relu", "relu6", "silu", "hardswish"})


class GatedNetwork(nn.Module):
    """Logits of a model whose channels are multiplied by gates; only the gates get a gradient.

    Takes over the modules of ``graph``: weights are frozen, cast to ``dtype`` (batch norms stay in the gates' dtype) and
    laid out channels_last.

    Args:
        graph: Analysis of the model; not usable for another network afterwards.
        bank: The gates, on the device of the network.
        ops: ``pfs_fast.ops`` (fused) or ``pfs_fast.ops.reference``.
        dtype: Of convolutions and activations.
        channels_last: Lay out 4-d weights channels_last.
        track_stats: Update the running statistics of batch norms in train mode; only needed to evaluate.
        fast_convs: Run convolutions by Winograd's minimal filtering where `winograd` says so.

    Attributes:
        root: The model's modules under their own names, shared by both nets.
        train_net: Graph of train mode.
        eval_net: Graph of eval mode.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        bank: GateBank,
        ops: ModuleType,
        *,
        dtype: torch.dtype,
        channels_last: bool = True,
        track_stats: bool = False,
        fast_convs: bool = False,
    ) -> None:
        super().__init__()
        self._shapes = graph.traced.shapes
        root = self.root = graph.traced.train.requires_grad_(False)
        device = bank.state.values.device
        for net in graph.traced.graphs:  # modules are shared, constants of the forward are not
            _cast(net, dtype, bank.state.values.dtype, device, channels_last)
        builder = _Builder(root, bank, ops, track_stats, fast_convs, dtype)
        self.train_net = builder.rewrite(graph.traced.train)
        shared = graph.traced.train is graph.traced.eval
        self.eval_net = self.train_net if shared else builder.rewrite(graph.traced.eval)
        self.train()

    def forward(self, *inputs: Tensor) -> Any:
        if self._shapes is not None and self._shapes != tuple(tuple(x.shape[1:]) for x in inputs):
            got = ", ".join(str(tuple(x.shape[1:])) for x in inputs)
            asked = ", ".join(map(str, self._shapes))
            raise ModelError(
                f"search: images must all have the shape {asked} of the first, since the forward of the model decides by "
                f"their size, got {got}; resize them"
            )
        return (self.train_net if self.training else self.eval_net)(*inputs)

    def tensors(self) -> Iterator[Tensor]:
        """Weights, statistics, and constants of the graph of train mode."""
        yield from self.train_net.parameters()
        yield from self.train_net.buffers()
        for node in self.train_net.graph.nodes:
            if node.op == "get_attr":
                value = _attribute(self.train_net, node.target)
                if isinstance(value, Tensor):
                    yield value


class _Builder:
    """Rewrites graphs over one set of modules; new modules are made once for each place."""

    def __init__(
        self,
        root: nn.Module,
        bank: GateBank,
        ops: ModuleType,
        track: bool,
        fast_convs: bool,
        dtype: torch.dtype,
    ) -> None:
        self._modules: dict[str, Any] = dict(root.named_modules(remove_duplicate=False))
        self._dtype = dtype
        self._bank, self._ops, self._track, self._fast_convs = bank, ops, track, fast_convs
        self._targets: dict[tuple[str, str], str] = {}

    def rewrite(self, graph_module: fx.GraphModule) -> fx.GraphModule:
        graph = graph_module.graph
        _reshape_views(graph)
        for node in list(graph.nodes):
            if node.op == "call_function":
                self._replace_pool_call(graph, node)
            if node.op != "call_module" or node.meta["hooked"]:
                continue
            module = self._modules[node.target]
            if isinstance(module, _BatchNorm):
                self._fuse_norm(graph, node, module)
            elif isinstance(module, (_ConvNd, nn.Linear, *NORMS)):
                self._freeze(node, module)
            elif can_pool(module):
                node.target = self._add("pool", node.target, MaxPool(module, self._ops))
            elif is_global_pool(module):
                node.target = self._add("pool", node.target, GlobalPool(module))
        constants = {
            n.target: _attribute(graph_module, n.target) for n in graph.nodes if n.op == "get_attr"
        }
        _cast_inputs(graph, self._modules, self._dtype)
        result = fx.GraphModule(
            self._modules | constants, graph, class_name=type(graph_module).__name__
        )
        result.graph.lint()
        return result

    def _add(self, kind: str, name: str, module: nn.Module) -> str:
        """A qualified name of its own for a new module; the same place in the other graph shares it."""
        if (kind, name) not in self._targets:
            target = f"_{kind}.{name.replace('.', '_')}"
            while target in self._modules:  # "a.b" and "a_b" are two places
                target += "_"
            self._targets[kind, name] = target
            self._modules[target] = module
        return self._targets[kind, name]

    def _freeze(self, node: fx.Node, module: nn.Module) -> None:
        name = node.target
        plain = (
            isinstance(module, _ConvNd)
            and not isinstance(module, _ConvTransposeNd)
            and not is_same_padded(module)
            and module.padding_mode == "zeros"
            and not isinstance(module.padding, str)
            and "weight" not in vars(module)  # which a hook would compute before each call
        )
        layer = FrozenConv(module, self._ops, self._fast_convs) if plain else module
        if name in self._bank.layers:
            channel_dim = -1 if isinstance(module, nn.Linear) else 1
            if isinstance(module, _ConvNd):  # also without a batch dimension
                channel_dim = -len(module.kernel_size) - 1
            layer = GatedOutput(layer, name, self._bank, channel_dim)
        if layer is not module:
            node.target = self._add("layer", name, layer)

    def _fuse_norm(self, graph: fx.Graph, node: fx.Node, bn: _BatchNorm) -> None:
        chain, residual, act = [node], None, "identity"
        user = _only_user(node)
        if user is not None and self._is_sum(user) and not user.meta["stale"]:
            other = next(a for a in user.args if a is not node)
            chain, residual, user = [*chain, user], other, _only_user(user)
        if user is not None and self._activation(user):
            chain, act = [*chain, user], self._activation(user)
        name = f"{node.target}:{act}"
        fused = FusedNorm(bn, node.target, act, self._bank, self._ops, self._track)
        last = chain[-1]
        # At the end of the chain: the other operand of the sum may be computed after the batch norm.
        with graph.inserting_before(last):
            inputs = (*node.all_input_nodes, *([residual] if residual is not None else []))
            new = graph.create_node("call_module", self._add("norm", name, fused), inputs)
        new.meta = dict(last.meta)
        last.replace_all_uses_with(new)
        for old in reversed(chain):
            graph.erase_node(old)

    def _replace_pool_call(self, graph: fx.Graph, node: fx.Node) -> None:
        """``F.max_pool2d(x, 2)`` as the module that does the same. A place is its options: the module holds nothing else."""
        pool = pool_of_call(node)
        if pool is None or not can_pool(pool):
            return
        place = f"{pool.kernel_size}{pool.stride}{pool.padding}"
        name = "max" + re.sub(r"\W+", "_", place)
        with graph.inserting_before(node):
            target = self._add("pool", name, MaxPool(pool, self._ops))
            new = graph.create_node("call_module", target, tuple(node.all_input_nodes))
        new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)

    def _activation(self, node: fx.Node) -> str | None:
        if node.op not in ("call_module", "call_function", "call_method"):
            return None
        module = self._modules[node.target] if node.op == "call_module" else None
        name = rules.plain_name(node, module)
        return name if name in _ACTIVATIONS else None

    @staticmethod
    def _is_sum(node: fx.Node) -> bool:
        """``a + b`` of two tensors of one shape and dtype."""
        if node.op not in ("call_function", "call_method") or rules.plain_name(node, None) not in (
            "add",
            "iadd",
        ):
            return False
        values = [a.meta.get("val") if isinstance(a, fx.Node) else None for a in node.args]
        return (
            len(node.args) == 2
            and not node.kwargs
            and node.args[0] is not node.args[1]
            and all(isinstance(v, Tensor) for v in values)
            and values[0].shape == values[1].shape
            and values[0].dtype == values[1].dtype
        )


def _reshape_views(graph: fx.Graph) -> None:
    """``x.view(n, -1)`` as ``reshape``: in channels_last the elements of an image lie in another order.

    Where a name of the same memory is read after a write, a view stays one.
    """
    stale = {m for node in graph.nodes for s in node.meta["stale"] for m in memories(s)}
    for node in graph.nodes:
        if node.op == "call_method" and node.target == "view" and not stale & memories(node):
            node.target = "reshape"


def _cast_inputs(graph: fx.Graph, modules: dict[str, Any], dtype: torch.dtype) -> None:
    """Layers take ``dtype``, whatever the forward casts to (``self.conv(x.float())``), as under autocast."""

    def is_layer(node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(modules[node.target], _LAYERS)

    if not any(_casts(node) for node in graph.nodes):
        return
    for node in list(graph.nodes):
        if not is_layer(node):
            continue
        for source in node.all_input_nodes:
            if not is_layer(source):
                with graph.inserting_before(node):
                    cast = graph.call_method("to", (source, dtype))
                cast.meta = dict(source.meta)
                node.replace_input_with(source, cast)


def _casts(node: fx.Node) -> bool:
    """Whether a node may give another dtype than the search has: it names one."""
    if node.op == "call_method" and node.target in ("float", "double", "half", "bfloat16"):
        return True
    arguments = (*node.args, *node.kwargs.values())
    return any(isinstance(a, torch.dtype) or a in ("float", float) for a in arguments)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _cast(
    root: nn.Module,
    dtype: torch.dtype,
    norm_dtype: torch.dtype,
    device: torch.device,
    channels_last: bool,
) -> None:
    for module in root.modules():
        own = norm_dtype if isinstance(module, _BatchNorm) else dtype
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            if tensor is not None:
                tensor.data = tensor.data.to(
                    device, own if tensor.is_floating_point() else tensor.dtype
                )
                if channels_last and tensor.dim() == 4:
                    tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
