"""Everything that is decided before the first step of a search: device, kernels, groups, gates, network."""

from __future__ import annotations

import numbers
from dataclasses import dataclass, replace
from functools import partial
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import _library, ops
from .._tensors import require_dense
from ..budgets.bounds import without_ignored
from ..budgets.budget import Budget, Limits
from ..budgets.cost import CostModel, count
from ..budgets.ranking import Ranking
from ..errors import BackendError, BudgetError, ConfigError
from ..gating.absorbing import absorbing_groups
from ..gating.compaction import Compaction
from ..gating.fuse_convs import fuse_convs
from ..gating.gated import GatedNetwork
from ..gating.gates import GateBank, GateState
from ..gating.scope import chosen_units, gate_sites, gated_groups
from ..gating.widths import preferred_multiple, width_rules
from ..graph.analysis import channel_graph
from ..graph.groups import ChannelGroups
from ..measuring.meters import Meters
from ..ops import reference as reference_ops
from ..training.progress import Progress
from .config import PRECISIONS, SearchConfig, compute_dtype
from .loop import SearchLoop
from .result import SearchResult
from .stability import StabilityWatch


@dataclass(frozen=True)
class Plan:
    """A search that is ready to start.

    Attributes:
        model: The user's, untouched.
        groups: Gated groups.
        budget: As asked.
        reference: ``(macs, params)`` that shares refer to.
        config: With target, precision and backend resolved.
        loop: The state machine, at step 0.
        input_shape: Of one image.
        meters: What was measured to judge the budget.
        progress: Whether measuring shows progress.
    """

    model: nn.Module
    groups: ChannelGroups
    budget: Budget
    reference: tuple[int, int]
    config: SearchConfig
    loop: SearchLoop
    input_shape: tuple[int, ...]
    meters: Meters
    progress: bool

    def result(self, gates: tuple[Tensor, Tensor]) -> SearchResult:
        values, died_at = (t.detach().cpu().clone() for t in gates)
        result = SearchResult(
            self.groups,
            values,
            died_at,
            self.budget,
            self.reference,
            self.config,
            list(self.loop.state.history),
            self.model,
            self.input_shape,
            self.progress,
        )
        result._meters = self.meters
        return result


def prepare(
    model: nn.Module,
    images: Tensor,
    budget: Budget,
    config: SearchConfig,
    *,
    device: torch.device,
    example_input: Tensor | tuple[Tensor, ...] | None = None,
    reference: nn.Module | int | None = None,
    track_stats: bool = False,
    progress: bool = True,
) -> Plan:
    """Analyse a model and attach its gates; arguments and errors as in ``search``.

    Args:
        images: A batch of the loader. [N, C, H, W].
        track_stats: Keep running statistics, for validation.
        progress: Show how far the measurement of a latency limit is.
    """
    example = images[:1] if example_input is None else example_input
    graph = channel_graph(model, _for_model(example, model))
    groups = gated_groups(graph, model, config.scope)
    groups = without_ignored(groups, budget.ignore)
    cost_model = CostModel(groups)
    share_base = _reference(reference, budget, example, cost_model.base)
    shape = tuple(images.shape[1:])
    bars = partial(Progress, enabled=progress)
    meters = Meters(groups, cost_model, model, shape, graph, bars)
    # An infeasible budget is an error before any training. Every structure starts from the same floor.
    limits = meters.limits(budget, share_base)
    alike = np.zeros(groups.num_units)
    evenly, _ = meters.choose(*Ranking(cost_model, "uniform").scores(alike, alike), limits)
    meters.release()
    dtype = compute_dtype(config.precision, device)
    kernels = _kernels(config.backend, device)
    config = replace(
        config,
        target=config.target or _target(limits, cost_model.evaluate(evenly), share_base),
        precision=next(name for name, value in PRECISIONS.items() if value == dtype)
        if config.precision == "auto"
        else config.precision,
        backend="reference" if kernels is reference_ops else "fused",
    )
    gate_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    state = GateState.create(groups.num_units, config.gate_init, gate_dtype, device)
    sites = gate_sites(graph, groups, config.scope)
    bank = GateBank(groups, sites, state)
    network = GatedNetwork(
        graph,
        bank,
        kernels,
        dtype=dtype,
        channels_last=config.channels_last,
        track_stats=track_stats,
        fast_convs=config.winograd,
    )
    absorbing = absorbing_groups(network, groups, chosen_units(graph, groups))
    fuse_convs(network.train_net, kernels)
    own = device.type == "cpu" and kernels is ops and config.channels_last and config.winograd
    widths = width_rules(
        network, groups, preferred_multiple(device), own_dtype=dtype if own else None
    )
    compaction = Compaction(network, bank, groups, sites, absorbing, widths)
    watch = None
    if config.patience is not None:
        watch = StabilityWatch(
            groups,
            limits,
            cost_model,
            config.patience,
            config.tolerance,
            meters.gauges(limits),
            config.ranks_by,
        )
    loop = SearchLoop(network, bank, config, kernels, dtype, compaction, watch)
    return Plan(model, groups, budget, share_base, config, loop, shape, meters, progress)


