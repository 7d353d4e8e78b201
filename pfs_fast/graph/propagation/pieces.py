"""Operations that take pieces: slices, splits, single channels.

A piece that starts and ends at numbers in the code holds the channels up to there fixed; one whose ends are computed from
the number of channels ties the pieces, each of which must keep as many.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from .call import Call
from .movement import channels_of, cut, scaled_dims
from .sizes import FACTORS
from .values import Value

Piece = tuple[torch.Tensor, ...]  # indices of one output, for every factor


def pieces(call: Call) -> Any:
    if len(call.values) != 1:
        return call.not_understood()
    x = call.values[0]
    try:
        moved = [channels_of(call, x, factor) for factor in FACTORS]
    except Exception:  # numbers in the code that other numbers of channels do not fit
        return cut(call)
    several = isinstance(moved[0], (tuple, list))
    outputs = moved if several else [(m,) for m in moved]
    if len({len(o) for o in outputs}) > 1:
        return cut(call)
    found = [_piece(x, piece) for piece in zip(*outputs, strict=True)]
    if any(f is None for f in found):
        return cut(call)
    size = len(x.labels)
    ends = [end for _, its_ends in found for end in its_ends]
    fixed = np.zeros(size, dtype=bool)
    step = size
    for kind, position in ends:
        if kind == "number":
            fixed[:position] = True
        elif kind == "from the end":
            fixed[position:] = True
        elif kind == "share":
            step = math.gcd(step, position)
    if fixed.any() and step < size:
        return cut(call)
    if fixed.any():
        call.constraints.fix(
            x.labels[fixed],
            f"'{call.node.name}' ({call.name}) cuts the channels at fixed places",
        )
    if step < size:
        call.constraints.tie(x.labels.reshape(-1, step))
    results = [value for value, _ in found]
    return type(moved[0])(results) if several else results[0]


def index_select(call: Call) -> Any:
    """Positions may be picked by number, channels not."""
    x = call.values[0]
    dim = call.argument(1, "dim", "axis")
    others = call.values[1:]
    if x.dim is None or any(v.dim is not None for v in others) or not isinstance(dim, int):
        return call.not_understood()
    if dim % len(x.shape) == x.dim:
        return cut(call)
    return Value(call.shape, x.dim, x.labels, x.zero)


def _piece(x: Value, piece: Piece) -> tuple[Value, list[tuple[str, int]]] | None:
    """One output and how its ends were found, or None where it is not understood."""
    sequences = [_sequence(p) for p in piece]
    if any(s is None for s in sequences):
        return None
    shape, size = tuple(piece[0].shape), len(x.labels)
    dims = scaled_dims(shape, [tuple(p.shape) for p in piece[1:]])
    sizes = [size * factor for factor in FACTORS]
    if all(np.array_equal(s, np.arange(n)[::-1]) for s, n in zip(sequences, sizes, strict=True)):
        return (Value(shape, dims[-1], x.labels[::-1], x.zero), []) if dims else None
    if any((np.diff(s) != 1).any() for s in sequences):
        return None
    first = [int(s[0]) for s in sequences]
    last = [int(s[-1]) + 1 for s in sequences]
    ends = [_end(first, sizes), _end(last, sizes)]
    if None in ends:
        return None
    kinds = {kind for kind, _ in ends}
    if not dims:  # as many for any number of channels, or a number less than all of them
        if "share" in kinds:
            return None
        dim = _grown_dim(piece)
        whole = Value(shape) if dim is None else Value(shape, dim, x.labels[sequences[0]], x.zero)
        return whole, ends
    return Value(shape, dims[-1], x.labels[sequences[0]], x.zero), ends


def _sequence(channels: torch.Tensor) -> np.ndarray | None:
    """Channels along the one dimension in which they vary."""
    if channels.numel() == 0:
        return None
    varying = [
        d
        for d in range(channels.dim())
        if channels.size(d) > 1
        and channels.stride(d) != 0
        and bool((channels.select(d, 0) != channels.select(d, 1)).any())
    ]
    if len(varying) > 1:
        return None
    if not varying:
        return channels.flatten()[:1].numpy()
    index = tuple(slice(None) if d == varying[0] else 0 for d in range(channels.dim()))
    return channels[index].numpy()


def _grown_dim(piece: Piece) -> int | None:
    """The dimension that grows by as many channels as there are more of, None where none does."""
    shapes = [tuple(p.shape) for p in piece]
    grown = [d for d in range(len(shapes[0])) if len({shape[d] for shape in shapes}) > 1]
    return grown[0] if len(grown) == 1 else None


def _end(positions: list[int], sizes: list[int]) -> tuple[str, int] | None:
    """What an end of a piece is: a number in the code, a number from the end, a share of the channels, or free."""
    at = positions[0]
    if not any(positions) or positions == sizes:
        return "free", at
    if all(p == at * f for p, f in zip(positions, FACTORS, strict=True)):
        return "share", at
    if all(p == at for p in positions):
        return "number", at
    if all(n - p == sizes[0] - at for p, n in zip(positions, sizes, strict=True)):
        return "from the end", at
    return None
