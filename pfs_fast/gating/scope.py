"""Which groups get gates, and after which layers the gates sit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torchvision
from torch import fx, nn

from ..errors import ConfigError, ModelError
from ..graph import rules
from ..graph.analysis import ChannelGraph
from ..graph.groups import FIXED, ChannelGroup, ChannelGroups
from ..graph.narrow import NORMS
from ..graph.propagation import Value

SCOPES = ("paper", "all")


@dataclass(frozen=True)
class Site:
    """A layer whose output is multiplied by gates.

    Attributes:
        layer: Qualified name of a batch norm (the usual case) or of a convolution or linear layer without one.
        units: Gate of each output channel, ``FIXED`` where there is none. [channels], int64.
    """

    layer: str
    units: np.ndarray


def gated_groups(graph: ChannelGraph, model: nn.Module, scope: str) -> ChannelGroups:
    """The groups that get gates; all others are held whole.

    Args:
        graph: Analysis of the model.
        model: The model, asked for ``paper_gates()``: names of the convolutions that the paper gates.
        scope: ``"paper"``: what the paper gates; for other nets, every group that joins no residual sum.
            ``"all"``: every prunable group.

    Raises:
        ConfigError: Unknown scope.
        ModelError: No group is left; the message lists why.
    """
    groups = graph.groups
    if scope == "all":
        chosen, reason = groups, ""
    elif scope == "paper":
        gated = _paper_convolutions(model)
        if gated is None:
            names = [g.name for g in groups.groups if not g.residual]
            reason = "scope 'paper' holds channels of a residual sum whole"
        else:
            wanted = set(gated(groups))
            names = [g.name for g in groups.groups if wanted & set(g.producers)]
            reason = "the paper does not gate this layer of this network"
        chosen = groups.restrict(names, reason)
    else:
        raise ConfigError(f"search: scope must be one of {SCOPES}, got {scope!r}")
    if not chosen.groups:
        if not chosen.fixed:
            raise ModelError(
                "search: model must have convolution or linear layers, got none that it calls"
            )
        lines = "\n".join(f"  {name}: {why}" for name, why in chosen.fixed)
        raise ModelError(
            f"search: model must have a channel group that can be gated with scope={scope!r}, got none; each is held "
            f"whole because:\n{lines}\ntry scope='all', or a model whose layers are not all joined with its output"
        )
    return chosen


def _paper_convolutions(model: nn.Module) -> Callable[[ChannelGroups], list[str]] | None:
    """Names of the gated convolutions, for networks of which the paper says so."""
    if hasattr(model, "paper_gates"):
        return lambda _: list(model.paper_gates())
    if isinstance(model, torchvision.models.ResNet):
        # The first convolution of a BasicBlock, the first two of a Bottleneck: all but the last of each block.
        last = {
            torchvision.models.resnet.BasicBlock: "conv2",
            torchvision.models.resnet.Bottleneck: "conv3",
        }
        return lambda _: [
            f"{name}.{conv}"
            for name, block in model.named_modules()
            if type(block) in last
            for conv in ("conv1", "conv2")
            if conv != last[type(block)]
        ]
    if isinstance(model, torchvision.models.MobileNetV2):
        # Expansions, stem and the last 1x1: the convolutions followed by an activation, depthwise ones apart.
        return lambda groups: [
            f"{name}.0"
            for name, block in model.named_modules()
            if isinstance(block, torchvision.ops.Conv2dNormActivation) and block[0].groups == 1
        ]
    return None


def chosen_units(graph: ChannelGraph, chosen: ChannelGroups) -> np.ndarray:
    """Unit of each label in the numbering of ``chosen``, ``FIXED`` outside its groups. [num_labels], int64."""
    renumber = np.full(
        graph.groups.num_units + 1, FIXED, dtype=np.int64
    )  # the last entry maps FIXED to itself
    by_name = {g.name: g for g in graph.groups.groups}
    for new in chosen.groups:
        old = by_name[new.name]
        renumber[old.start : old.start + old.size] = np.arange(new.start, new.start + new.size)
    return renumber[graph.unit_of_label]


def gate_sites(graph: ChannelGraph, chosen: ChannelGroups, scope: str) -> tuple[Site, ...]:
    """Layers after which the gates of ``chosen`` sit.

    ``"paper"``: the first batch norm after the producer. ``"all"``: the last one before channels mix, since batch
    statistics of a later norm would cancel the scale of an earlier gate. A producer whose channels reach the next layer
    past any batch norm is gated itself.
    """
    units = _UnitsAtNodes(graph, chosen, shifts=scope == "all")
    norms = units.last_norms() if scope == "all" else units.first_norms()
    sites = {name: units.at_layer(name) for name in norms}
    for group in chosen.groups:
        if units.leaks(group):
            for name in group.producers:
                if units.reaches_mixing(name):
                    sites[name] = units.at_layer(name)
    order = [layer.name for layer in chosen.layers]
    return tuple(
        Site(name, sites[name]) for name in order if name in sites and (sites[name] != FIXED).any()
    )


class _UnitsAtNodes:
    """The train graph with the gated units at each node.

    Args:
        graph: Analysis of the model.
        chosen: The gated groups.
        shifts: Take a depthwise convolution with a bias, which would lift a channel off 0, for a norm.
    """

    def __init__(self, graph: ChannelGraph, chosen: ChannelGroups, *, shifts: bool) -> None:
        self._shifts = shifts
        self.graph = graph.traced.train.graph
        self.modules = dict(graph.traced.train.named_modules())
        self.layers = {layer.name: layer for layer in chosen.layers}
        self._unit_of_label = chosen_units(graph, chosen)
        self._values = graph.propagation.outputs

    def at_layer(self, name: str) -> np.ndarray:
        return self.layers[name].out_units

    def _value(self, node: fx.Node) -> Value | None:
        return self._values.get((0, node.name))

    def touches(self, node: fx.Node, group: ChannelGroup | None = None) -> bool:
        value = self._value(node)
        if value is None or value.dim is None:
            return False
        units = self._unit_of_label[value.labels]
        if group is None:
            return bool((units != FIXED).any())
        return bool(((units >= group.start) & (units < group.start + group.size)).any())

    def _kind(self, node: fx.Node) -> str:
        """``"norm"``, ``"mix"`` (a layer that mixes channels), ``"depthwise"`` or ``"other"``."""
        if node.op != "call_module":
            return "other"
        if isinstance(self.modules[node.target], NORMS):
            return "norm"
        layer = self.layers.get(node.target)
        if layer is None:
            return "other"
        if not layer.depthwise:
            return "mix"
        biased = self.modules[node.target].bias is not None
        return "norm" if self._shifts and biased else "depthwise"

    def last_norms(self) -> set[str]:
        direct = self._reaching()
        return {
            n.target
            for n in self.graph.nodes
            if self._kind(n) == "norm" and n in direct and self.touches(n)
        }

    def reaches_mixing(self, name: str) -> bool:
        direct = self._reaching()
        return any(
            n.op == "call_module" and n.target == name and n in direct for n in self.graph.nodes
        )

    def _reaching(self) -> set[fx.Node]:
        """Nodes from which a path leads to a mixing layer past no batch norm."""
        direct: set[fx.Node] = set()
        for node in reversed(self.graph.nodes):
            for user in node.users:
                kind = self._kind(user)
                if kind == "mix" or (kind != "norm" and user in direct):
                    direct.add(node)
        return direct

    def first_norms(self) -> set[str]:
        """Batch norms that the channels of a producer reach past no other batch norm."""
        fresh: set[fx.Node] = set()
        found = set()
        for node in self.graph.nodes:
            kind = self._kind(node)
            came = any(source in fresh for source in node.all_input_nodes)
            if kind == "norm" and came and self.touches(node):
                found.add(node.target)
            elif kind == "mix" or (kind in ("other", "depthwise") and came):
                fresh.add(node)
        return found

    def leaks(self, group: ChannelGroup) -> bool:
        """Whether a mixing layer reads a channel of the group that no batch norm's gate would have made 0."""
        gated: dict[fx.Node, bool] = {}
        for node in self.graph.nodes:
            kind = self._kind(node)
            sources = [s for s in node.all_input_nodes if s in gated]
            if kind == "mix" and any(not gated[s] for s in sources):
                return True
            if not self.touches(node, group):
                continue
            module = self.modules[node.target] if node.op == "call_module" else None
            name = rules.plain_name(node, module) if node.op.startswith("call") else ""
            if kind == "norm":
                gated[node] = True
            elif kind == "mix" or name in rules.LIFTING or not sources:
                gated[node] = False
            elif name in rules.MULTIPLICATIVE:
                gated[node] = any(gated[s] for s in sources)
            else:
                gated[node] = all(gated[s] for s in sources)
        return False
