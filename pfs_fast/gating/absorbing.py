"""Where a gate at exactly 0 stays there, and its channel is exactly 0 wherever channels mix.

At a gate of 0 before ReLU the gradients of the cross-entropy (ReLU'(0) = 0) and of the regulariser (sign(0) = 0) vanish, and
Adam's momentum points below 0: the gate is dead for good. Whether that holds for a group is decided here from the gated
graph, never assumed; SiLU and Hardswish, a residual sum without ReLU, or a batch norm with a shift further down do not absorb.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.conv import _ConvNd
from torchvision.ops import FrozenBatchNorm2d

from ..graph import rules
from ..graph.groups import ChannelGroup, ChannelGroups
from ..graph.narrow import NORMS
from .gated import FrozenConv, FusedNorm, GatedNetwork, GatedOutput

_ABSORBING_ACTS = frozenset({"relu", "relu6"})


def absorbing_groups(
    network: GatedNetwork, groups: ChannelGroups, unit_of_label: np.ndarray
) -> frozenset[str]:
    """Names of the groups whose dead channels can be left out of the train-mode network without changing any gate.

    Args:
        network: The gated network, before any channel was left out.
        groups: Its gated groups.
        unit_of_label: Unit of each label in the numbering of ``groups``. [num_labels], int64.
    """
    graph = _Graph(network, groups, unit_of_label)
    return frozenset(group.name for group in groups.groups if graph.absorbs(group))


class _Graph:
    def __init__(
        self, network: GatedNetwork, groups: ChannelGroups, unit_of_label: np.ndarray
    ) -> None:
        self._nodes = list(network.train_net.graph.nodes)
        # A norm with an activation inside (see functional) is in the graph under two names.
        self._modules = dict(network.train_net.named_modules(remove_duplicate=False))
        self._layers = {layer.name: layer for layer in groups.layers}
        self._unit_of_label = unit_of_label

    def absorbs(self, group: ChannelGroup) -> bool:
        """With the gates of ``group`` at 0: all its mixing layers read zeros, and no gate of it gets a gradient."""
        if any(n.op == "get_attr" and self._carries(n, group) for n in self._nodes):
            return (
                False  # a parameter of the forward itself, which the graph holds beside its module
            )
        zero = self._zero(group)
        for node in self._nodes:
            reads = [s for s in node.all_input_nodes if s in zero]
            if self._mixes(node) and not all(zero[s] for s in reads):
                return False
        reached = self._gradients(group, zero)
        sites = [n for n in zero if self._is_site(n)]
        return bool(sites) and all(
            (self._act(n) in _ABSORBING_ACTS and zero[n]) or not reached[n] for n in sites
        )

    def _zero(self, group: ChannelGroup) -> dict[fx.Node, bool]:
        """For each node that carries channels of the group: are they exactly 0?"""
        zero: dict[fx.Node, bool] = {}
        for node in self._nodes:
            if not self._carries(node, group):
                continue
            sources = [s for s in node.all_input_nodes if s in zero]
            module, name = self._module(node), self._name(node)
            if isinstance(module, FusedNorm):
                residual = [s for s in node.args[1:] if isinstance(s, fx.Node)]
                rest_zero = all(zero.get(s, False) for s in residual)
                # Running statistics forget a dead channel only slowly, so in eval mode its zeros would not stay zeros.
                through = (
                    zero.get(node.args[0], False) and _no_shift(module.bn) and not module.track
                )
                inner = self._is_site(node) or through
                zero[node] = inner and rest_zero
            elif isinstance(module, GatedOutput):
                zero[node] = True
            elif isinstance(module, NORMS):
                affine = not isinstance(module, FrozenBatchNorm2d)  # which shifts by its mean
                zero[node] = affine and zero.get(node.args[0], False) and _no_shift(module)
            elif self._depthwise(node):
                zero[node] = zero.get(node.args[0], False) and _no_shift(_conv(module))
            elif not sources or self._mixes(node) or name in rules.LIFTING:
                zero[node] = False
            elif name in rules.MULTIPLICATIVE:
                zero[node] = any(zero[s] for s in sources)
            elif name in rules.ADDITIVE | rules.EXTREMES:
                operands = (*node.args, *node.kwargs.values())
                zero[node] = all(
                    zero.get(a, False) if isinstance(a, fx.Node) else a == 0 for a in operands
                )
            else:
                zero[node] = all(zero[s] for s in sources)
        return zero

    def _gradients(self, group: ChannelGroup, zero: dict[fx.Node, bool]) -> dict[fx.Node, bool]:
        """For each node that carries channels of the group: may a gradient reach its output?"""
        reached: dict[fx.Node, bool] = {}
        for node in reversed(self._nodes):
            if node in zero:
                reached[node] = any(self._passes_back(user, zero, reached) for user in node.users)
        return reached

    def _passes_back(
        self, user: fx.Node, zero: dict[fx.Node, bool], reached: dict[fx.Node, bool]
    ) -> bool:
        if self._mixes(user) or user not in zero:
            return True
        act = self._act(user) if isinstance(self._module(user), FusedNorm) else self._name(user)
        if act in _ABSORBING_ACTS and zero[user]:
            return False
        return reached[user]

    # -- what a node is --------------------------------------------------------------------------------------------

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _name(self, node: fx.Node) -> str:
        if node.op not in ("call_module", "call_function", "call_method"):
            return ""
        return rules.plain_name(node, self._module(node))

    def _is_site(self, node: fx.Node) -> bool:
        module = self._module(node)
        return isinstance(module, GatedOutput) or (isinstance(module, FusedNorm) and module.gated)

    def _act(self, node: fx.Node) -> str:
        module = self._module(node)
        return module.act if isinstance(module, FusedNorm) else "identity"

    def _mixes(self, node: fx.Node) -> bool:
        module = self._module(node)
        if isinstance(module, GatedOutput):
            module = module.layer
        return isinstance(module, (FrozenConv, _ConvNd, nn.Linear)) and not self._depthwise(node)

    def _depthwise(self, node: fx.Node) -> bool:
        conv = _conv(self._module(node))
        return isinstance(conv, _ConvNd) and conv.groups == conv.in_channels > 1

    def _carries(self, node: fx.Node, group: ChannelGroup) -> bool:
        value = node.meta.get("labelled")
        if value is None or value.dim is None:
            return False
        units = self._unit_of_label[value.labels]
        return bool(((units >= group.start) & (units < group.start + group.size)).any())


def _conv(module: nn.Module | None) -> nn.Module | None:
    if isinstance(module, GatedOutput):
        module = module.layer
    return module.conv if isinstance(module, FrozenConv) else module


def _no_shift(module: nn.Module) -> bool:
    """No bias, or one that is 0: zeros stay zeros."""
    return module.bias is None or not bool(torch.count_nonzero(module.bias))
