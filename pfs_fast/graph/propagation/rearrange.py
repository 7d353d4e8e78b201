"""Operations that regroup channels by a fixed factor: shuffles, pixel shuffles, gated linear units."""

from __future__ import annotations

from typing import Any

import numpy as np

from .call import Call
from .values import Value


def channel_shuffle(call: Call) -> Any:
    """[groups, channels] -> [channels, groups]: every group must keep the same positions."""
    x = call.values[0]
    groups = _factor(call, "groups")
    if groups is None or x.dim != 1 or len(x.labels) % groups:
        return call.not_understood()
    rows = x.labels.reshape(groups, -1)
    call.constraints.tie(rows)
    return Value(call.shape, 1, rows.T.reshape(-1), x.zero)


def pixel_shuffle(call: Call) -> Any:
    """Every ``factor ** 2`` channels become one, which is left out with all of them."""
    x = call.values[0]
    factor = _factor(call, "upscale_factor")
    if factor is None or x.dim != len(x.shape) - 3 or len(x.labels) % factor**2:
        return call.not_understood()
    columns = x.labels.reshape(-1, factor**2).T
    call.constraints.tie(columns)
    return Value(call.shape, x.dim, columns[0], x.zero)


def pixel_unshuffle(call: Call) -> Any:
    """Every channel becomes ``factor ** 2`` side by side."""
    x = call.values[0]
    factor = _factor(call, "downscale_factor")
    if factor is None or x.dim != len(x.shape) - 3:
        return call.not_understood()
    return Value(call.shape, x.dim, np.repeat(x.labels, factor**2), x.zero)


def glu(call: Call) -> Any:
    """The first half times the sigmoid of the second: both must keep the same positions."""
    x = call.values[0]
    dim = call.module.dim if call.module is not None else call.argument(1, "dim", default=-1)
    if not isinstance(dim, int) or dim % len(x.shape) != x.dim:
        return call.not_understood()
    halves = x.labels.reshape(2, -1)
    call.constraints.tie(halves)
    return Value(call.shape, x.dim, halves[0], x.zero)


def _factor(call: Call, name: str) -> int | None:
    """The number that an operation is called with, or that its module holds; None for one that was computed."""
    if len(call.values) != 1:
        return None
    factor = call.argument(1, name) if call.module is None else getattr(call.module, name)
    computed = any(n is not call.node.args[0] for n in call.node.all_input_nodes)
    return None if computed or not isinstance(factor, int) else factor
