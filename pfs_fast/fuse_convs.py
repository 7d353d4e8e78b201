"""Joins convolutions with the norms that follow them, in a gated network whose graph nobody analyses any more."""

from __future__ import annotations

import operator
from types import ModuleType

from torch import fx, nn

from .gated_layers import (
    BranchedConvNorm,
    ChainedConvNorm,
    FrozenConv,
    FusedConvNorm,
    FusedNorm,
    RecomputedConvNorm,
)

MANY_CONVS = 40
"""Convolutions of a network of which two more in the backward pass are a small part."""


def fuse_convs(net: fx.GraphModule, ops: ModuleType) -> None:
    """Makes one layer of every `FusedNorm` and the convolution that it alone reads, where one is better than two, in place.

    A `FusedConvNorm` of a fast convolution; a `RecomputedConvNorm` of one that reads the images, or that ends in no activation, as
    those of shortcuts do.

    Args:
        net: Graph of a gated network. Its modules may still be narrowed afterwards, since none is copied.
        ops: ``pfs_fast.ops`` or ``pfs_fast.ops.reference``.
    """
    modules = dict(net.named_modules(remove_duplicate=False))
    fused: dict[tuple[str, str], str] = {}
    for node in list(net.graph.nodes):
        norm = _module(node, modules)
        if not isinstance(norm, FusedNorm):
            continue
        source = node.args[0]
        conv = _module(source, modules)
        if not isinstance(conv, FrozenConv) or len(source.users) != 1:
            continue
        if source in node.args[1:] or len(source.args) != 1 or source.kwargs:
            continue
        shortcut = norm.act == "identity" and len(node.all_input_nodes) == 1 and not conv.fast
        again = shortcut or source.args[0].op == "placeholder"
        if not (conv.fast or again):
            continue
        places = (source.target, node.target)
        if places not in fused:  # a layer that is called twice stays one layer
            kind = RecomputedConvNorm if again else FusedConvNorm
            fused[places] = _add(net, modules, f"_conv{node.target}", kind(conv, norm, ops))
        node.target, node.args = fused[places], (source.args[0], *node.args[1:])
        net.graph.erase_node(source)
    _chain_first(net, modules, ops)
    _pass_inputs_on(net, modules, ops)
    net.graph.lint()
    net.recompile()


def _chain_first(net: fx.GraphModule, modules: dict[str, nn.Module], ops: ModuleType) -> None:
    """Lets the first gated layer keep the images, where it and the layer before it are two of many."""
    if sum(isinstance(module, FrozenConv) for module in net.modules()) < MANY_CONVS:
        return
    for node in list(net.graph.nodes):
        layer = _module(node, modules)
        if type(layer) is not FusedConvNorm or len(node.args) != 1:
            continue
        source = node.args[0]
        first = _module(source, modules)
        if type(first) is not RecomputedConvNorm or first.norm.gated or not first.pays():
            continue
        if source.args[0].op != "placeholder" or len(source.args) != 1:
            continue
        if sum(user.target == node.target for user in net.graph.nodes) > 1:
            continue  # called elsewhere, with an input of its own
        chained = ChainedConvNorm(first, layer.layer, layer.norm, ops)
        node.target = _add(net, modules, f"_chained{node.target}", chained)
        node.args = (source, source.args[0])


def _pass_inputs_on(net: fx.GraphModule, modules: dict[str, nn.Module], ops: ModuleType) -> None:
    """Lets whatever reads the input of a `FusedConvNorm` after it take that input from it.

    The gradients of both, as at the two ends of a residual block, are then added in the pass that makes one of them.
    """
    branched: dict[str, str] = {}
    places = {node: place for place, node in enumerate(net.graph.nodes)}
    for node in list(net.graph.nodes):
        layer = _module(node, modules)
        if type(layer) is not FusedConvNorm:
            continue
        source = node.args[0]
        later = [user for user in source.users if user in places and places[user] > places[node]]
        if not later or source in node.args[1:]:
            continue
        if node.target not in branched:
            passing = BranchedConvNorm(layer.layer, layer.norm, ops)
            name = _add(net, modules, f"_branched{node.target}", passing)
            branched[node.target] = name
        node.target = branched[node.target]
        with net.graph.inserting_after(node):
            output = net.graph.call_function(operator.getitem, (node, 0))
            again = net.graph.call_function(operator.getitem, (node, 1))
        node.replace_all_uses_with(
            output, delete_user_cb=lambda user, o=output, a=again: user not in (o, a)
        )
        for user in later:
            user.replace_input_with(source, again)


def _add(net: fx.GraphModule, modules: dict[str, nn.Module], name: str, module: nn.Module) -> str:
    """Adds a module under a name that no other has, which is returned."""
    while name in modules:
        name += "_"
    modules[name] = module
    net.add_submodule(name, module)
    return name


def _module(node: object, modules: dict[str, object]) -> object:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return modules[node.target]
