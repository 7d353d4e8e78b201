"""Operations that bring several tensors together: sums, products, concatenations."""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import rules
from .call import Call
from .values import NONE, Value, flatten


def binary(call: Call) -> Any:
    """Two operands, broadcast: channels that meet live and die together."""
    shape, node, kwargs = call.shape, call.node, call.kwargs
    names = ("input", "other")[len(call.args) :]
    args = (*call.args[:2], *(kwargs[n] for n in names if n in kwargs))
    if len(args) < 2:
        return call.refuse(
            f"the operands of '{node.name}' are not understood", flatten((args, kwargs))
        )
    operands = _beside_scales(call, [a for a in args if isinstance(a, Value)])
    aligned = [(v, None if v.dim is None else v.dim + len(shape) - len(v.shape)) for v in operands]
    labelled = [(v, d) for v, d in aligned if d is not None]
    zero = all(v.zero and v.dim is not None for v in operands)
    if len(operands) == 1:  # the other is a number: x + 0 keeps zeros, x + 1 does not
        zero = zero and call.maps_zero_to_zero()
    if call.name in rules.MULTIPLICATIVE:
        zero = any(v.zero for v, _ in labelled)
    elif call.name in rules.DIVISION:  # 0 / x, never x / 0
        zero = isinstance(args[0], Value) and args[0].dim is not None and args[0].zero
        if isinstance(args[1], Value) and args[1].dim is not None:
            return call.refuse(f"'{node.name}' divides by a channel that may be dropped", operands)
    if len(labelled) == 1:
        (x, dim), other = labelled[0], next((v for v in operands if v.dim is None), None)
        if other is not None and _size_at(other.shape, dim, len(shape)) > 1:
            return call.refuse(f"'{node.name}' combines it with a tensor of fixed size", [x])
        if shape[dim] != len(x.labels):
            return call.refuse(f"'{node.name}' broadcasts a single channel", [x])
        return Value(shape, dim, x.labels, zero)
    if not labelled:
        return Value(shape)
    if call.constraints.is_scale(labelled[0][0].labels):  # go on with the channels, not the scale
        labelled.reverse()
    (a, dim_a), (b, dim_b) = labelled
    if dim_a == dim_b and 1 in (len(a.labels), len(b.labels)) and shape[dim_a] > 1:
        return _broadcast(call, *((a, b) if len(b.labels) == 1 else (b, a)), dim_a, zero)
    if dim_a != dim_b or len(a.labels) != len(b.labels):
        return call.refuse(
            f"'{node.name}' combines channels of different dimensions or numbers", operands
        )
    call.constraints.couple(a.labels, b.labels)
    if call.name in rules.ADDITIVE:
        call.constraints.residual += [a.labels, b.labels]
    return Value(shape, dim_a, np.where(a.labels == NONE, b.labels, a.labels), zero)


def _beside_scales(call: Call, operands: list[Value]) -> list[Value]:
    """A parameter that does not hold one number for each channel of the other operand stays whole, which the other may not."""

    def place(v: Value) -> tuple[int, int] | None:
        return None if v.dim is None else (v.dim - len(v.shape), len(v.labels))

    multiplied = call.name in rules.MULTIPLICATIVE and len(operands) > 1
    if not multiplied or place(operands[0]) == place(operands[1]):
        return operands
    settled = []
    for v in operands:
        if v.dim is not None and call.constraints.is_scale(v.labels):
            call.constraints.fix(
                v.labels, f"'{call.node.name}' multiplies it along other dimensions"
            )
            v = Value(v.shape)
        settled.append(v)
    return settled


def _broadcast(call: Call, x: Value, single: Value, dim: int, zero: bool) -> Value:
    """One channel that meets all channels of another tensor (spatial attention) always stays."""
    call.constraints.fix(single.labels, f"'{call.node.name}' broadcasts a single channel")
    if call.name in rules.MULTIPLICATIVE:
        zero = x.zero
    elif call.name not in rules.DIVISION:
        zero = False
    return Value(call.shape, dim, x.labels, zero)


def stack(call: Call) -> Any:
    """A new dimension beside the labelled one: channels that come to lie side by side stay the same."""
    tensors, shape = call.argument(0, "tensors"), call.shape
    dim = call.argument(1, "dim", default=0) % len(shape)
    first = next(v for v in tensors if v.dim is not None)
    if any(v.dim != first.dim for v in tensors):
        return call.refuse(f"'{call.node.name}' joins it with channels of another dimension")
    for v in tensors:
        call.constraints.couple(first.labels, v.labels)
    place = first.dim + (dim <= first.dim)
    return Value(shape, place, first.labels, all(v.zero for v in tensors))


def expand_as(call: Call) -> Any:
    """``x.expand_as(y)``: the channels of both are the same."""
    x, y = call.argument(0, "input"), call.argument(1, "other")
    shape = call.shape
    if not isinstance(y, Value) or x.dim is None or y.dim is None:
        return call.not_understood()
    dim = x.dim + len(shape) - len(x.shape)
    if dim != y.dim or len(x.labels) != len(y.labels):
        return call.not_understood()
    call.constraints.couple(x.labels, y.labels)
    return Value(shape, dim, np.where(x.labels == NONE, y.labels, x.labels), x.zero)


def concatenation(call: Call) -> Any:
    tensors = call.argument(0, "tensors")
    shape = call.shape
    dim = call.argument(1, "dim", "axis", default=0) % len(shape)
    labelled = [v for v in tensors if v.dim is not None]
    zero = all(v.zero for v in labelled)
    if all(v.dim == dim for v in labelled):
        parts = [
            v.labels if v.dim == dim else np.zeros(v.shape[dim], dtype=np.int64) for v in tensors
        ]
        return Value(shape, dim, np.concatenate(parts), zero)
    first = labelled[0]
    if len(labelled) < len(tensors) or any(v.dim != first.dim for v in labelled):
        return call.refuse(f"'{call.node.name}' joins it along another dimension", list(tensors))
    for v in labelled[1:]:
        call.constraints.couple(first.labels, v.labels)
    return Value(shape, first.dim, first.labels, zero)


def _size_at(shape: tuple[int, ...], dim: int, ndim: int) -> int:
    position = dim - (ndim - len(shape))
    return shape[position] if position >= 0 else 1
