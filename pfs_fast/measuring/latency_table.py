"""Measured times of layers over grids of widths, and what lies between the points."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from .bars import Bars, silent
from .latency_cache import LatencyCache, Points
from .latency_layers import Operation
from .timing import Timer

_SAMPLES = 7

Grid = tuple[tuple[int, ...], tuple[int, ...]]


class Table:
    """Milliseconds of one layer for any widths: bilinear between points, never falling where a width grows.

    Args:
        grid: Widths (in, out) of the points, ascending.
        times: Milliseconds. [in, out], float64.
    """

    def __init__(self, grid: Grid, times: np.ndarray) -> None:
        self._in, self._out = (np.array(widths, dtype=np.float64) for widths in grid)
        # A wider layer that was faster was noise, or a better kernel; the solver needs the worst so far.
        self._times = np.maximum.accumulate(np.maximum.accumulate(times, axis=0), axis=1)

    def __call__(self, inputs: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Milliseconds for each pair of widths; beyond the grid, those of its edge. [n], float64."""
        row, row_share = _between(self._in, inputs)
        column, column_share = _between(self._out, outputs)
        t = self._times
        next_row, next_column = (
            np.minimum(row + 1, t.shape[0] - 1),
            np.minimum(column + 1, t.shape[1] - 1),
        )
        low = t[row, column] * (1 - column_share) + t[row, next_column] * column_share
        high = t[next_row, column] * (1 - column_share) + t[next_row, next_column] * column_share
        return low * (1 - row_share) + high * row_share


def measured_tables(
    found: Sequence[Operation], timer: Timer, cache: LatencyCache, bars: Bars = silent
) -> dict[tuple[str, Grid], Table]:
    """A table for every distinct layer. What the cache does not know is measured, and added to it.

    All widths of a layer take turns while they are measured. ``bars`` shows how many layers are done.
    """
    distinct = {(op.signature, op.grid()): op for op in found}
    unknown = [
        (signature, grid)
        for signature, grid in distinct
        if {_key(pair) for pair in itertools.product(*grid)}
        - cache.points.get(signature, {}).keys()
    ]
    if unknown:
        new: Points = {}
        with bars(len(unknown), "measuring layers") as bar:
            for signature, grid in unknown:
                known = cache.points.get(signature, {}).keys() | new.get(signature, {}).keys()
                tasks = distinct[signature, grid].tasks()
                missing = [task for task in tasks if _key(task.widths) not in known]
                timings = timer(missing, _SAMPLES) if missing else []
                new.setdefault(signature, {}).update(
                    (_key(task.widths), max(float(timing.best), 1e-9))
                    for task, timing in zip(missing, timings, strict=True)
                )
                bar.update()
        cache.add(new)
    tables = {}
    for signature, grid in distinct:
        times = cache.points[signature]
        rows = [[times[_key((i, o))] for o in grid[1]] for i in grid[0]]
        tables[signature, grid] = Table(grid, np.array(rows, dtype=np.float64))
    return tables


def _between(points: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The point below each value, and how far the value is towards the next, in [0, 1]."""
    values = np.clip(values, points[0], points[-1])
    below = np.searchsorted(points, values, side="right") - 1
    above = np.minimum(below + 1, len(points) - 1)
    distance = np.maximum(points[above] - points[below], 1)
    return below, (values - points[below]) / distance


def _key(widths: tuple[int, ...]) -> str:
    return ",".join(map(str, widths))
