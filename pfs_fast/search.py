"""The search: train the gates of a frozen random network, and nothing else."""

from __future__ import annotations

import itertools
import numbers
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import _library, ops
from .absorbing import absorbing_groups
from .analysis import channel_graph
from .batches import Loader, check_reiterable, checked_batches
from .budget import Budget
from .checkpoint import Checkpoint, fingerprint
from .compaction import Compaction, preferred_multiple
from .config import PRECISIONS, SearchConfig, compute_dtype
from .cost import CostModel, count
from .errors import BackendError, BudgetError, ConfigError, NonFiniteLossError
from .gated import GatedNetwork
from .gates import GateBank, GateState
from .groups import ChannelGroups
from .loop import SearchLoop
from .ops import reference as reference_ops
from .progress import Progress
from .result import SearchResult
from .scope import chosen_units, gate_sites, gated_groups
from .solver import Sweep

# Steps between two looks at which gates have died; on CUDA a look waits for the device.
COMPACT_EVERY = {"cpu": 10, "cuda": 50}


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
) -> SearchResult:
    """Search the channels of a slim network in a randomly initialised one ("Pruning from Scratch", arXiv 1909.12579).

    Every channel of every gated group gets one scalar gate; all weights stay frozen; the gates are trained by Adam on
    cross-entropy plus a pull of their mean to a target share; the channels with the largest gates are kept within the budget.

    Args:
        model: Any fx-traceable CNN, as initialised. Never modified.
        loader: Re-iterable of ``(images [N, C, H, W] floating point, labels [N] int64)``.
        budget: Share of the MACs in (0, 1], a number of MACs, or a ``Budget``.
        config: Options; the paper's CIFAR-10 defaults otherwise.
        example_input: Input that the model is traced with; default: the first batch.
        reference: What a share refers to: a module (counted on the example input), a number of MACs, or by default
            ``model``. For widened networks: the network before widening.
        device: Where to search; default: the current CUDA device where there is one, else the CPU.
        checkpoint: File that the state is written to after each epoch, and from which a search goes on if it exists. The
            order of images is the loader's: ``DeviceLoader`` goes on with the epoch's own permutation.
        progress: Show a progress line.
        val_loader: Batches to evaluate after each epoch, with running statistics; recorded in the history.

    Returns:
        SearchResult: Gates, history, and the structure for this or any other budget.

    Raises:
        BudgetError, InfeasibleBudgetError: Before any training.
        ConfigError, ModelError, TraceError, LoaderError, BackendError: With argument, rule, value and repair.
        NonFiniteLossError: The loss became NaN or infinite; its attribute ``result`` holds the last good gates.

    Example:
        >>> import torch, pfs_fast as pfs
        >>> loader = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))]
        >>> config = pfs.SearchConfig(epochs=2, backend="reference")
        >>> result = pfs.search(pfs.models.resnet20(), loader, 0.5, config=config, progress=False)
        >>> result.structure.macs_share <= 0.5
        True
    """
    config = config or SearchConfig()
    budget = Budget.of(budget)
    check_reiterable(loader, config.epochs, "search")
    if config.select == "best" and val_loader is None:
        raise ConfigError("search: val_loader must be given with select='best', got None; pass one or use select='last'")
    place = _device(device)
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(config.seed)
        batches = checked_batches(loader, "search")
        first = next(batches)
        plan = _plan(model, first[0], budget, config, example_input, reference, place, val_loader is not None)
        saved = None
        if checkpoint is not None:
            saved = Checkpoint(checkpoint, plan.loop, fingerprint(model, plan.groups, plan.config))
            if saved.restore():
                _set_epoch(loader, plan.loop.state.epoch)
                batches, first = checked_batches(loader, "search"), None
        if first is not None:
            batches = itertools.chain([first], batches)
        try:
            _run(plan, loader, batches, val_loader, saved, progress)
        except NonFiniteLossError as error:
            error.result = plan.result(plan.loop.good_gates)
            raise
    best = plan.loop.state.best if config.select == "best" else None
    return plan.result(best or plan.loop.gates())


@dataclass(frozen=True)
class _Plan:
    """Everything that is decided before the first step."""

    model: nn.Module
    groups: ChannelGroups
    budget: Budget
    reference: tuple[int, int]
    config: SearchConfig
    loop: SearchLoop
    input_shape: tuple[int, ...]

    def result(self, gates: tuple[Tensor, Tensor]) -> SearchResult:
        values, died_at = (t.detach().cpu().clone() for t in gates)
        return SearchResult(
            self.groups,
            values,
            died_at,
            self.budget,
            self.reference,
            self.config,
            list(self.loop.state.history),
            self.model,
            self.input_shape,
        )


