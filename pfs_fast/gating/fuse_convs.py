"""Joins convolutions with the norms that follow them, in a gated network whose graph nobody analyses any more."""

from __future__ import annotations

import operator
from types import ModuleType

from torch import fx, nn

from ..graph.shapes import memories
from .gated_layers import (
    BranchedConv,
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
    _pass_pixels_on(net, modules, ops)
    _pass_inputs_on(net, modules, ops)
    net.delete_all_unused_submodules()  # the parts that others now stand for
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


def _pass_pixels_on(net: fx.GraphModule, modules: dict[str, nn.Module], ops: ModuleType) -> None:
    """Lets the 1x1 convolution of a shortcut with a stride take the pixels that it reads from the convolution beside it.

    Their gradients are then added where they are, in place of a sum over the whole image.
    """
    nodes = list(net.graph.nodes)
    places = {node: place for place, node in enumerate(nodes)}
    for node in nodes:
        layer = _module(node, modules)
        if type(layer) is not RecomputedConvNorm or len(node.args) != 1:
            continue
        conv, source = layer.layer.conv, node.args[0]
        if max(conv.kernel_size) > 1 or max(conv.stride) == 1 or max(conv.padding) > 0:
            continue
        if source.op == "placeholder":
            continue  # wants no gradient
        beside = [user for user in source.users if _reads_alone(user, modules)]
        if not beside or places[beside[0]] > places[node]:
            continue
        first = beside[0]
        if any(_overwrites(other, source) for other in nodes[places[first] : places[node]]):
            continue
        branched = BranchedConv(modules[first.target], conv.stride, ops)
        dense = RecomputedConvNorm(FrozenConv(conv, ops, dense=True), layer.norm, ops)
        first.target = _add(net, modules, f"_branched{first.target}", branched)
        node.target = _add(net, modules, f"_dense{node.target}", dense)
        with net.graph.inserting_after(first):
            output = net.graph.call_function(operator.getitem, (first, 0))
            pixels = net.graph.call_function(operator.getitem, (first, 1))
        first.replace_all_uses_with(
            output, delete_user_cb=lambda user, o=output, p=pixels: user not in (o, p)
        )
        node.args = (pixels,)


def _reads_alone(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    """Whether a node is a convolution of one tensor, and of no kind that has a way of its own to add gradients."""
    layer = _module(node, modules)
    return type(layer) is FrozenConv and not layer.fast and len(node.args) == 1 and not node.kwargs


def _overwrites(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node changes the tensor of another in place."""
    written = {memory for other in node.meta["writes"] for memory in memories(other)}
    return bool(written & memories(source))


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
