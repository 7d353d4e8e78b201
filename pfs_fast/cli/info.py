"""Tell what is installed, what is in a file, or what a network costs and which channels can go.

Without arguments: versions, compiled operators, names of networks and data. PATH: the folder of a search, a
search, a slim network or a structure. --model: its layers with MACs and parameters, and its channel groups.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pfs_fast

from .. import data, models
from ..budgets.cost import count
from ..budgets.structure import Structure
from ..errors import FileFormatError
from ..gating.scope import SCOPES, gated_groups
from ..graph.analysis import channel_graph
from ..graph.groups import ChannelGroups
from ..searching.checkpoint import FORMAT as CHECKPOINT_FORMAT
from ..searching.result import FORMAT as SEARCH_FORMAT
from ..searching.result import SearchResult
from ..storage.files import read_metadata
from ..storage.io import MODEL_FORMAT, check_document
from . import run_folder
from .options import UsageError, add_model_arguments, model_spec, parse_shape
from .terminal import escaped, say

_DEFAULT_INPUT = (3, 224, 224)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pfs-fast info``."""
    parser.add_argument(
        "path", nargs="?", type=Path, metavar="PATH", help="a folder or file of pfs-fast"
    )
    add_model_arguments(parser)
    parser.add_argument(
        "--input",
        type=parse_shape(),
        metavar="CxHxW",
        help="size of one image (default: the model's own, else 3x224x224)",
    )
    parser.add_argument(
        "--num-classes", type=int, metavar="N", help="classes (default: the model's own)"
    )
    parser.add_argument(
        "--scope", choices=SCOPES, default="paper", help="groups to show (default: paper)"
    )

    parser.add_argument(
        "--speed",
        action="store_true",
        help="measure the slim network of a search's folder beside the dense one",
    )


def run(arguments: argparse.Namespace) -> None:
    """``pfs-fast info``."""
    if arguments.path is not None:
        say(_describe(arguments.path))
        if arguments.speed:
            say(f"\n{_speed(arguments.path)}")
    if arguments.model is not None:
        say(_describe_model(arguments))
    if arguments.path is None and arguments.model is None:
        say(f"pfs_fast   {pfs_fast.__version__}")
        say(pfs_fast.backends())
        say(
            f"networks   {', '.join(models.names())}, torchvision:<builder>, timm:<name>, package.module:factory"
        )
        say(f"data       {', '.join(data.names())}, <file>.npz, imagefolder DIR")


def _describe(path: Path) -> str:
    if path.is_dir():
        return _describe_folder(path)
    if path.suffix == ".json":
        document = run_folder.read_json(path)
        if document.get("format") in (run_folder.FORMAT, "pfs_fast.history"):
            return f"{path}: {document['format']}\n{json.dumps(document, indent=2)}"
        return f"{path}: structure\n{run_folder.read_structure(path)}"
    metadata = read_metadata(path, caller="info")
    if metadata["format"] == SEARCH_FORMAT:
        return f"{path}: search\n{_search_text(SearchResult.load(path))}"
    if metadata["format"] == MODEL_FORMAT:
        return f"{path}: network\n{_network_text(path, metadata)}"
    if metadata["format"] == CHECKPOINT_FORMAT:
        epoch, steps = metadata.get("epoch"), metadata.get("steps")
        if type(epoch) is not int or type(steps) is not int:
            raise FileFormatError(
                f"info: path must say how far a search was, got '{path}' without; search again"
            )
        return f"{path}: state of a search after epoch {epoch}, step {steps:,}"
    return f"{path}: {escaped(metadata['format'])} {metadata['version']}"


def _describe_folder(path: Path) -> str:
    record = run_folder.Record.read(path)
    name, source = escaped(record.model.name), escaped(record.data.source)
    text = [f"{path}: search of {name} {record.model.arguments} on {source}"]
    for name in (run_folder.SEARCH, run_folder.SLIM):
        if (path / name).exists():
            text += ["", _describe(path / name)]
    return "\n".join(text)


def _speed(path: Path) -> pfs_fast.Comparison:
    """The slim network of a folder's search beside the dense one, both with fresh weights."""
    if not path.is_dir():
        raise UsageError(f"--speed needs the folder of a search, got '{path}'")
    model = run_folder.Record.read(path).model.recorded(path / run_folder.RECORD).build(seed=0)
    return SearchResult.load(path / run_folder.SEARCH, model).compare(warn=False)


def _search_text(result: SearchResult) -> str:
    config = result.config
    text = [f"budget {result.budget}; scope {config.scope}, {config.precision}, seed {config.seed}"]
    if result.history:
        last = result.history[-1]
        text.append(
            f"{last['step']:,} steps, loss {last['loss']:.4f}, mean gate {last['mean_gate']:.3f}, "
            f"{last['alive']:.1%} above 0"
        )
    return "\n".join([*text, result.report()])


def _network_text(path: Path, metadata: dict[str, Any]) -> str:
    check_document(path, metadata, "info")
    text = [f"class {escaped(metadata['class'])}"]
    user = metadata.get("user")
    accuracy = user.get("accuracy") if isinstance(user, dict) else None
    match accuracy:
        case {"top1": float() as top1, "n": int() as n, "images": str() as images}:
            text.append(f"top-1 {top1:.2%} on {n:,} {escaped(images)} images")
    layers = {escaped(name): layer for name, layer in metadata["layers"].items()}
    width = max(map(len, layers), default=0)
    text += [
        f"  {name.ljust(width)}  {escaped(la['kind']):6}  {la['in']} -> {la['out']}"
        for name, la in layers.items()
    ]
    if "structure" in metadata:
        text.append(str(Structure.from_json(metadata["structure"])))
    return "\n".join(text)


def _describe_model(arguments: argparse.Namespace) -> str:
    spec = model_spec(arguments, arguments.num_classes)
    model = spec.build(seed=0)
    shape = arguments.input or getattr(model, "input_size", _DEFAULT_INPUT)
    image = torch.zeros(1, *shape)
    size = "x".join(map(str, shape))
    cost = count(model, image)
    return f"{spec.name} on one image of {size}\n{cost}\n\n{_groups_text(model, image, arguments.scope)}"


def _groups_text(model: nn.Module, image: torch.Tensor, scope: str) -> str:
    groups: ChannelGroups = gated_groups(channel_graph(model, image), model, scope)
    text = [f"{len(groups.groups)} channel groups, {groups.num_units:,} gates (scope {scope})"]
    width = max(len(group.name) for group in groups.groups)
    for group in groups.groups:
        others = f"; with {', '.join(group.producers[1:])}" if len(group.producers) > 1 else ""
        text.append(f"  {group.name.ljust(width)}  {group.size:5}{others}")
    if groups.fixed:
        text += ["held whole:", *(f"  {name}: {reason}" for name, reason in groups.fixed)]
    return "\n".join(text)
