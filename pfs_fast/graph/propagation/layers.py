"""Layers: what makes channels, what they pass through one by one, what mixes them."""

from __future__ import annotations

import math

import numpy as np
from torch.nn.modules.conv import _ConvTransposeNd

from ..narrow import widths_of
from .call import Call
from .constraints import LayerUse
from .values import Value, labelled


def convolution(call: Call) -> Value:
    module, name, shape = call.module, call.node.target, call.shape
    x = _input(call)
    dim = len(shape) - len(module.kernel_size) - 1
    # A transposed convolution multiplies at every position of its input.
    positions = _positions(call, x.shape if isinstance(module, _ConvTransposeNd) else shape, dim)
    if module.groups == module.in_channels and module.groups > 1:
        # Depthwise. A depth multiplier gives every input channel several outputs, side by side.
        read = _read(call, x, dim, module.in_channels)
        out = np.repeat(read, module.out_channels // module.in_channels)
        out = _use(call, out, read, positions)
        call.constraints.layers[name].depthwise = True
        return labelled(shape, dim, out)
    read = _mix(call, x, dim, module.in_channels)
    out = _produce(call, module.out_channels)
    if module.groups > 1:
        for labels in (read, out):
            call.constraints.tie(labels.reshape(module.groups, -1))
    return Value(shape, dim, _use(call, out, read, positions))


def linear(call: Call) -> Value:
    shape = call.shape
    dim = len(shape) - 1
    read = _mix(call, _input(call), dim, call.module.in_features)
    out = _produce(call, call.module.out_features)
    return Value(shape, dim, _use(call, out, read, _positions(call, shape, dim)))


def _positions(call: Call, shape: tuple[int, ...], dim: int) -> int:
    """Positions of one image, also where the batch dimension holds more than images (windows, groups)."""
    others = math.prod(size for d, size in enumerate(shape) if d != dim)
    return others // call.node.meta["images"]


def channelwise(call: Call) -> Value:
    """A norm or PReLU that takes every channel alone."""
    x = _input(call)
    read = _read(call, x, 1, widths_of(call.module)[0])
    return labelled(x.shape, 1, _use(call, read, read, 0))


def group_norm(call: Call) -> Value:
    """Channels that are normalised together live and die together: the statistics of the others then stay."""
    x, module = _input(call), call.module
    if x.dim != 1:
        return channelwise(call)
    groups = x.labels.reshape(module.num_groups, -1)
    if len(groups) == 1:
        call.constraints.fix(
            x.labels, f"layer '{call.node.target}' normalises over all of its channels together"
        )
    for column in range(1, groups.shape[1]):
        call.constraints.couple(groups[:, 0], groups[:, column])
    return channelwise(call)


def prelu(call: Call) -> Value:
    """One slope for all channels, or one for each."""
    if call.module.num_parameters == 1:
        return _input(call)
    return channelwise(call)


def _input(call: Call) -> Value:
    """What a layer is called with: ``layer(x)`` or ``layer(input=x)``."""
    return call.args[0] if call.args else call.kwargs["input"]


def _read(call: Call, x: Value, dim: int, size: int) -> np.ndarray:
    """Labels of a layer's input channels; labels in another dimension are held fixed."""
    if x.dim == dim:
        return x.labels
    if x.dim is not None:
        call.constraints.fix(
            x.labels, f"layer '{call.node.target}' reads it along another dimension"
        )
    return np.zeros(size, dtype=np.int64)


def _mix(call: Call, x: Value, dim: int, size: int) -> np.ndarray:
    read = _read(call, x, dim, size)
    if not x.zero:
        call.constraints.fix(
            read, f"a dropped channel would not be 0 where layer '{call.node.target}' reads it"
        )
    return read


def _produce(call: Call, size: int) -> np.ndarray:
    c, name = call.constraints, call.node.target
    if name not in c.producers:
        labels = c.new_labels(name, size)
        reason = call.walk.unprunable(name)
        if reason:
            c.fix(labels, reason)
    return c.producers[name]


def _use(call: Call, out: np.ndarray, read: np.ndarray, positions: int) -> np.ndarray:
    """Record a call of a layer; a second call must see the same channels."""
    c, name = call.constraints, call.node.target
    use = c.layers.get(name)
    if use is None:
        use = c.layers[name] = LayerUse(out, read)
        reason = call.walk.unprunable(name)
        if reason:
            c.fix(read, reason)
    else:
        c.couple(use.inputs, read)
        c.couple(use.out, out)
    use.positions += positions * call.walk.counts
    return out
