"""Train a slim network from scratch, save it, and prove that the file gives the same network back.

RUN is the folder of a search, or the JSON file of a structure (then with --model and --data, unless a run.json
lies beside it). A run.json names networks of pfs_fast, torchvision and timm; any other must be named by --model. Writes
slim.safetensors and history.json. By default all training images are used, those held out for validation included, as in
the paper. The test images are evaluated once, at the end.
"""

from __future__ import annotations

import argparse
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pfs_fast

from ..budgets.structure import Structure
from ..data import DeviceLoader, Splits
from ..errors import FileFormatError
from ..measuring.meters import needs_model
from ..searching.result import SearchResult
from ..training.recipes import AMP_MODES, SCHEDULES, TrainConfig
from . import run_folder
from .inputs import DataSpec, ModelSpec, joined
from .options import (
    UsageError,
    add_data_arguments,
    add_limit_arguments,
    add_model_arguments,
    add_run_arguments,
    add_speed_argument,
    chosen_budget,
    chosen_device,
    data_spec,
    model_spec,
)
from .terminal import say
from .train_report import check_cost, check_reloaded, comparison, write_history

DIGITS_EPOCHS = 16  # more than 90 % in about a minute of two CPU cores

_RECIPES = {
    "cifar": lambda batch: TrainConfig.cifar,
    "imagenet-resnet50": lambda batch: partial(TrainConfig.imagenet_resnet50, batch),
    "imagenet-mobilenet": lambda batch: partial(TrainConfig.imagenet_mobilenet, batch),
}
_OPTIONS = (
    "epochs",
    "max_epochs",
    "lr",
    "weight_decay",
    "schedule",
    "label_smoothing",
    "ema",
    "amp",
    "restore",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pfs-fast train``."""
    parser.add_argument(
        "target", type=Path, metavar="RUN", help="folder of a search, or a structure's file"
    )
    add_limit_arguments(parser, None, "that of the search")
    parser.add_argument(
        "--recipe", choices=tuple(_RECIPES), default="cifar", help="defaults (default: cifar)"
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"epochs of the whole network (default: the recipe's, 160 or 150; digits: {DIGITS_EPOCHS})",
    )
    parser.add_argument(
        "--scratch-b",
        action="store_true",
        help="as much computation as the whole network: epochs / share of MACs",
    )
    parser.add_argument("--max-epochs", type=int, metavar="N", help="limit, after --scratch-b")
    parser.add_argument(
        "--lr", type=float, help="learning rate at the start (default: the recipe's)"
    )
    parser.add_argument("--weight-decay", type=float, metavar="W")
    parser.add_argument("--schedule", choices=SCHEDULES)
    parser.add_argument("--label-smoothing", type=float, metavar="S")
    parser.add_argument(
        "--ema", type=float, metavar="DECAY", help="average the weights, such as 0.999"
    )
    parser.add_argument("--amp", choices=AMP_MODES, help="mixed precision (default: off)")
    parser.add_argument(
        "--hold-out",
        action="store_true",
        help="train without the validation images, and evaluate those after each epoch",
    )
    parser.add_argument(
        "--restore",
        choices=("last", "best"),
        help="state to keep; best needs --hold-out (default: last)",
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="folder of the results (default: that of RUN)"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace a trained network in --out"
    )
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_speed_argument(parser)
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """``pfs-fast train``."""
    if arguments.restore == "best" and not arguments.hold_out:
        raise UsageError("--restore best would select by the test images; add --hold-out")
    device = chosen_device(arguments)
    job = _prepare(arguments)
    target: Path = arguments.target
    out = arguments.out or (target if target.is_dir() else target.parent)
    with run_folder.held([out], "train", run_folder.SLIM, arguments.overwrite):
        _train(arguments, device, job, out)


def _train(arguments: argparse.Namespace, device: torch.device, job: _Job, out: Path) -> None:
    config = _config(arguments, job)
    if not arguments.quiet:
        say(
            f"{job.model.name} slimmed to {job.structure.macs_share:.1%} of its MACs, on {job.splits}"
        )
    dense = job.model.build(arguments.seed)
    slim = pfs_fast.slim(dense, job.structure, seed=arguments.seed)
    parts = _loaders(arguments, job.splits, device)
    check_cost(slim, job.structure, next(iter(parts.final))[0][:1].cpu())
    trained = pfs_fast.train(
        slim, parts.train, parts.watch, config, device=device, progress=not arguments.quiet
    )
    accuracy = pfs_fast.evaluate(slim, parts.final, amp=config.amp)
    path = out / run_folder.SLIM
    report = {"top1": accuracy.top1, "images": parts.final_name, "n": accuracy.n}
    pfs_fast.save(slim, path, metadata={"model": asdict(job.model), "accuracy": report})
    write_history(out / run_folder.HISTORY, trained, report)
    check_reloaded(path, dense, slim, accuracy, parts.final, config.amp)
    say(comparison(job.structure, accuracy, parts.final_name))
    if arguments.speed and not arguments.quiet:
        say(f"\n{pfs_fast.compare(dense, slim, warn=False)}\n")
    say(
        f"trained {trained.epochs} epochs in {trained.seconds:.1f} s, loss {trained.history[-1]['loss']:.4f}"
    )
    say(f"written to {path}; reloaded: same weights, same accuracy")


@dataclass(frozen=True)
class _Job:
    """What is trained on what."""

    model: ModelSpec
    data: DataSpec
    splits: Splits
    structure: Structure
    reference_macs: int


@dataclass(frozen=True)
class _Parts:
    """Loaders: to train on, to evaluate after each epoch (held-out images or none), and to judge the result by."""

    train: DeviceLoader
    watch: DeviceLoader | None
    final: DeviceLoader
    final_name: str


def _prepare(arguments: argparse.Namespace) -> _Job:
    """Finds structure, network and images; reads the images last, since that may take long."""
    target: Path = arguments.target
    budget = chosen_budget(arguments)
    folder = target if target.is_dir() else target.parent
    has_record = (folder / run_folder.RECORD).exists()
    if target.is_dir() and not has_record:
        raise FileFormatError(
            f"train: RUN must be the folder of a finished search, got '{target}' without {run_folder.RECORD}; "
            "run pfs-fast search first"
        )
    record = run_folder.Record.read(folder) if has_record else None
    if record is None and (arguments.model is None or arguments.data is None):
        raise UsageError(
            f"--model and --data must be given with '{target}', which has no run.json beside it"
        )
    file = target / run_folder.STRUCTURE if target.is_dir() else target
    if budget is None:
        structure = run_folder.read_structure(file)
    source = data_spec(arguments, record and record.data)
    spec = None
    if record is not None and arguments.model is None:
        spec = _with_changes(record.model, arguments).recorded(folder / run_folder.RECORD)
    splits = source.splits()
    if spec is None:
        spec = model_spec(arguments, splits.num_classes)
    if budget is not None:
        if not target.is_dir():
            raise UsageError("--budget needs the folder of a search, which has the gates")
        model = spec.build(arguments.seed) if needs_model(budget) else None
        result = SearchResult.load(target / run_folder.SEARCH, model)
        result.progress = not arguments.quiet
        structure = result.structure_for(budget)
    reference = max(structure.base_macs, 1) if record is None else record.reference[0]
    return _Job(spec, source, splits, structure, reference)


def _with_changes(spec: ModelSpec, arguments: argparse.Namespace) -> ModelSpec:
    """The recorded network; arguments that would change it need --model, so that nothing is changed by half."""
    if arguments.expansion is not None or arguments.model_arg:
        raise UsageError(
            f"--expansion and --model-arg need --model; without it RUN's is used: {spec}"
        )
    return spec


def _config(arguments: argparse.Namespace, job: _Job) -> TrainConfig:
    changes = {name: getattr(arguments, name) for name in _OPTIONS}
    if arguments.epochs is None and job.data.source == "digits" and arguments.recipe == "cifar":
        changes["epochs"] = DIGITS_EPOCHS
    if arguments.scratch_b:
        changes["budget_training"] = min(1.0, job.structure.macs / job.reference_macs)
    recipe = _RECIPES[arguments.recipe](_batch_size(arguments))
    changes = {name: value for name, value in changes.items() if value is not None}
    return recipe(**changes, seed=arguments.seed)


def _batch_size(arguments: argparse.Namespace) -> int:
    default = 128 if arguments.recipe == "cifar" else 256
    return default if arguments.batch_size is None else arguments.batch_size


def _loaders(arguments: argparse.Namespace, splits: Splits, device: torch.device) -> _Parts:
    if arguments.hold_out and splits.val is None:
        raise UsageError(
            f"--hold-out needs validation images, and {splits.name} has none; add --val N"
        )
    options: dict[str, Any] = {"device": device, "seed": arguments.seed}
    loaders = splits.loaders(_batch_size(arguments), eval_batch_size=512, **options)
    train, watch = loaders.train, loaders.val if arguments.hold_out else None
    if splits.val is not None and not arguments.hold_out:
        everything = Splits(**{**vars(splits), "train": joined(splits), "val": None, "test": None})
        train = everything.loaders(_batch_size(arguments), **options).train
    for name, final in (("test", loaders.test), ("validation", watch)):
        if final is not None:
            return _Parts(train, watch, final, name)
    only = Splits(**{**vars(splits), "test": joined(splits), "val": None})
    return _Parts(train, watch, only.loaders(512, **options).test, "training")
