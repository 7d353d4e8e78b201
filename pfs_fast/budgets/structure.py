"""The structure of a slim network: which channels every layer keeps, and what that costs."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import numpy as np

from .._json import parse_json
from ..errors import FileFormatError, StructureError
from ..graph.groups import ChannelGroups
from .cost import CostModel
from .limit_check import LimitCheck, limit_notes, limit_table, read_checks

FORMAT = "pfs_fast.structure"
VERSION = 3  # 1 had no limits, 2 no preferred multiple


@dataclass(frozen=True)
class Structure:
    """Kept channels of a model, by group and by layer. Enough to build masks or a slim network without a search.

    Attributes:
        kept: Kept units of every prunable group, ascending; positions inside the group. ``{group: indices}``.
        sizes: Number of units of every prunable group. ``{group: size}``.
        layers: Kept output channels of every convolution, linear and batch-norm layer whose outputs are prunable, and of
            parameters that scale them, ascending. ``{name of the module or parameter: indices}``.
        inputs: Kept input channels of every convolution and linear layer whose inputs are prunable, ascending.
        widths: Original ``(in, out)`` channels of every layer in ``layers`` or ``inputs``.
        macs: Multiply-accumulates of one image after slimming, exact.
        params: Parameters after slimming, exact.
        base_macs: Multiply-accumulates of one image of the whole network.
        base_params: Parameters of the whole network.
        limits: The limits that it was made for, with what became of them; empty for one that no budget made. Structures
            that keep the same channels are equal, whatever their limits.
        multiple_of: The multiple of channels that was preferred for widths (``Budget(multiple_of="auto")``); 1: none.
    """

    kept: dict[str, tuple[int, ...]] = field(repr=False)
    sizes: dict[str, int] = field(repr=False)
    layers: dict[str, tuple[int, ...]] = field(repr=False)
    inputs: dict[str, tuple[int, ...]] = field(repr=False)
    widths: dict[str, tuple[int, int]] = field(repr=False)
    macs: int
    params: int
    base_macs: int
    base_params: int
    limits: tuple[LimitCheck, ...] = field(default=(), repr=False, compare=False)
    multiple_of: int = field(default=1, repr=False, compare=False)

    @staticmethod
    def from_keep(
        groups: ChannelGroups,
        keep: np.ndarray,
        cost_model: CostModel | None = None,
        limits: tuple[LimitCheck, ...] = (),
        multiple_of: int = 1,
    ) -> Structure:
        """The structure that keeps these units.

        Args:
            groups: Channel groups of the model.
            keep: True for kept units. [num_units], bool.
            cost_model: Cost model of ``groups``, built here if not given.
            limits: What the structure was made for.
            multiple_of: The multiple of channels that was preferred.

        Raises:
            StructureError: If ``keep`` has another shape or dtype, or leaves a group or a layer without channels.
        """
        keep = np.asarray(keep)
        if keep.shape != (groups.num_units,) or keep.dtype != np.bool_:
            raise StructureError(
                f"Structure.from_keep: keep must be bool of shape [{groups.num_units}], got {keep.dtype} of shape "
                f"{list(keep.shape)}; pass one entry for each unit"
            )
        kept = {g.name: _indices(keep[g.start : g.start + g.size]) for g in groups.groups}
        cost_model = CostModel(groups) if cost_model is None else cost_model
        layers, inputs, widths = {}, {}, {}
        axes = iter(cost_model.axes.kept(keep))
        for layer in groups.layers:
            out_kept, in_kept = next(axes), next(axes)
            if out_kept is not None:
                layers[layer.name] = out_kept
            if layer.kind != "bn" and in_kept is not None:
                inputs[layer.name] = in_kept
            if layer.name in layers or layer.name in inputs:
                widths[layer.name] = (len(layer.in_units), len(layer.out_units))
        for kind, table in (("group", kept), ("layer", layers), ("input of layer", inputs)):
            for name, indices in table.items():
                if not indices:
                    raise StructureError(
                        f"Structure.from_keep: every {kind} must keep a channel, got none in {name}; keep at least one"
                    )
        macs, params = cost_model.evaluate(keep)
        sizes = {g.name: g.size for g in groups.groups}
        return Structure(
            kept, sizes, layers, inputs, widths, macs, params, *cost_model.base, limits, multiple_of
        )

    @property
    def macs_share(self) -> float:
        """Kept share of the MACs of the whole network."""
        return self.macs / self.base_macs if self.base_macs else 1.0

    @property
    def params_share(self) -> float:
        """Kept share of the parameters of the whole network."""
        return self.params / self.base_params if self.base_params else 1.0

    @property
    def off_multiple(self) -> dict[str, int]:
        """Groups whose first producer keeps neither a multiple of ``multiple_of`` channels nor all. ``{group: channels}``."""
        found = {}
        for name in self.kept:
            channels = len(self.layers.get(name, ()))
            if channels % self.multiple_of and channels != self.widths[name][1]:
                found[name] = channels
        return found

    def to_json(self, indent: int | None = None) -> str:
        """JSON text with a format name and a version; equal structures made for equal limits give equal texts."""
        separators = (",", ":") if indent is None else None
        return json.dumps(
            {"format": FORMAT, "version": VERSION, **asdict(self)},
            indent=indent,
            separators=separators,
        )

    @staticmethod
    def from_json(text: str) -> Structure:
        """The structure of a text made by ``to_json``.

        Raises:
            FileFormatError: For text that is truncated, of another format or version, or inconsistent in itself.
        """
        try:
            data = parse_json(text)
        except (TypeError, ValueError) as error:
            raise FileFormatError(
                f"Structure.from_json: text must be complete JSON, got an error ({error}); write it again with to_json"
            ) from error
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            found = data.get("format") if isinstance(data, dict) else type(data).__name__
            raise FileFormatError(
                f"Structure.from_json: format must be {FORMAT!r}, got {found!r}; pass a structure's text"
            )
        if type(data.get("version")) is not int or not 1 <= data["version"] <= VERSION:
            raise FileFormatError(
                f"Structure.from_json: version must be 1 to {VERSION}, got {data.get('version')!r}; "
                "use the release of pfs_fast that wrote it"
            )
        if data["version"] < 2:
            data.setdefault("limits", [])
        if data["version"] < 3:
            data.setdefault("multiple_of", 1)
        names = [f.name for f in fields(Structure)]
        if set(data) != {*names, "format", "version"}:
            missing, unknown = (
                sorted(set(names) - set(data)),
                sorted(set(data) - {*names, "format", "version"}),
            )
            raise FileFormatError(
                f"Structure.from_json: fields must be {', '.join(names)}, got missing {missing} and unknown {unknown}"
            )
        structure = Structure(
            kept={name: tuple(v) for name, v in _table(data, "kept", list)},
            sizes=dict(_table(data, "sizes", int)),
            layers={name: tuple(v) for name, v in _table(data, "layers", list)},
            inputs={name: tuple(v) for name, v in _table(data, "inputs", list)},
            widths={name: tuple(v) for name, v in _table(data, "widths", list)},
            **{name: _count(data, name) for name in ("macs", "params", "base_macs", "base_params")},
            limits=read_checks(data["limits"]),
            multiple_of=_count(data, "multiple_of", least=1),
        )
        _check_consistent(structure)
        return structure

    def __str__(self) -> str:
        rows = [("group", "kept", "of", "share")]
        for name, size in self.sizes.items():
            count = len(self.kept[name])
            rows.append((name, f"{count:,}", f"{size:,}", f"{count / size:.1%}"))
        rows.append(("MACs", f"{self.macs:,}", f"{self.base_macs:,}", f"{self.macs_share:.1%}"))
        rows.append(
            ("params", f"{self.params:,}", f"{self.base_params:,}", f"{self.params_share:.1%}")
        )
        text = aligned(rows)
        if self.limits:
            text += "\n\n" + "\n".join(
                [aligned(limit_table(self.limits)), *limit_notes(self.limits)]
            )
        if self.off_multiple:
            some = ", ".join(f"{name} ({channels})" for name, channels in self.off_multiple.items())
            text += (
                f"\n\nwidths are multiples of {self.multiple_of} channels, which run fast, but those of {some}: the budget could "
                "not be met otherwise"
            )
        return text


def aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows as a table: the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            [
                row[0].ljust(widths[0]),
                *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True)),
            ]
        )
        for row in rows
    )


def _indices(mask: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(mask).tolist())


def _table(data: Mapping[str, Any], name: str, kind: type) -> list[tuple[str, Any]]:
    """Entries of one of the dictionaries, with the type of every value checked."""
    table = data[name]
    if not isinstance(table, dict):
        raise FileFormatError(
            f"Structure.from_json: {name} must be an object, got {type(table).__name__}"
        )
    for key, value in table.items():
        numbers = value if kind is list and isinstance(value, list) else [value]
        if not isinstance(value, kind) or not all(_is_int64(number) for number in numbers):
            rule = "a list of integers" if kind is list else "an integer"
            raise FileFormatError(
                f"Structure.from_json: {name}[{key!r}] must be {rule}, got {str(value)[:60]}"
            )
    return list(table.items())


def _count(data: Mapping[str, Any], name: str, least: int = 0) -> int:
    if not _is_int64(data[name]) or data[name] < least:
        raise FileFormatError(
            f"Structure.from_json: {name} must be an integer of at least {least}, got {str(data[name])[:60]}"
        )
    return data[name]


def _is_int64(value: Any) -> bool:
    return type(value) is int and abs(value) < 2**63


def _check_consistent(structure: Structure) -> None:
    """Every index list ascends inside its axis, and the tables name the same groups and layers."""
    if structure.kept.keys() != structure.sizes.keys():
        odd = sorted(structure.kept.keys() ^ structure.sizes.keys())
        raise FileFormatError(
            f"Structure.from_json: kept and sizes must name the same groups, got a difference in {odd}"
        )
    touched = structure.layers.keys() | structure.inputs.keys()
    if touched != structure.widths.keys():
        odd = sorted(touched ^ structure.widths.keys())
        raise FileFormatError(
            f"Structure.from_json: widths must name the layers of layers and inputs, got a difference in {odd}"
        )
    for name, width in structure.widths.items():
        if len(width) != 2 or min(width) < 1:
            raise FileFormatError(
                f"Structure.from_json: widths[{name!r}] must be (in, out) above 0, got {list(width)}"
            )
    for table, size_of in (
        ("kept", structure.sizes.__getitem__),
        ("layers", lambda name: structure.widths[name][1]),
        ("inputs", lambda name: structure.widths[name][0]),
    ):
        for name, indices in getattr(structure, table).items():
            ascending = all(a < b for a, b in itertools.pairwise(indices))
            if not indices or not ascending or indices[0] < 0 or indices[-1] >= size_of(name):
                raise FileFormatError(
                    f"Structure.from_json: {table}[{name!r}] must be ascending indices in 0..{size_of(name) - 1}, at least "
                    f"one and each once, got {str(list(indices))[:60]}; the text was edited or damaged"
                )
    if structure.macs > structure.base_macs or structure.params > structure.base_params:
        raise FileFormatError(
            "Structure.from_json: macs and params must not exceed base_macs and base_params, got "
            f"{(structure.macs, structure.params)} and {(structure.base_macs, structure.base_params)}"
        )
