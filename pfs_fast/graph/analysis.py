"""Constraints on labels -> units and groups: which channels live and die together."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from .groups import FIXED, ChannelGroup, ChannelGroups, Layer
from .narrow import is_channelwise, layers_by_name
from .propagation import NONE, Constraints, LayerUse, Propagation
from .scales import Scale
from .trace import TracedModel, trace


@dataclass(frozen=True)
class ChannelGraph:
    """A traced model with its groups and the units that flow along every edge.

    Attributes:
        traced: Graphs and modules.
        groups: Every prunable group.
        unit_of_label: Unit of each label of ``propagation``, ``FIXED`` where it is held whole. [num_labels], int64.
        propagation: Labels at the nodes of the graphs.
    """

    traced: TracedModel
    groups: ChannelGroups
    unit_of_label: np.ndarray
    propagation: Propagation


def analyse(
    model: nn.Module, example_input: torch.Tensor | tuple[torch.Tensor, ...]
) -> ChannelGroups:
    """Find the prunable channel groups of a model.

    Args:
        model: Any fx-traceable module. Not modified. It may lie on the meta device, as does the example then: nothing but
            shapes is looked at.
        example_input: Input as the model takes it, [N, C, ...].

    Raises:
        ModelError, TraceError: As ``pfs_fast.graph.trace.trace``.
    """
    return channel_graph(model, example_input, values=False).groups


def channel_graph(
    model: nn.Module,
    example_input: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    values: bool = True,
) -> ChannelGraph:
    """``analyse`` with everything that attaching gates needs besides; ``values`` as in ``trace``."""
    traced = trace(model, example_input, values=values)
    propagation = Propagation(traced)
    constraints = propagation.constraints
    root = _components(constraints.num_labels, constraints.pairs + constraints.ties)
    unit_of_label, groups, fixed = _groups(constraints, root)
    uncalled = ((n, why) for n, why in traced.uncalled.items() if n not in constraints.layers)
    fixed = (*fixed, *uncalled)
    for index, graph_module in enumerate(traced.graphs):
        for node in graph_module.graph.nodes:  # stays with the node when the graph is rewritten
            node.meta["labelled"] = propagation.outputs.get((index, node.name))
    modules = layers_by_name(traced.train, constraints.scales)
    layers = tuple(
        _layer(name, modules[name], use, unit_of_label) for name, use in constraints.layers.items()
    )
    layer_macs = sum(
        la.macs_per_pair * len(la.out_units) * len(la.in_units) // la.conv_groups for la in layers
    )
    # The remainder, below 0 where layers share a weight: whatever is counted twice or computed is held whole.
    other_params = traced.params - sum(
        la.params_per_pair * len(la.out_units) * len(la.in_units) // la.conv_groups
        + la.params_per_out * len(la.out_units)
        for la in layers
    )
    return ChannelGraph(
        traced,
        ChannelGroups(groups, layers, fixed, traced.macs - layer_macs, other_params),
        unit_of_label,
        propagation,
    )


def _components(size: int, pairs: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Smallest member of each element's connected component. [size], int64.

    Hooking to the smaller root and pointer jumping, in whole-array steps: a constant number of passes in practice.
    """
    root = np.arange(size)
    if not pairs:
        return root
    a = np.concatenate([p[0] for p in pairs])
    b = np.concatenate([p[1] for p in pairs])
    while True:
        ra, rb = root[a], root[b]
        open_ = ra != rb
        if not open_.any():
            return root
        low, high = np.minimum(ra, rb)[open_], np.maximum(ra, rb)[open_]
        np.minimum.at(root, high, low)
        while True:
            jumped = root[root]
            if np.array_equal(jumped, root):
                break
            root = jumped


