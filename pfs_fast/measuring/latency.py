"""Latency of a forward pass: predicted from a table of measured layers, measured end to end on the slim network.

The table holds the time of every distinct layer over a grid of widths, measured once on a machine and kept on disk.
Between the points it is interpolated, and made to rise with the width, as the solver needs. The sum over the layers
leaves out what layers do to each other (caches, launches that overlap), so
``latency_fit`` goes by whole networks.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import numpy as np
import torch
from torch import fx, nn

from ..budgets.deployment import Deployment
from ..graph.sides import Sides
from .bars import Bars, silent
from .latency_cache import LatencyCache, machine_key
from .latency_layers import operations
from .latency_table import measured_tables
from .runtimes import is_channels_last, own_randomness, task_of
from .timing import DeviceTimer, Task, Timer, Timing

_TURNS = 25


class LatencyModel:
    """Milliseconds of a forward pass for any set of kept units.

    Args:
        graph_module: Traced eval forward of the whole network, with labels in ``node.meta["labelled"]``.
        unit_of_label: Unit of each label, ``FIXED`` where it is held whole. [num_labels], int64.
        num_units: Number of units.
        input_shape: Of one image, (C, H, W).
        run: Device, batch, precision, threads.
        timer: Measures; default: the device's clock.
        cache: Folder of the tables; default: ``latency_cache.cache_folder()``.
        bars: Show how many layers are measured.
        predict: Cost of the network that keeps these units, up to a factor, in place of the sum over measured layers.

    Attributes:
        scale: Factor from the prediction to a whole network, as ``latency_fit`` found it at the first one.
        whole: Milliseconds of the whole network, once it was measured.

    Raises:
        BudgetError: The device is not there, or has not the processors for so many threads.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        unit_of_label: np.ndarray,
        num_units: int,
        input_shape: tuple[int, ...],
        run: Deployment,
        *,
        timer: Timer | None = None,
        cache: str | os.PathLike[str] | None = None,
        bars: Bars = silent,
        predict: Callable[[np.ndarray], float] | None = None,
    ) -> None:
        device = run.place_to_measure()
        self.run, self.device, self.input_shape = run, device, tuple(input_shape)
        self.timer = DeviceTimer(device, run.threads) if timer is None else timer
        self.channels_last = is_channels_last(graph_module)
        self.scale, self.whole = 1.0, None
        self._predict = predict
        if predict is None:
            self._predict = self._summed_layers(graph_module, unit_of_label, num_units, cache, bars)

    def evaluate(self, keep: np.ndarray) -> float:
        """Predicted milliseconds of the network that keeps these units. ``keep``: [num_units], bool."""
        return self.scale * self._predict(keep)

    def measure(self, network: nn.Module) -> Timing:
        """Milliseconds of a forward pass of a network, end to end, in eval mode. The network is not modified."""
        return self.timer([self.task(network)], _TURNS)[0]

    def _summed_layers(
        self,
        graph_module: fx.GraphModule,
        unit_of_label: np.ndarray,
        num_units: int,
        cache: str | os.PathLike[str] | None,
        bars: Bars,
    ) -> Callable[[np.ndarray], float]:
        """The sum over all layers, each by a table of times that are measured here or known from before."""
        run, device = self.run, self.device
        layout = "channels_last" if self.channels_last else "contiguous"
        like = next(graph_module.parameters())
        images = torch.empty((run.batch, *self.input_shape), dtype=like.dtype, device=like.device)
        with own_randomness(device):
            found = operations(
                graph_module, (images,), unit_of_label, device, run.dtype, self.channels_last
            )
            kept = LatencyCache(machine_key(run, self.input_shape, layout), cache)
            measured = measured_tables(found, self.timer, kept, bars)
        sides = Sides(num_units, [u for op in found for u in (op.in_units, op.out_units)])
        rows = {key: row for row, key in enumerate(measured)}
        row_of = np.array([rows[op.signature, op.grid()] for op in found])
        tables = [
            (table, np.flatnonzero(row_of == row)) for row, table in enumerate(measured.values())
        ]

        def total(keep: np.ndarray) -> float:
            widths = sides.widths(keep)[sides.index].reshape(-1, 2)
            return sum(
                float(table(widths[layers, 0], widths[layers, 1]).sum()) for table, layers in tables
            )

        return total

    def task(self, network: nn.Module) -> Task:
        """A copy of a network, ready to be timed as it will run."""
        return task_of(network, self.input_shape, self.run, channels_last=self.channels_last)
