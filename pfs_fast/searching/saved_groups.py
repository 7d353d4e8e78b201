"""Channel groups and a history out of a file that may be damaged: every value is checked before it is used."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..graph.groups import FIXED, ChannelGroup, ChannelGroups, Layer

_KINDS = ("conv", "linear", "bn")
_HISTORY = {"step", "loss", "mean_gate", "alive", "seconds"}
_MOST = 2**62  # what a cost may be


def read_groups(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> ChannelGroups:
    """The groups and layers of a search's file.

    Args:
        tensors: Of the file; ``layer.<i>.out_units`` and ``layer.<i>.in_units`` of every layer. [channels], int64.
        meta: Of the file; its "groups", "layers", "fixed" and "other".

    Raises:
        ValueError: Something has another form, or does not fit the rest. KeyError: It is missing.
    """
    groups = tuple(_group(entry) for entry in _list("groups", meta["groups"]))
    *starts, num_units = itertools.accumulate((group.size for group in groups), initial=0)
    _must([group.start for group in groups] == starts, "groups that follow each other")
    _must(len({group.name for group in groups}) == len(groups), "a name for each group")
    layers = tuple(
        _layer(i, entry, tensors, num_units)
        for i, entry in enumerate(_list("layers", meta["layers"]))
    )
    _must(len({layer.name for layer in layers}) == len(layers), "a name for each layer")
    fixed = tuple(tuple(pair) for pair in _list("fixed", meta["fixed"]))
    _must(all(len(p) == 2 and all(map(_is_text, p)) for p in fixed), "pairs of texts in fixed")
    other = _list("other", meta["other"])
    _must(len(other) == 2 and all(_is_int(n, -_MOST) for n in other), "two integers in other")
    return ChannelGroups(groups, layers, fixed, *other)


def read_history(entries: Any) -> list[dict[str, Any]]:
    """Entries of a history, as the search writes them.

    Raises:
        ValueError: Not a list of them.
    """
    good = all(
        isinstance(entry, dict)
        and entry.keys() >= _HISTORY
        and _is_int(entry["step"])
        and isinstance(entry.get("ended", ""), str)
        and all(
            is_number(value) or (value is None and name.endswith("_change"))
            for name, value in entry.items()
            if name != "ended"
        )
        for entry in _list("history", entries)
    )
    _must(good, "a history of steps with numbers")
    return entries


def read_counts(name: str, values: Any, least: int = 0) -> tuple[int, ...]:
    """A list of integers.

    Raises:
        ValueError: Something else.
    """
    _must(all(_is_int(value, least) for value in _list(name, values)), f"integers in {name}")
    return tuple(values)


def _group(entry: Any) -> ChannelGroup:
    _must(_has_fields(entry, [f.name for f in fields(ChannelGroup)]), "the fields of a group")
    for name in ("producers", "followers", "consumers"):
        _must(all(map(_is_text, _list(name, entry[name]))), f"names in {name}")
    _must(
        _is_text(entry["name"])
        and _is_int(entry["start"])
        and _is_int(entry["size"], 1)
        and _is_int(entry["channels_per_unit"], 1)
        and isinstance(entry["residual"], bool),
        "a group with a name, sizes and a flag",
    )
    return ChannelGroup(**{k: tuple(v) if isinstance(v, list) else v for k, v in entry.items()})


def _layer(index: int, entry: Any, tensors: Mapping[str, Tensor], num_units: int) -> Layer:
    plain = [f.name for f in fields(Layer) if not f.name.endswith("_units")]
    _must(_has_fields(entry, plain), "the fields of a layer")
    _must(
        _is_text(entry["name"])
        and entry["kind"] in _KINDS
        and isinstance(entry["depthwise"], bool)
        and _is_int(entry["conv_groups"], 1)
        and all(_is_int(entry[f"{n}"]) for n in plain if n.startswith(("macs_", "params_"))),
        "a layer with a name, a kind and costs",
    )
    sides = ["out_units"] if entry["kind"] == "bn" else ["out_units", "in_units"]
    units = [tensors[f"layer.{index}.{side}"] for side in sides]
    for side in units:
        _must(
            side.dtype == torch.int64
            and side.dim() == 1
            and bool(((side >= FIXED) & (side < num_units)).all()),
            f"units of layer {entry['name']} in {FIXED}..{num_units - 1}, int64 [channels]",
        )
    return Layer(out_units=units[0].numpy(), in_units=units[-1].numpy(), **entry)


def _has_fields(entry: Any, names: list[str]) -> bool:
    return isinstance(entry, dict) and set(entry) == set(names)


def _list(name: str, value: Any) -> Sequence[Any]:
    _must(isinstance(value, list | tuple), f"a list in {name}")
    return value


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_int(value: Any, least: int = 0) -> bool:
    return type(value) is int and least <= value < _MOST


def is_number(value: Any) -> bool:
    """A finite number."""
    return _is_int(value, -_MOST) or (type(value) is float and math.isfinite(value))


def _must(good: bool, rule: str) -> None:
    if not good:
        raise ValueError(f"it must have {rule}")
