"""Models to and from files: safetensors with the layers' widths beside the weights, never pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from .._ambient import own_settings
from .._json import parse_json
from .._modules import require_plain
from ..errors import ConfigError, FileFormatError, ModelError, StructureError
from ..graph.scales import find_scales
from ..slimming.slim import kind_in_file, narrow_to, widths_of
from .exporters import ExportReport, export
from .files import (
    read_metadata,
    read_safetensors,
    write_safetensors,
    write_text_atomic,
)

__all__ = [
    "ExportReport",
    "export",
    "load",
    "read_metadata",
    "read_safetensors",
    "save",
    "write_safetensors",
    "write_text_atomic",
]

MODEL_FORMAT = "pfs_fast.model"
MODEL_VERSION = 1

_SHOWN_DIFFERENCES = 5


@own_settings()
def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    *,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Saves a model's parameters and buffers, with the widths of its layers, to one safetensors file.

    `load` rebuilds the slim model from that file and the dense class. Without this package the tensors can be read by
    ``safetensors.torch.load_file`` and loaded into a module of the same widths.

    Args:
        model: The module. Not a DataParallel, DistributedDataParallel or compiled wrapper.
        path: Target file. Written whole or not at all; an older file there is replaced in one step.
        metadata: Whatever JSON can hold, stored beside the model (`read_metadata` returns it under "user").

    Raises:
        ConfigError: ``metadata`` that JSON cannot hold.
        ModelError: A wrapper, or a state that is no tensor or holds no data.
        FileWriteError: The file cannot be written.
    """
    require_plain("save", model)
    tensors: dict[str, Tensor] = {}
    for name, value in model.state_dict().items():
        if not isinstance(value, Tensor) or value.is_meta:
            kind = "a meta tensor" if isinstance(value, Tensor) else type(value).__name__
            raise ModelError(
                f"save: model must have only tensors with data in its state, got {kind} for '{name}'"
            )
        tensors[name] = value
    document: dict[str, Any] = {
        "format": MODEL_FORMAT,
        "version": MODEL_VERSION,
        "class": _class_name(model),
    }
    structure = getattr(model, "pfs_structure", None)
    document["layers"] = layer_widths(model, _names_in(structure))
    if structure is not None:
        document["structure"] = structure
    shape = getattr(model, "pfs_input_shape", None)
    if shape is not None:
        document["input_shape"] = list(shape)
    if metadata is not None:
        document["user"] = _json_metadata(metadata)
    write_safetensors(path, tensors, document, caller="save")


def _json_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    try:
        json.dumps(dict(metadata), allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"save: metadata must be a mapping that JSON can hold, got {type(error).__name__}: {error}; use texts, finite numbers, "
            "lists and dictionaries"
        ) from error
    return dict(metadata)


@own_settings()
def load(path: str | os.PathLike[str], model: nn.Module) -> nn.Module:
    """Rebuilds a saved model from its file and a dense instance of its class.

    Args:
        path: A file that `save` wrote.
        model: A module of the class that was saved, with its original widths; its weights do not matter. Not modified.

    Returns:
        A copy of ``model`` (same mode and device) with the widths, weights and dtypes of the file.

    Raises:
        FileFormatError: The file is missing, damaged, of another format or version, or made for another model; the
            message names what differs.
        ModelError: ``model`` is a DataParallel, DistributedDataParallel or compiled wrapper.
    """
    require_plain("load", model)
    tensors, document = read_safetensors(path, MODEL_FORMAT, MODEL_VERSION, caller="load")
    check_document(path, document, "load")
    layers = document["layers"]
    _check_same_model(path, document, model)
    try:
        result = narrow_to(model, layers)
    except StructureError as error:
        raise FileFormatError(
            f"load: model must have the layers of '{path}' at their original widths, got a model that differs: {error}"
        ) from error
    _fill(path, result, tensors)
    if "structure" in document:
        result.pfs_structure = document["structure"]
    if "input_shape" in document:
        result.pfs_input_shape = tuple(document["input_shape"])
    return result


def check_document(path: str | os.PathLike[str], document: Mapping[str, Any], caller: str) -> None:
    """What `save` writes beside the tensors must have the form that it has.

    Raises:
        FileFormatError: Something is missing or of another type.
    """
    layers, shape = document.get("layers"), document.get("input_shape", [])
    if not isinstance(layers, dict) or not isinstance(document.get("class"), str):
        raise FileFormatError(
            f"{caller}: path must name the model's class and layers, got '{path}' without; save the model again"
        )
    wrong = [f"'{name}' has no valid widths" for name, la in layers.items() if not _is_layer(la)]
    if not isinstance(document.get("structure", ""), str):
        wrong.append("its structure is no text")
    if not isinstance(shape, list) or not all(_is_width(size) for size in shape):
        wrong.append("its input_shape is no list of sizes")
    if wrong:
        raise FileFormatError(
            f"{caller}: path must describe a model, got '{path}', in which {'; '.join(wrong[:_SHOWN_DIFFERENCES])}; "
            "save the model again"
        )


