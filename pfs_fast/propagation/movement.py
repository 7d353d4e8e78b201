"""Operations that move elements and compute none: views, permutations, pieces.

The operation itself is run on a tensor of channel indices, and where they come out is where the channels went. A slim
network runs the same code with fewer channels, so a size that is a number in the code cannot follow them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from .call import Call
from .values import NONE, Value


def movement(call: Call) -> Any:
    if len(call.values) != 1:
        return call.not_understood()
    node, name, x = call.node, call.name, call.values[0]
    view = [1] * len(x.shape)
    view[x.dim] = -1
    channels = torch.arange(len(x.labels)).view(view).expand(x.shape)
    rest = fx.map_arg(node.args[1:], lambda n: n.meta["val"])
    plain = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
    try:
        if name == "view":  # the tensor of indices may be strided otherwise than the real one
            moved = channels.reshape(*rest, **plain)
        else:
            moved = call.run((channels, *rest), plain)
    except Exception as error:
        return call.refuse(f"'{node.name}' could not be followed ({error})")
    outputs = moved if isinstance(moved, (tuple, list)) else (moved,)
    results = [_settle(call, x, out) for out in outputs]
    cut = f"'{node.name}' ({name}) cuts the channels at fixed places"
    if any(r is None for r in results):
        return call.refuse(cut)
    if (
        isinstance(moved, (tuple, list))
        and results[0].dim is not None
        and len(results[0].labels) < len(x.labels)
    ):
        # Pieces of equal size: each must keep as many channels as the others.
        if name not in ("chunk", "tensor_split") or len({len(r.labels) for r in results}) > 1:
            return call.refuse(cut)
        call.constraints.tie([r.labels for r in results])
    return type(moved)(results) if isinstance(moved, (tuple, list)) else results[0]


def _settle(call: Call, x: Value, moved: torch.Tensor) -> Value | None:
    """The moved channels as a ``Value``, or None where a slim network could not repeat the move."""
    shape = tuple(moved.shape)
    varying = [d for d in range(moved.dim()) if _varies(moved, d)]
    if not varying:
        label = int(x.labels[int(moved.flatten()[0])]) if moved.numel() else NONE
        if label != NONE and len(x.labels) > 1:
            return None  # one channel picked by its index
        ones = [d for d in range(len(shape)) if shape[d] == 1]
        return (
            Value(shape)
            if label == NONE
            else Value(shape, ones[0] if ones else None, x.labels[:1] * 0 + label, x.zero)
        )
    free = [d for d in varying if _size_is_free(call, d, shape, x)]
    if not free:
        return None
    dim = free[-1]
    index = tuple(slice(None) if d == dim else 0 for d in range(len(shape)))
    channels = moved[index]
    if call.name == "getitem" and not torch.equal(channels, torch.arange(len(x.labels))):
        return None  # a slice of the channels
    labels = x.labels[channels.numpy()]
    if len(varying) > 1:
        # The channels are split over several dimensions (a shuffle): every row must keep the same positions.
        rows = moved.movedim(dim, -1).reshape(-1, len(labels)).unique(dim=0).numpy()
        call.constraints.tie([labels, *(x.labels[row] for row in rows)])
    return Value(shape, dim, labels, x.zero)


def _varies(channels: torch.Tensor, dim: int) -> bool:
    if channels.size(dim) <= 1 or channels.stride(dim) == 0:
        return False
    return not bool((channels == channels.select(dim, 0).unsqueeze(dim)).all())


def _size_is_free(call: Call, dim: int, shape: tuple[int, ...], x: Value) -> bool:
    """Whether the output size along ``dim`` follows the channels: computed from them, -1 or implied, not a number."""
    node, name = call.node, call.name
    if name == "unflatten":
        return False
    if name not in ("view", "reshape", "expand"):
        return True
    sizes = node.args[1:] or (node.kwargs.get("shape") or node.kwargs.get("size"),)
    if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)):
        sizes = sizes[0]
    if len(sizes) == 1 and isinstance(sizes[0], fx.Node):
        # a whole shape that was computed
        return name != "expand" and call.walk.counts_channels(sizes[0], x)
    if len(sizes) != len(shape):
        return False
    return (
        sizes[dim] == -1
        if not isinstance(sizes[dim], fx.Node)
        else call.walk.counts_channels(sizes[dim], x)
    )
