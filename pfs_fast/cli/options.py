"""Arguments that commands share, and how their texts become values."""

from __future__ import annotations

import argparse
import ast
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

import torch

from .. import data, models
from ..budgets.budget import Budget
from ..errors import ConfigError, PfsError
from ..searching.config import SearchConfig
from .inputs import DataSpec, ModelSpec

T = TypeVar("T")

DEFAULT_MODEL = "resnet20"
DEFAULT_DATA = "digits"


class UsageError(Exception):
    """Arguments that are right one by one and do not go together."""


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --expansion and --model-arg."""
    parser.add_argument(
        "--model",
        metavar="NAME",
        help=f"{', '.join(models.names())}; torchvision:<builder>; timm:<name>; or package.module:factory "
        f"(default: {DEFAULT_MODEL})",
    )
    parser.add_argument(
        "--expansion", type=float, metavar="E", help="widen the network by this factor (own models)"
    )
    parser.add_argument(
        "--model-arg",
        action="append",
        default=[],
        type=_checked(_key_and_value),
        metavar="KEY=VALUE",
        help="another argument of the model's factory, such as multiplier=1.25; repeatable",
    )


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """--data, --data-path, --size, --val and --batch-size."""
    parser.add_argument(
        "--data",
        nargs="+",
        metavar=("SOURCE", "PATH"),
        help=f"{', '.join(data.names())}, an .npz file, or imagefolder DIR (default: {DEFAULT_DATA})",
    )
    parser.add_argument(
        "--data-path",
        metavar="PATH",
        help="where the data of SOURCE lie (cifar10: default $PFS_FAST_CIFAR10)",
    )
    parser.add_argument(
        "--size",
        type=int,
        metavar="PIXELS",
        help="height and width (digits, fashion-mnist, folders)",
    )
    parser.add_argument(
        "--val",
        type=int,
        metavar="N",
        help="last N training images held out for validation (folders: of each class)",
    )
    parser.add_argument(
        "--batch-size", type=int, metavar="N", help="images in a step (default: 128)"
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """--device, --seed and --quiet."""
    parser.add_argument(
        "--device",
        type=_checked(_device),
        metavar="DEVICE",
        help="cpu or cuda[:i] (default: a GPU if any)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of everything random (default: 0)")
    parser.add_argument("--quiet", action="store_true", help="no progress, only the result")


def add_speed_argument(parser: argparse.ArgumentParser) -> None:
    """--no-speed."""
    parser.add_argument(
        "--no-speed",
        dest="speed",
        action="store_false",
        help="do not measure the slim network beside the dense one (with --quiet nothing is measured either)",
    )


def add_early_stop_arguments(parser: argparse.ArgumentParser) -> None:
    """--patience and --tolerance."""
    defaults = SearchConfig()
    parser.add_argument(
        "--patience",
        type=int,
        metavar="STEPS",
        help="stop once neither the structure nor the order of the gates has changed for so many steps (default: never)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=defaults.tolerance,
        metavar="SHARE",
        help=f"change that --patience takes for none (default: {defaults.tolerance:g})",
    )


def model_spec(arguments: argparse.Namespace, num_classes: int | None) -> ModelSpec:
    """The model that the arguments name."""
    extra = dict(arguments.model_arg)
    if arguments.expansion is not None:
        extra["expansion"] = arguments.expansion
    return ModelSpec.of(arguments.model or DEFAULT_MODEL, num_classes, extra)


def data_spec(arguments: argparse.Namespace, default: DataSpec | None = None) -> DataSpec:
    """The data that the arguments name; ``default`` fills what they leave out."""
    if arguments.data is None and default is not None:
        source, path = default.source, arguments.data_path or default.path
        size = default.size if arguments.size is None else arguments.size
        val = default.val if arguments.val is None else arguments.val
        return DataSpec(source, path, size, val)
    words = arguments.data or [DEFAULT_DATA]
    path = arguments.data_path
    if len(words) > 2 or (len(words) == 2 and path is not None):
        raise UsageError(f"--data must be SOURCE or SOURCE PATH, got {' '.join(words)!r}")
    if len(words) == 2:
        path = words[1]
    return DataSpec(words[0], path, arguments.size, arguments.val)


def chosen_device(arguments: argparse.Namespace) -> torch.device:
    """Where to run: --device, else the current CUDA device where there is one, else the CPU."""
    device = arguments.device
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"{arguments.command}: --device must be there, got {device} of {torch.cuda.device_count()} CUDA devices; "
            "use cpu or another index"
        )
    return device


def add_limit_arguments(
    parser: argparse.ArgumentParser, default: Budget | None, default_text: str
) -> None:
    """--budget, --width and --ignore."""
    parser.add_argument(
        "--budget",
        type=_checked(Budget.parse),
        default=default,
        metavar="B",
        help="0.5 (share of MACs), macs=150M, params=1M, weight_bytes=4MiB, peak_activation_bytes=0.5, latency=0.5 (of the dense "
        "network's) or latency_ms=20 (measured on device=cpu with batch=1, precision=fp32, threads=2, in runtime=eager, folded, "
        "compile or onnxruntime), multiple_of=1 (the paper's exact widths; default: auto), min_channels=4; several "
        f"with commas, and all hold (default: {default_text})",
    )
    parser.add_argument(
        "--width",
        action="append",
        default=[],
        type=_checked(_width),
        metavar="LAYERS=LEAST:MOST",
        help="channels of layers by name or pattern, such as 'layer3.*=8:64', 'layer4=0.25:', 'conv1=:32'; repeatable",
    )
    parser.add_argument(
        "--ignore",
        action="append",
        default=[],
        metavar="LAYERS",
        help="layers that keep every channel, by name or pattern, such as 'layer4.*'; repeatable",
    )


def chosen_budget(arguments: argparse.Namespace) -> Budget | None:
    """--budget with --width and --ignore; None without one."""
    budget: Budget | None = arguments.budget
    if not arguments.width and not arguments.ignore:
        return budget
    if budget is None:
        raise UsageError("--width and --ignore need --budget; name one")
    return replace(budget, widths=tuple(arguments.width), ignore=tuple(arguments.ignore))


def parse_reference() -> Callable[[str], str | int]:
    """Type of --reference: "model", "base" or a number of MACs."""
    return _checked(_reference)


def parse_shape() -> Callable[[str], tuple[int, ...]]:
    """Type of --input: sizes joined by x."""
    return _checked(_shape)


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser whose own message argparse shows, in place of "invalid value"."""

    def parse_or_say(text: str) -> T:
        try:
            return parse(text)
        except PfsError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_or_say


