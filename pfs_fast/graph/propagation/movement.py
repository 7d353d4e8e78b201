"""Operations that move elements and compute none: views, permutations, repetitions.

The operation itself is run on a tensor of channel indices, and where they come out is where the channels went. It is run
for several numbers of channels, since a slim network runs the same code with fewer.
"""

from __future__ import annotations

from typing import Any

import torch

from .call import Call
from .sizes import FACTORS
from .values import Value


def movement(call: Call) -> Any:
    if len(call.values) != 1:
        return call.not_understood()
    x = call.values[0]
    try:
        moved = channels_of(call, x, 1)
    except Exception as error:  # whatever the operation says to a tensor of indices
        return call.refuse(f"'{call.node.name}' could not be followed ({error})")
    try:
        others = [channels_of(call, x, factor) for factor in FACTORS[1:]]
    except Exception:  # a number in the code that other numbers of channels do not fit
        return cut(call)
    if isinstance(moved, (tuple, list)):
        return call.not_understood()
    result = _settle(call, x, moved, [tuple(o.shape) for o in others])
    return cut(call) if result is None else result


def cut(call: Call) -> Any:
    return call.refuse(f"'{call.node.name}' ({call.name}) cuts the channels at fixed places")


def channels_of(call: Call, x: Value, factor: int) -> Any:
    """The operation on a tensor of channel indices, with ``factor`` times as many channels as there are."""
    shape = list(x.shape)
    shape[x.dim] *= factor
    view = [1] * len(shape)
    view[x.dim] = -1
    channels = torch.arange(shape[x.dim]).view(view).expand(shape)
    args, kwargs = call.walk.sizes.at((call.node.args[1:], call.node.kwargs), x, factor)
    if call.name == "view":  # the tensor of indices may be strided otherwise than the real one
        return channels.reshape(*args, **kwargs)
    return call.run((channels, *args), kwargs)


def scaled_dims(shape: tuple[int, ...], others: list[tuple[int, ...]]) -> list[int]:
    """Dimensions that grow with the number of channels, if all the others stay; else none."""
    if any(len(other) != len(shape) for other in others):
        return []
    scaled = []
    for d, size in enumerate(shape):
        if all(o[d] == size * f for o, f in zip(others, FACTORS[1:], strict=True)):
            scaled.append(d)
        elif any(o[d] != size for o in others):
            return []
    return scaled


def _settle(
    call: Call, x: Value, moved: torch.Tensor, others: list[tuple[int, ...]]
) -> Value | None:
    """The moved channels as a ``Value``, or None where a slim network could not repeat the move."""
    shape = tuple(moved.shape)
    varying = [d for d in range(moved.dim()) if _varies(moved, d)]
    free = [d for d in scaled_dims(shape, others) if d in varying or len(x.labels) == 1]
    if not free:
        return None
    dim = free[-1]
    index = tuple(slice(None) if d == dim else 0 for d in range(len(shape)))
    labels = x.labels[moved[index].numpy()]
    if len(varying) > 1:
        # The channels are split over several dimensions (a shuffle): every row must keep the same positions.
        rows = moved.movedim(dim, -1).reshape(-1, len(labels)).unique(dim=0).numpy()
        call.constraints.tie([labels, *(x.labels[row] for row in rows)])
    return Value(shape, dim, labels, x.zero)


def _varies(channels: torch.Tensor, dim: int) -> bool:
    if channels.size(dim) <= 1 or channels.stride(dim) == 0:
        return False
    return not bool((channels == channels.select(dim, 0).unsqueeze(dim)).all())
