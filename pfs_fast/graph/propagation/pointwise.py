"""Operations that treat every channel alone: activations, pools, means over positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .call import Call
from .values import Value, unlabelled


def zero_preserving(call: Call) -> Any:
    return call.values[0] if len(call.values) == 1 else call.not_understood()


def elementwise(call: Call) -> Any:
    """Each element alone, 0 not necessarily to 0."""
    if len(call.values) != 1:
        return call.not_understood()
    x = call.values[0]
    return Value(x.shape, x.dim, x.labels, zero=False)


def bounded(call: Call) -> Any:
    """Each element alone; f(0) depends on the arguments."""
    if len(call.values) != 1:
        return call.not_understood()
    x = call.values[0]
    return Value(x.shape, x.dim, x.labels, x.zero and call.maps_zero_to_zero())


def prelu(call: Call) -> Any:
    """The function, with one slope for all channels."""
    x, slope = call.argument(0, "input"), call.argument(1, "weight")
    plain = isinstance(slope, Value) and slope.dim is None and np.prod(slope.shape) == 1
    return x if plain else call.not_understood()


def softmax(call: Call) -> Any:
    """Over positions; over channels it would mix them."""
    if len(call.values) != 1:
        return call.not_understood()
    x = call.values[0]
    dim = call.module.dim if call.module is not None else call.argument(1, "dim")
    if not isinstance(dim, int) or dim % len(x.shape) == x.dim:
        return call.refuse(f"'{call.node.name}' normalises over channels")
    return Value(x.shape, x.dim, x.labels, zero=False)


def factory(call: Call) -> Any:
    """A new tensor that takes nothing but dtype and device from its operand."""
    return unlabelled(call.meta)


def normalising(call: Call) -> Any:
    return call.refuse(
        f"'{call.name}' ({call.node.name}) normalises over channels: with fewer the others would change"
    )


def spatial(call: Call) -> Any:
    x, meta = call.values[0], call.meta
    same_channels = (
        x.dim == 1
        and isinstance(meta, torch.Tensor)
        and meta.shape[1] == x.shape[1]
        # Without a batch dimension the channels would be positions: max_pool2d of [N, C, L] mixes them.
        and (not call.name.endswith(("1d", "2d", "3d")) or len(x.shape) == int(call.name[-2]) + 2)
    )
    return Value(call.shape, 1, x.labels, x.zero) if same_channels else call.not_understood()


def reduction(call: Call) -> Any:
    """A mean or sum over positions; over channels it would mix them."""
    if len(call.values) != 1:
        return call.not_understood()
    x = call.values[0]
    dims = call.argument(1, "dim", "axis")
    if dims is None or isinstance(dims, bool):
        return call.refuse(f"'{call.node.name}' reduces over channels")
    dims = {d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)}
    if x.dim in dims:
        return call.refuse(f"'{call.node.name}' reduces over channels")
    shape = call.shape
    dim = x.dim if len(shape) == len(x.shape) else x.dim - sum(d < x.dim for d in dims)
    return Value(shape, dim, x.labels, x.zero)


def pad(call: Call) -> Any:
    """Zeros around positions, or as channels that are not of a prunable layer."""
    x = call.values[0]
    pads = call.argument(1, "pad", default=())
    mode = call.argument(2, "mode", default="constant")
    value = call.argument(3, "value")
    spatial = 2 * (len(x.shape) - 1 - x.dim)
    if mode == "constant" and value:
        return call.refuse(f"'{call.node.name}' pads with a value that is not 0")
    if len(pads) > spatial and any(pads[:spatial]):
        return call.refuse(f"'{call.node.name}' pads channels and positions at once")
    labels = x.labels
    if len(pads) > spatial:
        before, after = pads[spatial], pads[spatial + 1]
        if before < 0 or after < 0:
            return call.refuse(f"'{call.node.name}' crops channels")
        labels = np.concatenate([np.zeros(before, np.int64), labels, np.zeros(after, np.int64)])
    return Value(call.shape, x.dim, labels, x.zero)