def _groups(
    c: Constraints, root: np.ndarray
) -> tuple[np.ndarray, tuple[ChannelGroup, ...], tuple[tuple[str, str], ...]]:
    """Units are components of labels; a group is the set of producers that share units."""
    names = list(c.producers)
    axis_of_root = np.full(c.num_labels, -1)
    axis_pairs = []
    for axis, name in enumerate(names):
        roots = root[c.producers[name]]
        seen = axis_of_root[roots]
        shared = np.unique(seen[seen >= 0])
        axis_pairs += [(np.array([axis]), np.array([other])) for other in shared]
        axis_of_root[roots] = axis
    axis_root = _components(len(names), axis_pairs)

    reasons = _reasons(c, root)
    residual = np.zeros(c.num_labels, dtype=bool)
    for labels in c.residual:
        residual[root[labels]] = True
    residual[NONE] = False

    unit_of_root = np.full(c.num_labels, FIXED)
    groups, fixed, start = [], [], 0
    for axis in np.unique(axis_root):
        producers = [names[i] for i in np.flatnonzero(axis_root == axis)]
        roots = [root[c.producers[name]] for name in producers]
        every = np.unique(
            np.concatenate(roots)
        )  # ascending: the order of the first producer's channels
        reason = next((reasons[r] for r in every if r in reasons), None)
        if reason is not None:
            fixed += [(name, reason) for name in producers]
            continue
        unit_of_root[every] = np.arange(start, start + len(every))
        per_unit = max(int(np.unique(r, return_counts=True)[1].max()) for r in roots)
        groups.append(
            ChannelGroup(
                producers[0],
                start,
                len(every),
                tuple(producers),
                (),
                (),
                bool(residual[every].any()),
                per_unit,
            )
        )
        start += len(every)
    unit_of_label = unit_of_root[root]
    unit_of_label[NONE] = FIXED
    return unit_of_label, _with_layers(groups, c, unit_of_label), tuple(fixed)


def _reasons(c: Constraints, root: np.ndarray) -> dict[int, str]:
    reasons: dict[int, str] = {NONE: "it is joined with channels that are not of a prunable layer"}
    for labels, reason in c.fixed:
        for r in np.unique(root[labels]).tolist():
            if r != NONE or len(reasons) == 0:
                reasons.setdefault(r, reason)
    return reasons


def _with_layers(
    groups: list[ChannelGroup], c: Constraints, unit_of_label: np.ndarray
) -> tuple[ChannelGroup, ...]:
    group_of_unit = np.repeat(np.arange(len(groups)), [g.size for g in groups])
    followers: list[list[str]] = [[] for _ in groups]
    consumers: list[list[str]] = [[] for _ in groups]

    def touched(labels: np.ndarray) -> np.ndarray:
        units = unit_of_label[labels]
        return np.unique(group_of_unit[units[units != FIXED]])

    for name, use in c.layers.items():
        through = name not in c.producers
        for g in touched(use.inputs):
            (followers if through else consumers)[g].append(name)
    return tuple(
        ChannelGroup(
            g.name,
            g.start,
            g.size,
            g.producers,
            tuple(followers[i]),
            tuple(consumers[i]),
            g.residual,
            g.channels_per_unit,
        )
        for i, g in enumerate(groups)
    )


def _layer(name: str, module: nn.Module | Scale, use: LayerUse, unit_of_label: np.ndarray) -> Layer:
    out_units, in_units = unit_of_label[use.out], unit_of_label[use.inputs]
    if isinstance(module, Scale):
        return Layer(name, "bn", out_units, in_units, 1, False, 0, 0, 1)
    if is_channelwise(module):
        own = sum(p is not None for p in module._parameters.values())
        return Layer(name, "bn", out_units, in_units, 1, False, 0, 0, own)
    bias = int(module.bias is not None)
    if isinstance(module, nn.Linear):
        return Layer(name, "linear", out_units, in_units, 1, False, use.positions, 1, bias)
    volume = int(np.prod(module.kernel_size))
    return Layer(
        name,
        "conv",
        out_units,
        in_units,
        module.groups,
        use.depthwise,
        volume * use.positions,
        volume,
        bias,
    )
