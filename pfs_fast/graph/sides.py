"""Which channels of many tensors a set of kept units leaves, and how many, all at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .groups import FIXED


class Sides:
    """Channel axes, each given by the units of its channels.

    Args:
        num_units: Number of units.
        axes: Unit of every channel of each axis, ``FIXED`` where it is always kept. Equal axes are counted once.

    Attributes:
        full: Channels of each distinct axis. [number of distinct axes], int64.
        index: Distinct axis of each given one. [len(axes)], int64.
    """

    def __init__(self, num_units: int, axes: Sequence[np.ndarray]) -> None:
        order: dict[bytes, int] = {}
        distinct: list[np.ndarray] = []
        self.index = np.zeros(len(axes), dtype=np.int64)
        for position, units in enumerate(axes):
            units = np.sort(np.asarray(units, dtype=np.int64))
            key = units.tobytes()
            if key not in order:
                order[key] = len(distinct)
                distinct.append(units)
            self.index[position] = order[key]
        self.full = np.array([len(units) for units in distinct], dtype=np.int64)
        self._fixed = np.array([np.count_nonzero(u == FIXED) for u in distinct], dtype=np.int64)
        # All prunable channels in one row, and where each axis ends in it.
        prunable = [units[units != FIXED] for units in distinct]
        self._units = np.concatenate([np.zeros(0, dtype=np.int64), *prunable])
        self._ends = np.cumsum([len(units) for units in prunable], dtype=np.int64)
        self._num_units = num_units

    def widths(self, keep: np.ndarray) -> np.ndarray:
        """Kept channels of each distinct axis. ``keep``: [num_units], bool. [number of distinct axes], int64."""
        until = np.zeros(len(self._units) + 1, dtype=np.int64)
        np.cumsum(keep[self._units], out=until[1:])
        ends = until[self._ends]
        return self._fixed + np.diff(ends, prepend=0)


class Axes:
    """Channel axes whose kept channels are wanted by index.

    Args:
        axes: Unit of every channel of each axis, in the order of its channels; ``FIXED`` where it is always kept.
    """

    def __init__(self, axes: Sequence[np.ndarray]) -> None:
        order: dict[bytes, int] = {}
        distinct: list[np.ndarray] = []
        self._index: list[int | None] = []  # None: every channel of the axis stays
        for units in axes:
            units = np.asarray(units, dtype=np.int64)
            if not (units != FIXED).any():
                self._index.append(None)
                continue
            key = units.tobytes()
            if key not in order:
                order[key] = len(distinct)
                distinct.append(units)
            self._index.append(order[key])
        self._units = np.concatenate([np.zeros(0, dtype=np.int64), *distinct])
        lengths = [len(units) for units in distinct]
        self._ends = np.cumsum(lengths, dtype=np.int64)
        self._position = np.concatenate(
            [np.zeros(0, dtype=np.int64), *map(np.arange, lengths)]
        )  # of each channel in its axis

    def kept(self, keep: np.ndarray) -> list[tuple[int, ...] | None]:
        """Kept channels of each axis, ascending; None where no channel is prunable. ``keep``: [num_units], bool."""
        stays = np.append(keep, True)[self._units]  # FIXED, -1, reads the last entry
        positions = self._position[stays].tolist()
        ends = np.concatenate([[0], np.cumsum(stays)])[self._ends].tolist()
        found = [tuple(positions[a:b]) for a, b in zip([0, *ends], ends, strict=False)]
        return [None if index is None else found[index] for index in self._index]
