"""The largest structure within a latency limit, found by timing whole slim networks."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import nn

from ..budgets.budget import Limits
from ..budgets.solver import Sweep
from ..errors import InfeasibleBudgetError
from .latency import LatencyModel
from .timing import Task, Timing

_FEW, _MANY = 9, 25  # turns: as many as last about 4 seconds, two networks in each
_TURNS_MS = 4000
_AIM = 0.96  # of the limit: room for the measured noise
_GOOD_ENOUGH = 0.92
_ROUNDS = 10
_TRIES = 3
_CALM, _NOISY = 0.08, 0.15  # half the distance between the quartiles, of the median


def fit(
    model: LatencyModel, sweep: Sweep, limits: Limits, build: Callable[[np.ndarray], nn.Module]
) -> tuple[np.ndarray, Timing]:
    """The largest structure whose measured latency is within the limit, and all other limits with it.

    Along the order in which channels enter, the latency of whole slim networks is measured at a few places. Between two of
    them, one within the limit and one above, it is taken to follow the sum over the layers in a straight line; the next
    place is where that line meets the limit. This ends when the measured figure is within the limit and close to it, or no
    further channel is allowed.

    Args:
        model: Prediction; its ``scale`` is set here. It must be the sweep's gauge for ``latency_ms``.
        sweep: Structures to choose from.
        limits: With ``latency_ms``.
        build: A network with fresh weights for kept units.

    Returns:
        Kept units [num_units], bool, and the measured milliseconds.

    Raises:
        InfeasibleBudgetError: The smallest structure takes longer; prints the measured range.

    Warns:
        UserWarning: The times scatter widely: the machine has other work, and the result is no better than they are.
    """
    keep, timing = _Fit(model, sweep, limits, build).run()
    if timing.spread > _NOISY * timing.median:
        warnings.warn(
            f"latency: the machine must have no other work while it is measured, got {timing.median:.4g} ms with a spread of "
            f"{timing.spread:.2g} ms; ask for the structure again when it is quiet",
            UserWarning,
            stacklevel=2,
        )
    return keep, timing


def _scatter(timings: Sequence[Timing]) -> float:
    return max(timing.spread / timing.median for timing in timings)


class _Fit:
    def __init__(
        self,
        model: LatencyModel,
        sweep: Sweep,
        limits: Limits,
        build: Callable[[np.ndarray], nn.Module],
    ) -> None:
        assert limits.latency_ms is not None
        self.model, self.sweep, self.limits, self.build = model, sweep, limits, build
        self.limit: float = limits.latency_ms
        # The widest network that the other limits allow. Every other one is timed in turns with it, since a machine that
        # has other work is slower now and faster later: what stays is how much faster one network is than the other.
        self.most = sweep.largest_steps(replace(limits, latency_ms=None))
        self._reference = model.task(build(sweep.keep(self.most)))
        self._count = _FEW
        self._reference_times = self._turns(self._reference)
        turns = int(_TURNS_MS / (2 * self._reference_times[0].median))
        self._count = min(max(turns, _FEW), _MANY)
        self._ratios = {self.most: Timing(1.0, 0.0, 1.0)}
        model.scale *= self._time(self.most).median / model.evaluate(sweep.keep(self.most))

    def run(self) -> tuple[np.ndarray, Timing]:
        best = None
        for turn in range(_ROUNDS):
            times = {steps: self._time(steps).median for steps in sorted(self._ratios)}
            best = max((s for s, t in times.items() if t <= self.limit), default=None)
            if best == self.most:
                break
            above = min(s for s in times if times[s] > self.limit and (best is None or s > best))
            if above == 0:
                raise InfeasibleBudgetError(self._infeasible())
            if best is not None and (times[best] >= _GOOD_ENOUGH * self.limit or above == best + 1):
                break
            self._measure(self._next(times, best, above, bisect=turn % 3 == 2))
        times = {steps: self._time(steps) for steps in self._ratios}
        within = [steps for steps, timing in times.items() if timing.median <= self.limit]
        if not within:
            self._measure(0)
            if self._time(0).median > self.limit:
                raise InfeasibleBudgetError(self._infeasible())
            within = [0]
        best = max(within)
        return self.sweep.keep(best), self._time(best)

    def _measure(self, steps: int) -> None:
        task = self.model.task(self.build(self.sweep.keep(steps)))
        found, reference = self._turns(task, self._reference)
        self._reference_times.append(reference)
        scale = 1 / reference.median
        self._ratios[steps] = Timing(*(scale * value for value in found))

    def _turns(self, *tasks: Task) -> list[Timing]:
        """Times of tasks in turns: those of a calm moment, if there is one within a few tries."""
        tries: list[list[Timing]] = []
        while len(tries) < _TRIES:
            tries.append(self.model.timer(tasks, self._count))
            if _scatter(tries[-1]) <= _CALM:
                break
        return min(tries, key=_scatter)

    def _time(self, steps: int) -> Timing:
        """Milliseconds at a place that was measured, by all that is known of the reference."""
        reference = statistics.median(t.median for t in self._reference_times)
        spread = statistics.median(t.spread for t in self._reference_times)
        ratio = self._ratios[steps]
        return Timing(
            ratio.median * reference,
            max(ratio.spread * reference, ratio.median * spread),
            ratio.best * reference,
        )

    def _next(self, times: dict[int, float], low: int | None, high: int, bisect: bool) -> int:
        """Where to measure next: above ``low``, which is within the limit (None: none is known), and below ``high``."""
        predict = self.model.evaluate
        at_high = predict(self.sweep.keep(high))
        if low is None:
            wanted = at_high * _AIM * self.limit / times[high]
        else:
            at_low = predict(self.sweep.keep(low))
            share = (_AIM * self.limit - times[low]) / (times[high] - times[low])
            # Every third place halves what is left, should the line be a bad guess again and again.
            share = 0.5 if bisect else min(max(share, 0.0), 1.0)
            wanted = at_low + share * (at_high - at_low)
        first = 0 if low is None else low + 1
        below, above = first - 1, high  # the most steps that are predicted to be within ``wanted``
        while above - below > 1:
            middle = (below + above) // 2
            if predict(self.sweep.keep(middle)) <= wanted:
                below = middle
            else:
                above = middle
        return max(below, first)

    def _infeasible(self) -> str:
        whole = self.model.measure(self.build(np.ones_like(self.sweep.keep(0))))
        smallest, limits, run = self._time(0), self.limits, self.model.run
        rules = ", widen widths or ignore less" if limits.widths or limits.ignore else ""
        return (
            f"solve: budget must be feasible: latency_ms must be in [{smallest.median:.4g}, {whole.median:.4g}] (measured on "
            f"{self.model.device}, batch {run.batch}, {run.precision}, spread {smallest.spread:.2g} ms), got {self.limit:g}; "
            f"raise the limit, lower min_channels ({limits.min_channels}) or multiple_of ({limits.multiple_of}){rules}, or "
            "make more groups prunable"
        )
