"""The search: train the gates of a frozen random network, and nothing else."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Sequence
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn

from .._ambient import alone, callers_settings, random_numbers
from .._cuda_settings import cuda_settings
from .._modules import require_plain
from ..budgets.budget import Budget
from ..errors import ConfigError, NonFiniteLossError
from ..training.batches import Loader, check_reiterable, checked_batches, num_batches
from ..training.progress import Progress
from .checkpoint import Checkpoint, fingerprint
from .config import SearchConfig
from .graphs import side_stream
from .kept_memory import kept_memory
from .loop import LoopState
from .plan import Plan, choose_device, prepare
from .result import SearchResult
from .runner import Runner, make_runner
from .seeds import SearchResults, checked_seeds, search_seeds

# Steps between two looks at which gates have died; on CUDA a look waits for the device.
COMPACT_EVERY = {"cpu": 10, "cuda": 50}


@overload
def search(
    model: nn.Module,
    loader: Loader,
    budget: float | int | Budget,
    *,
    config: SearchConfig | None = None,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    reference: nn.Module | int | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    val_loader: Loader | None = None,
    seeds: None = None,
) -> SearchResult: ...


@overload
def search(
    model: nn.Module,
    loader: Loader,
    budget: float | int | Budget,
    *,
    config: SearchConfig | None = None,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    reference: nn.Module | int | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    val_loader: Loader | None = None,
    seeds: Sequence[int],
) -> SearchResults: ...


@alone("search")
def search(
    model: nn.Module,
    loader: Loader,
    budget: float | int | Budget,
    *,
    config: SearchConfig | None = None,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    reference: nn.Module | int | None = None,
    device: torch.device | str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    val_loader: Loader | None = None,
    seeds: Sequence[int] | None = None,
) -> SearchResult | SearchResults:
    """Search the channels of a slim network in a randomly initialised one ("Pruning from Scratch", arXiv 1909.12579).

    Every channel of every gated group gets one scalar gate; all weights stay frozen; the gates are trained by Adam on
    cross-entropy plus a pull of their mean to a target share; the channels with the largest gates are kept within the budget.

    Autocast, gradient and inference mode, default device and default dtype of the caller reach his loaders, but not the search.
    It runs alone in its process, since it seeds the random generators, whose states are put back at the end.

    Args:
        model: Any fx-traceable CNN, as initialised. Never modified.
        loader: Re-iterable of ``(images [N, C, H, W] floating point, labels [N] int64)``. One with ``set_epoch`` (``DeviceLoader``,
            a DataLoader with a distributed sampler) is told each epoch, from 0, so that the same seed means the same images.
        budget: Share of the MACs in (0, 1], a number of MACs, or a ``Budget``.
        config: Options; the paper's CIFAR-10 defaults otherwise.
        example_input: Input that the model is traced with; default: the first batch.
        reference: What a share refers to: a module (counted on the example input), a number of MACs, or by default
            ``model``. For widened networks: the network before widening.
        device: Where to search; default: the current CUDA device where there is one, else the CPU.
        checkpoint: File that the state is written to after each epoch, and from which a search goes on if it exists. The
            order of images is the loader's: ``DeviceLoader`` goes on with the epoch's own permutation.
        progress: Show a progress line, also while a latency limit is measured.
        val_loader: Batches to evaluate after each epoch, with running statistics; recorded in the history.
        seeds: Search once for each of these, whole numbers from 0, all different, one after another. Each seed draws fresh
            weights into a copy of the model, as its class does, so what the model holds does not matter; it also takes the
            place of ``config.seed``. The order of images is the loader's: a ``DeviceLoader`` shows every seed the same. Each has a
            checkpoint of its own: ``search.ckpt`` becomes ``search.seed0.ckpt``. Default: one search, of the model's weights.

    Returns:
        SearchResult: Gates, history, and the structure for this or any other budget. With ``seeds``, even with a single one: a
        ``SearchResults``, a sequence of them with their similarity and a choice among them.

    Raises:
        BudgetError, InfeasibleBudgetError, BusyMachineError: Before any training.
        ConfigError, ModelError, TraceError, LoaderError, BackendError: With argument, rule, value and repair.
        BusyError: Another thread of the process is in a search or a training.
        NonFiniteLossError: The loss became NaN or infinite; its attribute ``result`` holds the last good gates, and
            ``results`` the seeds that had ended before.

    Example:
        >>> import torch, pfs_fast as pfs
        >>> loader = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))]
        >>> config = pfs.SearchConfig(epochs=2, backend="reference")
        >>> result = pfs.search(pfs.models.resnet20(), loader, 0.5, config=config, progress=False)
        >>> result.structure.macs_share <= 0.5
        True
    """
    require_plain("search", model)
    config = SearchConfig() if config is None else config
    if not isinstance(config, SearchConfig):
        raise ConfigError(
            f"search: config must be a SearchConfig, got {type(config).__name__}; write SearchConfig(epochs=2, ...)"
        )
    if not isinstance(progress, bool):
        raise ConfigError(f"search: progress must be True or False, got {progress!r}")
    if checkpoint is not None and not isinstance(checkpoint, str | os.PathLike):
        raise ConfigError(
            f"search: checkpoint must be a path, got {type(checkpoint).__name__}; write e.g. 'search.ckpt'"
        )
    budget = Budget.of(budget)
    seeds = None if seeds is None else checked_seeds(seeds)
    passes = config.epochs * len(seeds or [0])
    check_reiterable(loader, passes, "search")
    if val_loader is not None:
        check_reiterable(val_loader, passes, "search", "val_loader")
    if config.select == "best" and val_loader is None:
        raise ConfigError(
            "search: val_loader must be given with select='best', got None; pass one or use select='last'"
        )
    search_one = partial(
        _search,
        loader=loader,
        budget=budget,
        example_input=example_input,
        reference=reference,
        place=choose_device(device),
        progress=progress,
        val_loader=val_loader,
    )
    if seeds is not None:
        return search_seeds(search_one, model, seeds, config, checkpoint)
    return search_one(model, config, checkpoint, "search")


def _search(
    model: nn.Module,
    config: SearchConfig,
    checkpoint: str | os.PathLike[str] | None,
    name: str,
    *,
    loader: Loader,
    budget: Budget,
    example_input: Tensor | tuple[Tensor, ...] | None,
    reference: nn.Module | int | None,
    place: torch.device,
    progress: bool,
    val_loader: Loader | None,
) -> SearchResult:
    """One search; ``name`` stands before its progress line."""
    with (
        random_numbers(config.seed, [place]),
        side_stream(place),
        kept_memory(place),
    ):
        _set_epoch(loader, 0)
        batches = checked_batches(loader, "search")
        first = next(batches)
        plan = prepare(
            model,
            first[0],
            budget,
            config,
            device=place,
            example_input=example_input,
            reference=reference,
            track_stats=val_loader is not None,
            progress=progress,
        )
        saved = None
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, plan.loop, fingerprint(model, plan.groups, plan.config))
            if saved.restore():
                plan.loop.resume_look(COMPACT_EVERY[place.type])
                batches.close()
                _set_epoch(loader, plan.loop.state.epoch)
                batches, first = checked_batches(loader, "search"), None
        if first is not None:
            batches = _from_first(first, batches)
        runner = make_runner(plan.loop, loader)
        float32 = "tf32" if config.precision == "tf32" else "ieee"
        try:
            with cuda_settings(place, float32, repeatable=True):
                _run(plan, loader, batches, runner, val_loader, saved, name if progress else None)
        except NonFiniteLossError as error:
            error.result = plan.result(plan.loop.good_gates)
            raise
    best = plan.loop.state.best if config.select == "best" else None
    return plan.result(best or plan.loop.gates())


def _run(
    plan: Plan,
    loader: Loader,
    batches: Generator[tuple[Tensor, Tensor]],
    runner: Runner,
    val_loader: Loader | None,
    saved: Checkpoint | None,
    name: str | None,
) -> None:
    loop, config, state = plan.loop, plan.config, plan.loop.state
    limit = config.max_steps
    total = _total_steps(loader, config)
    look_every = COMPACT_EVERY[loop.device.type]
    stops = [look_every, config.log_every, *([loop.watch.every] if loop.watch else [])]

    def until_look() -> int:
        return min(every - state.steps % every for every in stops)

    try:
        with Progress(total, name or "", name is not None, initial=state.steps) as bar:
            while state.ended is None and not _is_over(state, config):
                most = None if limit is None else limit - state.steps
                for taken in runner.run(batches, most, until_look):
                    bar.update(taken, **loop.metrics())
                    if loop.check_stable():
                        break
                    if state.steps % config.log_every == 0:
                        loop.post_entry()
                    if state.steps % look_every == 0:
                        left = None if total is None else total - state.steps
                        loop.compact(left, runner.invalidate)
                _end_epoch(plan, val_loader, saved)
                batches.close()
                if state.ended is None:
                    _set_epoch(loader, state.epoch)
                    batches = checked_batches(loader, "search", epoch=state.epoch)
    finally:
        batches.close()


def _end_epoch(plan: Plan, val_loader: Loader | None, saved: Checkpoint | None) -> None:
    loop, state = plan.loop, plan.loop.state
    loop.post_entry()
    if val_loader is not None:
        entry = loop.entry()
        entry["val_accuracy"] = loop.evaluate(val_loader)
        loop.keep_if_best(entry["val_accuracy"])
    state.epoch += 1
    over = state.ended is not None or _is_over(state, plan.config)
    if over or saved is not None:
        loop.entry()
    if over:
        loop.finish()
    if saved is not None:
        saved.save()


def _is_over(state: LoopState, config: SearchConfig) -> bool:
    return state.epoch >= config.epochs or (
        config.max_steps is not None and state.steps >= config.max_steps
    )


def _from_first(
    first: tuple[Tensor, Tensor], rest: Generator[tuple[Tensor, Tensor]]
) -> Generator[tuple[Tensor, Tensor]]:
    try:
        yield first
        yield from rest
    finally:
        rest.close()


def _total_steps(loader: Any, config: SearchConfig) -> int | None:
    batches = num_batches(loader)
    if batches is None:
        return config.max_steps
    total = batches * config.epochs
    return total if config.max_steps is None else min(total, config.max_steps)


def _set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tell a loader that knows epochs (``DeviceLoader``, a distributed sampler) which one comes."""
    for candidate in (loader, getattr(loader, "sampler", None)):
        if hasattr(candidate, "set_epoch"):
            with callers_settings():
                candidate.set_epoch(epoch)
            return