def choose_device(device: torch.device | str | None) -> torch.device:
    if device is None:
        return (
            torch.device("cuda", torch.cuda.current_device())
            if torch.cuda.is_available()
            else torch.device("cpu")
        )
    try:
        chosen = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"search: device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}"
        ) from error
    if chosen.type not in ("cpu", "cuda"):
        raise ConfigError(
            f"search: device must be a CPU or CUDA device, got '{chosen}'; use device='cpu'"
        )
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(
                f"search: device must be there, got '{chosen}' without a CUDA device; use device='cpu'"
            )
        chosen = torch.device(
            "cuda", torch.cuda.current_device() if chosen.index is None else chosen.index
        )
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
    if not inputs or not all(isinstance(x, Tensor) and (x.is_nested or x.dim()) for x in inputs):
        raise ConfigError(
            f"search: example_input must be a tensor or a tuple of tensors [N, C, ...], got {type(example).__name__}"
        )
    for x in inputs:
        require_dense(ConfigError, "search: example_input", x)
    if parameter is None:
        return inputs
    return tuple(
        x.to(parameter.device, parameter.dtype if x.is_floating_point() else x.dtype)
        for x in inputs
    )


def _reference(
    reference: nn.Module | int | None, budget: Budget, example: Any, base: tuple[int, int]
) -> tuple[int, int]:
    """``(macs, params)`` that a share refers to."""
    if reference is None:
        return base
    if isinstance(reference, nn.Module):
        cost = count(reference, _for_model(example, reference))
        return cost.macs, cost.params
    real = isinstance(reference, numbers.Real) and not isinstance(reference, bool)
    if not real or not 1 <= reference < 2**63:
        got = "more than 2**63" if real and reference > 1 else repr(reference)
        raise BudgetError(
            f"search: reference must be a module or a number of MACs of at least 1, got {got}; leave it out for "
            "the model itself"
        )
    share = next((s for s in (budget.params, budget.weight_bytes) if isinstance(s, float)), None)
    if share is not None:
        raise BudgetError(
            f"search: reference must be a module for a share of parameters ({share:g}), got a number of MACs; pass "
            "the reference network, or an absolute number of parameters"
        )
    return int(reference), base[1]


def _target(limits: Limits, evenly: tuple[int, int], reference: tuple[int, int]) -> float:
    """r by default: the budget as a share of the reference.

    Of MACs if they are limited, else of parameters. Where the tightest limit may be another, the MACs that are left of a network
    that every limit allows and that is narrowed evenly.

    Args:
        limits: The budget.
        evenly: ``(macs, params)`` of that network.
        reference: ``(macs, params)`` that shares refer to.
    """
    if limits.asked().keys() - {"macs", "params"}:
        share = evenly[0] / reference[0]
    elif limits.macs is not None:
        share = limits.macs / reference[0]
    else:
        share = limits.params / reference[1]
    return min(share, 1.0)