def _width(text: str) -> tuple[str, tuple[float | int | None, float | int | None]]:
    pattern, equals, ends = text.rpartition("=")
    least, colon, most = ends.partition(":")
    if not pattern or not equals or not colon:
        raise ConfigError(f"must be LAYERS=LEAST:MOST such as layer3.*=8:64, got {text!r}")
    try:
        return pattern, (_end(least), _end(most))
    except ValueError as error:
        raise ConfigError(
            f"must have channels or shares beside the colon, such as 8:64 or 0.25:, got {text!r}"
        ) from error


def _end(text: str) -> float | int | None:
    text = text.strip()
    if not text:
        return None
    return int(text) if text.isdigit() else float(text)


def _reference(text: str) -> str | int:
    if text in ("model", "base"):
        return text
    macs = Budget.parse(text).macs
    if not isinstance(macs, int):
        raise ConfigError(f"must be model, base or a number of MACs such as 41M, got {text!r}")
    return macs


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if len(sizes) != 3 or not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise ConfigError(f"must be channels x height x width such as 3x224x224, got {text!r}")
    return tuple(int(size) for size in sizes)


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"must be cpu, cuda or cuda:<index>, got {text!r}")
    return device


def _key_and_value(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key.isidentifier() or not equals:
        raise ConfigError(f"must be KEY=VALUE, got {text!r}")
    try:
        return key, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return key, value
