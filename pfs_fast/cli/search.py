"""Search the channels of a slim network in a random one.

Writes into --out: search.safetensors (gates, from which any other budget can be cut), structure.json (kept
channels) and run.json (the arguments, from which `pfs-fast train` rebuilds network and data). With --seeds, into a
folder of --out for each seed: seed0, seed1, ...
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch

import pfs_fast

from ..budgets.budget import Budget
from ..budgets.ranking import RANKINGS
from ..gating.scope import SCOPES
from ..searching.config import PRECISIONS, SearchConfig
from ..searching.result import SearchResult
from ..searching.seeds import SearchResults, checked_seeds
from ..storage.files import write_text_atomic
from . import run_folder
from .inputs import DataSpec, ModelSpec
from .options import (
    UsageError,
    add_data_arguments,
    add_early_stop_arguments,
    add_limit_arguments,
    add_model_arguments,
    add_run_arguments,
    add_speed_argument,
    chosen_budget,
    chosen_device,
    data_spec,
    model_spec,
    parse_reference,
)
from .terminal import say

DIGITS_EPOCHS = 4  # few images, and a first look: enough steps for the gates to part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``pfs-fast search``."""
    defaults = SearchConfig()
    add_model_arguments(parser)
    add_data_arguments(parser)
    add_limit_arguments(parser, Budget(macs=0.5), "0.5")
    parser.add_argument(
        "--reference",
        type=parse_reference(),
        default="model",
        metavar="R",
        help="what a share refers to: model, base (the network without --expansion), or a number of MACs "
        "(default: model)",
    )
    parser.add_argument(
        "--epochs",
        type=int,
        metavar="N",
        help=f"passes over the images (default: {defaults.epochs}; digits: {DIGITS_EPOCHS})",
    )
    parser.add_argument("--max-steps", type=int, metavar="N", help="stop after so many steps")
    add_early_stop_arguments(parser)
    parser.add_argument(
        "--gamma",
        type=float,
        default=defaults.gamma,
        help=f"weight of the pull of the mean gate (default: {defaults.gamma}; ImageNet in the paper: 0.05)",
    )
    parser.add_argument(
        "--target", type=float, metavar="R", help="mean gate aimed at (default: the budget's share)"
    )
    parser.add_argument(
        "--scope",
        choices=SCOPES,
        default=defaults.scope,
        help="gates where the paper has them, or on all prunable groups (default: paper)",
    )
    parser.add_argument(
        "--ranking",
        choices=("auto", *RANKINGS),
        default=defaults.ranking,
        help="order in which channels enter: the largest gates of all, or shares of every group (default: auto = gates, with "
        "--scope all layerwise)",
    )
    parser.add_argument("--precision", choices=("auto", *PRECISIONS), default=defaults.precision)
    parser.add_argument(
        "--backend",
        choices=("auto", "fused", "reference"),
        default=defaults.backend,
        help="compiled operators, or plain PyTorch (default: auto = fused)",
    )
    parser.add_argument(
        "--validate", action="store_true", help="evaluate on the held-out images after each epoch"
    )
    parser.add_argument(
        "--select",
        choices=("last", "best"),
        default=defaults.select,
        help="gates after the last step, or of the best validated epoch (default: last)",
    )
    parser.add_argument(
        "--seeds",
        nargs="+",
        type=int,
        metavar="SEED",
        help="search once for each of these, from fresh weights each; --seed is then that of the order of images alone",
    )
    parser.add_argument(
        "--checkpoint",
        nargs="?",
        const="",
        metavar="FILE",
        help="write the state after each epoch, and go on from it (default FILE: in --out; one for each of --seeds)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder of the results (default: runs/<model>-<data>)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a search in --out")
    add_speed_argument(parser)
    add_run_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    """``pfs-fast search``."""
    device = chosen_device(arguments)
    budget = chosen_budget(arguments)
    source = data_spec(arguments)
    config = _config(arguments, source)
    out = arguments.out or _default_out(arguments, source)
    seeds = None if arguments.seeds is None else checked_seeds(arguments.seeds)
    folders = [out] if seeds is None else [out / f"seed{seed}" for seed in seeds]
    with run_folder.held(folders, "search", run_folder.RECORD, arguments.overwrite):
        _search(arguments, device, budget, source, config, out, seeds, folders)