def _plan(
    model: nn.Module,
    images: Tensor,
    budget: Budget,
    config: SearchConfig,
    example_input: Tensor | tuple[Tensor, ...] | None,
    reference: nn.Module | int | None,
    device: torch.device,
    track_stats: bool,
) -> _Plan:
    example = images[:1] if example_input is None else example_input
    graph = channel_graph(model, _for_model(example, model))
    groups = gated_groups(graph, model, config.scope)
    cost_model = CostModel(groups)
    share_base = _reference(reference, budget, example, cost_model.base)
    limits = budget.resolve(share_base)
    # An infeasible budget is an error before any training.
    unranked = np.zeros(groups.num_units)
    Sweep(
        groups,
        unranked,
        unranked,
        multiple_of=limits.multiple_of,
        min_channels=limits.min_channels,
        cost_model=cost_model,
    ).largest(limits)
    dtype = compute_dtype(config.precision, device)
    kernels = _kernels(config.backend, device)
    config = replace(
        config,
        target=config.target or _target(limits.macs, limits.params, share_base),
        precision=next(name for name, value in PRECISIONS.items() if value == dtype),
        backend="reference" if kernels is reference_ops else "fused",
    )
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    state = GateState.create(groups.num_units, config.gate_init, gate_dtype, device)
    sites = gate_sites(graph, groups, config.scope)
    bank = GateBank(groups, sites, state)
    network = GatedNetwork(
        graph, bank, kernels, dtype=dtype, channels_last=config.channels_last, track_stats=track_stats
    )
    absorbing = absorbing_groups(network, groups, chosen_units(graph, groups))
    compaction = Compaction(network, bank, groups, sites, absorbing, preferred_multiple(device))
    loop = SearchLoop(network, bank, config, kernels, dtype, compaction)
    return _Plan(model, groups, budget, share_base, config, loop, tuple(images.shape[1:]))


def _run(
    plan: _Plan,
    loader: Loader,
    batches: Iterator[tuple[Tensor, Tensor]],
    val_loader: Loader | None,
    saved: Checkpoint | None,
    progress: bool,
) -> None:
    loop, config, state = plan.loop, plan.config, plan.loop.state
    limit = config.max_steps or float("inf")
    total = _total_steps(loader, config)
    look_every = COMPACT_EVERY[loop.device.type]
    with Progress(total, "search", progress, initial=state.steps) as bar:
        while state.epoch < config.epochs and state.steps < limit:
            for images, labels in itertools.islice(batches, None if limit == float("inf") else limit - state.steps):
                loop.step(images, labels)
                bar.update(**loop.metrics())
                if state.steps % config.log_every == 0:
                    loop.entry()
                if state.steps % look_every == 0:
                    loop.compact(None if total is None else total - state.steps)
            entry = loop.entry()
            if val_loader is not None:
                entry["val_accuracy"] = loop.evaluate(val_loader)
                loop.keep_if_best(entry["val_accuracy"])
            state.epoch += 1
            if saved is not None:
                saved.save()
            batches = checked_batches(loader, "search", epoch=state.epoch)


def _device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(f"search: device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}") from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(f"search: device must be a CPU or CUDA device, got '{chosen}'; use device='cpu'")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"search: device must be there, got '{chosen}' without a CUDA device; use device='cpu'")
        chosen = torch.device("cuda", torch.cuda.current_device() if chosen.index is None else chosen.index)
        if chosen.index >= torch.cuda.device_count():
            raise ConfigError(
                f"search: device must be there, got '{chosen}' of {torch.cuda.device_count()}; use a smaller index"
            )
    return chosen


def _kernels(backend: str, device: torch.device) -> ModuleType:
    """The operators that ``backend`` means. Never falls back."""
    if backend == "reference":
        return reference_ops
    _library.require_ops()
    there = _library.backends()
    if device.type == "cuda" and not there.cuda:
        raise BackendError(
            f"search: backend '{backend}' must have compiled operators for '{device}', got none: {there.cuda_reason}; "
            "rebuild with PFS_FAST_CUDA=1, use device='cpu', or choose backend='reference'"
        )
    return ops


def _for_model(example: Tensor | tuple[Tensor, ...], model: nn.Module) -> tuple[Tensor, ...]:
    """The example input on the device and in the floating dtype of the model's parameters, as tracing needs it."""
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    inputs = example if isinstance(example, tuple) else (example,)
    if not all(isinstance(x, Tensor) for x in inputs):
        raise ConfigError(f"search: example_input must be a tensor or a tuple of tensors, got {type(example).__name__}")
    if parameter is None:
        return inputs
    return tuple(x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype) for x in inputs)


def _reference(
    reference: nn.Module | int | None, budget: Budget, example: Any, base: tuple[int, int]
) -> tuple[int, int]:
    """``(macs, params)`` that a share refers to."""
    if reference is None:
        return base
    if isinstance(reference, nn.Module):
        cost = count(reference, _for_model(example, reference))
        return cost.macs, cost.params
    if isinstance(reference, bool) or not isinstance(reference, numbers.Real) or not reference >= 1:
        raise BudgetError(
            f"search: reference must be a module or a number of MACs of at least 1, got {reference!r}; leave it out for "
            "the model itself"
        )
    if isinstance(budget.params, float):
        raise BudgetError(
            f"search: reference must be a module for a share of parameters ({budget.params:g}), got a number of MACs; pass "
            "the reference network, or an absolute number of parameters"
        )
    return int(reference), base[1]


def _target(macs: int | None, params: int | None, reference: tuple[int, int]) -> float:
    """r by default: the budget as a share of the reference; of MACs if they are limited, else of parameters."""
    share = macs / reference[0] if macs is not None else params / reference[1]
    return min(share, 1.0)


def _total_steps(loader: Any, config: SearchConfig) -> int | None:
    try:
        total = len(loader) * config.epochs
    except TypeError:
        return config.max_steps
    return total if config.max_steps is None else min(total, config.max_steps)


def _set_epoch(loader: Iterable[Any], epoch: int) -> None:
    """Tell a loader that knows epochs (``DeviceLoader``, a distributed sampler) which one comes."""
    for candidate in (loader, getattr(loader, "sampler", None)):
        if hasattr(candidate, "set_epoch"):
            candidate.set_epoch(epoch)
            return
