"""Joins convolutions with the norms that follow them, in a gated network whose graph nobody analyses any more."""

from __future__ import annotations

from types import ModuleType

from torch import fx

from .gated_layers import FrozenConv, FusedConvNorm, FusedNorm


def fuse_convs(net: fx.GraphModule, ops: ModuleType) -> None:
    """Makes one `FusedConvNorm` of every `FusedNorm` and the fast convolution that it alone reads, in place.

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
        if not isinstance(conv, FrozenConv) or not conv.fast or len(source.users) != 1:
            continue
        if source in node.args[1:] or len(source.args) != 1 or source.kwargs:
            continue
        places = (source.target, node.target)
        if places not in fused:  # a layer that is called twice stays one layer
            fused[places] = f"_conv{node.target}"
            while fused[places] in modules:
                fused[places] += "_"
            modules[fused[places]] = FusedConvNorm(conv, norm, ops)
            net.add_submodule(fused[places], modules[fused[places]])
        node.target, node.args = fused[places], (source.args[0], *node.args[1:])
        net.graph.erase_node(source)
    net.graph.lint()
    net.recompile()


def _module(node: object, modules: dict[str, object]) -> object:
    if not isinstance(node, fx.Node) or node.op != "call_module":
        return None
    return modules[node.target]