def _search(
    arguments: argparse.Namespace,
    device: torch.device,
    budget: Budget,
    source: DataSpec,
    config: SearchConfig,
    out: Path,
    seeds: list[int] | None,
    folders: list[Path],
) -> None:
    splits = source.splits()
    options = {"device": device, "seed": arguments.seed}
    loaders = splits.loaders(arguments.batch_size or 128, eval_batch_size=512, **options)
    validates = arguments.validate or arguments.select == "best"
    if validates and loaders.val is None:
        raise UsageError(
            f"--validate needs held-out images, and {splits.name} has none; add --val N"
        )
    spec = model_spec(arguments, splits.num_classes)
    model = spec.build(arguments.seed)
    if not arguments.quiet:
        say(f"{spec.name} on {splits}; budget {budget}")
    found = pfs_fast.search(
        model,
        loaders.train,
        budget,
        config=config,
        reference=_reference(arguments.reference, spec),
        device=device,
        checkpoint=_checkpoint(arguments.checkpoint, out),
        progress=not arguments.quiet,
        val_loader=loaders.val if validates else None,
        seeds=seeds,
    )
    results = found if isinstance(found, SearchResults) else [found]
    for result, folder in zip(results, folders, strict=True):
        _write(result, folder, arguments, spec, source)
    for result, folder in zip(results, folders, strict=True):  # may fail: a latency is measured
        text = result.structure.to_json(indent=1) + "\n"
        write_text_atomic(folder / run_folder.STRUCTURE, text, caller="search")
    say(found.report() if isinstance(found, SearchResults) else found.structure)
    for result, folder in zip(results, folders, strict=True):
        if seeds is not None:
            say(f"\nseed {result.config.seed}")
        if arguments.speed and not arguments.quiet:
            say(f"\n{result.compare(warn=False)}\n")
        _print_ending(result, folder, spec)


def _write(
    result: SearchResult,
    folder: Path,
    arguments: argparse.Namespace,
    spec: ModelSpec,
    source: DataSpec,
) -> None:
    result.save(folder / run_folder.SEARCH)
    shown = {k: v for k, v in vars(arguments).items() if k not in ("run", "debug", "command")}
    versions = {"pfs_fast": pfs_fast.__version__, "torch": str(torch.__version__)}
    run_folder.Record(spec, source, result.reference, shown, versions).write(folder)


def _print_ending(result: SearchResult, folder: Path, spec: ModelSpec) -> None:
    structure = result.structure
    if result.reference[0] != structure.base_macs:
        share = structure.macs / result.reference[0]
        say(f"{share:.1%} of the reference's {result.reference[0]:,} MACs")
    last = result.history[-1]
    say(
        f"searched {last['step']:,} steps in {last['seconds']:.1f} s ({result.config.precision}, "
        f"{result.config.backend}): mean gate {last['mean_gate']:.3f}, {last['alive']:.1%} above 0"
    )
    if result.config.patience is not None:
        say(result.ending())
    again = "" if spec.is_plain() else f" {spec.options()}"
    say(f"written to {folder}; next: pfs-fast train {folder}{again}")


def _config(arguments: argparse.Namespace, source: DataSpec) -> SearchConfig:
    epochs = arguments.epochs
    if epochs is None and source.source == "digits":
        epochs = DIGITS_EPOCHS
    names = (
        "max_steps",
        "patience",
        "tolerance",
        "gamma",
        "target",
        "scope",
        "ranking",
        "precision",
        "backend",
        "select",
        "seed",
    )
    changes = {name: getattr(arguments, name) for name in names}
    return SearchConfig(**changes) if epochs is None else SearchConfig(epochs=epochs, **changes)


def _default_out(arguments: argparse.Namespace, source: DataSpec) -> Path:
    name = f"{arguments.model or 'resnet20'}-{Path(source.source).stem or source.source}"
    return Path("runs") / re.sub(r"[^\w.-]+", "-", name)


def _reference(wish: str | int, spec: ModelSpec) -> torch.nn.Module | int | None:
    if wish == "model":
        return None
    return spec.base().build() if wish == "base" else wish


def _checkpoint(wish: str | None, out: Path) -> Path | None:
    if wish is None:
        return None
    return Path(wish) if wish else out / run_folder.CHECKPOINT
