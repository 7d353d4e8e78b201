"""Small channel groups, random ones, and plain re-implementations to test against."""

from __future__ import annotations

import numpy as np

from pfs_fast.graph.groups import FIXED, ChannelGroup, ChannelGroups, Layer


def fixed(size: int) -> np.ndarray:
    return np.full(size, FIXED)


def conv(
    name: str,
    out: np.ndarray,
    inputs: np.ndarray,
    positions: int = 1,
    groups: int = 1,
    bias: int = 0,
) -> Layer:
    """A 3x3 convolution."""
    depthwise = groups > 1 and groups == len(inputs)
    return Layer(name, "conv", out, inputs, groups, depthwise, 9 * positions, 9, bias)


def group(name: str, start: int, size: int, channels_per_unit: int = 1) -> ChannelGroup:
    return ChannelGroup(name, start, size, (name,), (), (), False, channels_per_unit)


def chain(*sizes: int) -> ChannelGroups:
    """conv(3 -> sizes[0]) - bn - conv - bn ... - linear(-> 10)."""
    groups, layers, start, before = [], [], 0, fixed(3)
    for i, size in enumerate(sizes):
        units = start + np.arange(size)
        groups.append(group(f"conv{i}", start, size))
        layers.append(conv(f"conv{i}", units, before, positions=4))
        layers.append(Layer(f"bn{i}", "bn", units, units, 1, False, 0, 0, 2))
        before, start = units, start + size
    layers.append(Layer("fc", "linear", fixed(10), before, 1, False, 1, 1, 1))
    return ChannelGroups(tuple(groups), tuple(layers), (), other_macs=7, other_params=5)


def random_groups(seed: int, num_groups: int = 6) -> ChannelGroups:
    """Groups with every kind of layer side: whole, concatenated, flattened, depthwise, grouped, partly fixed, split."""
    rng = np.random.default_rng(seed)
    groups, layers, start = [], [], 0
    previous = fixed(int(rng.integers(1, 4)))
    for i in range(num_groups):
        size, per_unit = int(rng.integers(1, 24)), int(rng.choice([1, 1, 1, 2, 3]))
        units = start + np.arange(size)
        out = np.tile(
            units, per_unit
        )  # grouped: one channel of each unit in every convolution group
        positions = int(rng.integers(1, 50))
        if (
            rng.random() < 0.2 and size >= 4
        ):  # two producers of one half each, joined later: a group of two parts
            half = size // 2
            layers.append(conv(f"conv{i}", np.tile(units[:half], per_unit), previous, positions))
            layers.append(
                conv(f"half{i}", np.tile(units[half:], per_unit), previous, positions, bias=1)
            )
        else:
            layers.append(conv(f"conv{i}", out, previous, positions, bias=int(rng.integers(2))))
        layers.append(Layer(f"bn{i}", "bn", out, out, 1, False, 0, 0, 2))
        if per_unit > 1:
            layers.append(conv(f"grouped{i}", out, out, positions, groups=per_unit))
        if rng.random() < 0.4 and len(out) > 1:
            multiplier = int(rng.integers(1, 3))
            layers.append(
                conv(
                    f"depthwise{i}",
                    np.repeat(out, multiplier),
                    out,
                    positions,
                    groups=len(out),
                    bias=1,
                )
            )
        groups.append(group(f"conv{i}", start, size, per_unit))
        start += size
        previous = (
            out
            if rng.random() < 0.6
            else np.concatenate([previous, out, fixed(int(rng.integers(0, 3)))])
        )
    flat = np.repeat(previous, int(rng.integers(1, 5)))
    layers.append(Layer("fc", "linear", fixed(10), flat, 1, False, 1, 1, 1))
    return ChannelGroups(
        tuple(groups), tuple(layers), (), int(rng.integers(100)), int(rng.integers(100))
    )


def random_gates(seed: int, num_units: int) -> tuple[np.ndarray, np.ndarray]:
    """Gates with many exact zeros and some ties, and the steps at which they died."""
    rng = np.random.default_rng(seed)
    gates = rng.random(num_units).astype(np.float32)
    if seed % 3 == 1:
        gates = np.round(gates, 1)
    gates[rng.random(num_units) < rng.choice([0.0, 0.3, 0.9])] = 0
    died_at = np.where(gates == 0, rng.integers(-1, 30, num_units), -1).astype(np.int32)
    return gates, died_at


def plain_cost(groups: ChannelGroups, keep: np.ndarray) -> tuple[int, int]:
    """Cost by the definition, one layer and one channel at a time."""
    macs, params = groups.other_macs, groups.other_params
    for layer in groups.layers:
        out = sum(1 for unit in layer.out_units if unit == FIXED or keep[unit])
        inputs = sum(1 for unit in layer.in_units if unit == FIXED or keep[unit])
        pairs = out if layer.depthwise else out * inputs // layer.conv_groups
        macs += layer.macs_per_pair * pairs
        params += layer.params_per_pair * pairs + layer.params_per_out * out
    return macs, params
