"""What travels along the edges of a graph while its channels are followed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..shapes import leaves

NONE = 0  # label of "no channel of ours"


@dataclass(frozen=True)
class Value:
    """A tensor of known shape whose labels vary along one dimension at most.

    Attributes:
        shape: Sizes.
        dim: The labelled dimension, or None: no label anywhere.
        labels: Labels along ``dim``. [shape[dim]], int64.
        zero: A dropped channel is exactly 0 here, if every layer's dropped output channels are.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    labels: np.ndarray | None = None
    zero: bool = True


def labelled(shape: tuple[int, ...], dim: int, labels: np.ndarray) -> Value:
    """A value with these labels, or one without any where all are ``NONE``."""
    return Value(shape, dim, labels) if labels.any() else Value(shape)


def unlabelled(value: Any) -> Any:
    """A fake tensor (or a nest of them) as values without labels; plain numbers stay as they are."""
    if isinstance(value, torch.Tensor):
        return Value(tuple(value.shape))
    if isinstance(value, (tuple, list)) and holds_tensors(value):
        return [unlabelled(v) for v in value]
    if isinstance(value, dict):
        return {k: unlabelled(v) for k, v in value.items()}
    if holds_tensors(value):  # a dataclass
        return [unlabelled(v) for v in flatten(value)]
    return value


def holds_tensors(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in flatten(value))


def flatten(nested: Any) -> list[Any]:
    """Leaves of nested lists, tuples, dictionaries and dataclasses."""
    return leaves(nested, Value)
