"""The costs of a slim network that only the model itself can tell: peak activation memory and latency."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from ..budgets.budget import Budget, Limits
from ..budgets.cost import CostModel, count
from ..budgets.deployment import Deployment
from ..budgets.limit_check import LimitCheck
from ..budgets.solver import Gauge, Sweep, costs_of
from ..budgets.structure import Structure
from ..errors import ModelError
from ..gating.scope import chosen_units
from ..graph.analysis import ChannelGraph, channel_graph
from ..graph.groups import ChannelGroups
from ..graph.trace import trace
from ..slimming.slim import slim
from .bars import Bars, silent
from .latency import LatencyModel
from .latency_fit import fit
from .memory import ActivationModel, allocations
from .noise import busy, decides, shown
from .timing import Timing

_GAUGED = ("peak_activation_bytes", "latency_ms", "latency")


class Meters:
    """Gauges for one model and its groups, each made when a budget first asks for it.

    Args:
        groups: Groups whose units are kept or dropped.
        cost_model: Of ``groups``.
        model: The whole network, never modified; None where it is not known.
        input_shape: Of one image, (C, H, W).
        graph: Analysis of the model, if there is one; else the model is traced when it is needed.
        bars: Show how far a measurement of latency is.
    """

    def __init__(
        self,
        groups: ChannelGroups,
        cost_model: CostModel,
        model: nn.Module | None,
        input_shape: tuple[int, ...] | None,
        graph: ChannelGraph | None = None,
        bars: Bars = silent,
    ) -> None:
        self.groups, self.cost_model = groups, cost_model
        self.bars = bars
        self.model, self.input_shape = model, input_shape
        self._graph = graph
        self._memory: dict[tuple[int, str], ActivationModel] = {}
        self._latency: dict[Deployment, LatencyModel] = {}

    def limits(self, budget: Budget, reference: tuple[int, int]) -> Limits:
        """A budget in absolute numbers. Shares of activations and of latency are those of the whole network, measured once.

        Raises:
            BusyMachineError: A share of latency, and the whole network's times scatter too widely.
        """
        peak = latency = None
        if isinstance(budget.peak_activation_bytes, float):
            peak = self.memory(budget.run).base
        if budget.latency is not None:
            latency = self._whole_latency(budget)
        return budget.resolve(reference, peak, latency)

    def _whole_latency(self, budget: Budget) -> float:
        model = self.latency(budget.run)
        if model.whole is None:
            assert self.model is not None and budget.latency is not None
            with self.bars(1, "measuring the dense network") as bar:
                found = model.measure(self.model)
                bar.update()
            if not decides(found, budget.latency * found.median):
                raise busy(shown(found), budget.latency * found.median, budget.run)
            model.whole = found.median
        return model.whole

    def choose(
        self, gates: np.ndarray, died_at: np.ndarray, limits: Limits
    ) -> tuple[np.ndarray, dict[str, Timing]]:
        """The largest structure within all limits, and what had to be measured to find it.

        Args:
            gates: Gate of every unit. [num_units], float.
            died_at: Step at which the gate reached 0, or -1. [num_units], int.
            limits: Absolute limits.

        Returns:
            Kept units [num_units], bool, and measured figures. ``{cost: figure}``.

        Raises:
            BudgetError, InfeasibleBudgetError: As ``solver.solve``; for a device that is not there.
            BusyMachineError: Latency is limited, and its times scatter too widely.
            ModelError: A limit needs the model, which is not known.
        """
        sweep = Sweep.within(
            self.groups, gates, died_at, limits, self.cost_model, self.gauges(limits)
        )
        if limits.latency_ms is None:
            return sweep.largest(limits), {}
        keep, timing = fit(self.latency(limits.run), sweep, limits, self._fresh, self.bars)
        return keep, {"latency_ms": timing}

    def gauges(self, limits: Limits) -> dict[str, Gauge]:
        """What measures the limits that the cost model does not know. ``{cost: gauge}``."""
        made: dict[str, Gauge] = {}
        if limits.peak_activation_bytes is not None:
            made["peak_activation_bytes"] = self.memory(limits.run)
        if limits.latency_ms is not None:
            made["latency_ms"] = self.latency(limits.run)
        return made

    def memory(self, run: Deployment) -> ActivationModel:
        """Peak bytes of activations of a batch."""
        key = (run.batch, run.precision)
        if key not in self._memory:
            graph, images = self._traced("peak_activation_bytes"), self._images(run.batch)
            self._memory[key] = ActivationModel(
                allocations(graph.traced.eval, (images,)),
                chosen_units(graph, self.groups),
                self.groups.num_units,
                run.dtype.itemsize,
            )
        return self._memory[key]

    def latency(self, run: Deployment) -> LatencyModel:
        """Milliseconds of a forward pass. The first call measures the layers that the cache does not know."""
        if run not in self._latency:
            run.place_to_measure()  # what is not there is an error before anything is traced
            graph = self._traced("latency_ms")
            assert self.input_shape is not None
            self._latency[run] = LatencyModel(
                graph.traced.eval,
                chosen_units(graph, self.groups),
                self.groups.num_units,
                self.input_shape,
                run,
                bars=self.bars,
                predict=None if run.runtime == "eager" else self._macs,
            )
        return self._latency[run]

    def checks(
        self, keep: np.ndarray, limits: Limits, measured: dict[str, Timing]
    ) -> tuple[LimitCheck, ...]:
        """Every limit beside its prediction, and what was measured."""
        whole = np.ones(self.groups.num_units, dtype=bool)
        gauges = self.gauges(limits)
        costs = costs_of(keep, limits, self.cost_model, gauges)
        of_whole = costs_of(whole, limits, self.cost_model, gauges)
        return tuple(
            LimitCheck(
                name,
                asked,
                costs[name],
                of_whole[name],
                measured[name].median if name in measured else None,
                measured[name].spread if name in measured else None,
            )
            for name, asked in limits.asked().items()
        )

    def measure(self, network: nn.Module, limits: Limits) -> dict[str, Timing]:
        """Every limited cost, found anew on a slim network. ``{cost: figure}``."""
        shape = self._shape("measure")
        found: dict[str, float] = {}
        asked = limits.asked()
        if asked.keys() & {"macs", "params", "weight_bytes"}:
            parameter = next(network.parameters())
            image = torch.zeros(1, *shape, dtype=parameter.dtype, device=parameter.device)
            cost = count(network, image)
            found |= {"macs": cost.macs, "params": cost.params}
            found["weight_bytes"] = cost.params * limits.run.dtype.itemsize
        if "peak_activation_bytes" in asked:
            images = self._images(limits.run.batch)
            blocks = allocations(trace(network, images).eval, (images,))
            nothing = np.zeros(0, dtype=np.int64)
            found["peak_activation_bytes"] = ActivationModel(
                blocks, nothing, 0, limits.run.dtype.itemsize
            ).base
        timings = {name: Timing(found[name], 0.0, found[name]) for name in asked if name in found}
        if "latency_ms" in asked:
            timings["latency_ms"] = self.latency(limits.run).measure(network)
        return timings

    def release(self) -> None:
        """Let go of the analysis, whose modules a search may change."""
        self._graph = None

    def _macs(self, keep: np.ndarray) -> float:
        return float(self.cost_model.evaluate(keep)[0])

    def _fresh(self, keep: np.ndarray) -> nn.Module:
        assert self.model is not None
        return slim(self.model, Structure.from_keep(self.groups, keep, self.cost_model), seed=0)

    def _shape(self, what: str) -> tuple[int, ...]:
        if self.model is None or self.input_shape is None:
            raise ModelError(
                f"structure_for: {what} must be found on the model, got a result without one; use load(path, model)"
            )
        return self.input_shape

    def _images(self, batch: int) -> torch.Tensor:
        assert self.model is not None
        like = next(self.model.parameters())
        return torch.empty(batch, *self._shape("images"), dtype=like.dtype, device=like.device)

    def _traced(self, what: str) -> ChannelGraph:
        self._shape(what)
        if self._graph is None:
            assert self.model is not None
            self._graph = channel_graph(self.model, self._images(1))
        return self._graph


def needs_model(budget: Budget) -> bool:
    """Whether a limit can be judged only with the model at hand."""
    return any(getattr(budget, name) is not None for name in _GAUGED)