def layer_widths(model: nn.Module, scales: Iterable[str] = ()) -> dict[str, dict[str, Any]]:
    """Widths of all convolutions, linear layers and batch norms: name -> {"kind", "in", "out", "groups"}.

    Args:
        model: The module.
        scales: Names that may be those of parameters which the forward itself multiplies channels by; they are layers too.
    """
    layers: dict[str, dict[str, Any]] = {}
    for name, module in (*model.named_modules(), *find_scales(model, scales).items()):
        kind = kind_in_file(module)
        if kind is not None:
            width_in, width_out = widths_of(module)
            groups = getattr(module, "groups", 1)
            layers[name] = {"kind": kind, "in": width_in, "out": width_out, "groups": groups}
    return layers


def _names_in(structure: str | None) -> tuple[str, ...]:
    """Names in the JSON of a structure; none where it is another text."""
    try:
        document = None if structure is None else parse_json(structure)
    except ValueError:
        document = None
    widths = document.get("widths") if isinstance(document, dict) else None
    return tuple(widths) if isinstance(widths, dict) else ()


def _check_same_model(
    path: str | os.PathLike[str], document: Mapping[str, Any], model: nn.Module
) -> None:
    """Class by its own name: a class that was moved to another module, or saved from a script, is still itself."""
    saved, given = document["class"], _class_name(model)
    if saved.rpartition(".")[2] != given.rpartition(".")[2]:
        raise FileFormatError(
            f"load: model must be an instance of the class in '{path}', {saved}, got {given}"
        )
    differences = _differences(document["layers"], layer_widths(model, document["layers"]))
    if differences:
        shown = "; ".join(differences[:_SHOWN_DIFFERENCES])
        more = len(differences) - _SHOWN_DIFFERENCES
        raise FileFormatError(
            f"load: model must have the layers of '{path}' at their original widths, got a model that differs: {shown}"
            + (f"; and {more} more" if more > 0 else "")
            + "; build the dense model with the arguments it was searched with"
        )


def _differences(saved: Mapping[str, Any], given: Mapping[str, Any]) -> list[str]:
    found = [f"'{name}' is only in the file" for name in saved if name not in given]
    found += [f"'{name}' is only in the model" for name in given if name not in saved]
    for name, layer in saved.items():
        dense = given.get(name)
        if dense is None:
            continue
        if layer["kind"] != dense["kind"]:
            found.append(
                f"'{name}' is a {layer['kind']} in the file and a {dense['kind']} in the model"
            )
        else:
            found += [
                f"'{name}' has {layer[side]} {side} channels in the file and only {dense[side]} in the model"
                for side in ("in", "out")
                if layer[side] > dense[side]
            ]
    return found


def _is_layer(layer: Any) -> bool:
    return (
        isinstance(layer, dict)
        and isinstance(layer.get("kind"), str)
        and all(_is_width(layer.get(key)) for key in ("in", "out", "groups"))
    )


def _is_width(value: Any) -> bool:
    return type(value) is int and 1 <= value < 2**63


def _fill(path: str | os.PathLike[str], model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Loads the state strictly. The file's dtype wins: a model saved in bfloat16 comes back in bfloat16."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in tensors or tensor.dtype == tensors[name].dtype:
            continue
        floating = tensor.is_floating_point() and tensors[name].is_floating_point()
        if not floating and not (tensor.is_complex() and tensors[name].is_complex()):
            raise FileFormatError(
                f"load: model must have the parameters and buffers of '{path}', got a model that differs: '{name}' is "
                f"{tensors[name].dtype} in the file and {tensor.dtype} in the model"
            )
        tensor.data = tensor.data.to(tensors[name].dtype)
    try:
        model.load_state_dict(dict(tensors), strict=True)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()[1:]]
        shown = " ".join(lines[:_SHOWN_DIFFERENCES])
        raise FileFormatError(
            f"load: model must have the parameters and buffers of '{path}', got a model that differs: {shown}"
        ) from error


def _class_name(model: nn.Module) -> str:
    return f"{type(model).__module__}.{type(model).__qualname__}"
