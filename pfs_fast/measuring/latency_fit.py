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
from .bars import Bar, Bars, silent
from .latency import LatencyModel
from .noise import busy, decides, shown
from .timing import Task, Timing

_FEW, _MANY = 9, 25  # turns: as many as last about 4 seconds, two networks in each
_TURNS_MS = 4000
_AIM = 0.96  # of the limit: room for the measured noise
_GOOD_ENOUGH = 0.92
_ROUNDS = 10
_TRIES = 3  # of a measurement whose times scatter
_TRIES_OF_NOISE = 6  # of one that decides nothing
_TRIES_MS = 60_000  # for all tries after the first ones; half of it is kept for those of noise
_SURE = 0.03  # spread, of the median, up to which one measurement within the limit is enough
_CALM, _NOISY = 0.08, 0.15  # half the distance between the quartiles, of the median


def fit(
    model: LatencyModel,
    sweep: Sweep,
    limits: Limits,
    build: Callable[[np.ndarray], nn.Module],
    bars: Bars = silent,
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
        bars: Show how many networks are measured.

    Returns:
        Kept units [num_units], bool, and the measured milliseconds.

    Raises:
        InfeasibleBudgetError: The smallest structure takes longer; prints the measured range.
        BusyMachineError: The times scatter too widely to decide by (``noise.decides``), or the smallest structure seems
            slower than the whole network, after several tries.

    Warns:
        UserWarning: The times scatter widely: the machine has other work, and the result is no better than they are.
    """
    with bars(_ROUNDS + 1, "measuring networks") as bar:
        keep, timing = _Fit(model, sweep, limits, build, bar).run()
    if timing.spread > _NOISY * timing.median:
        warnings.warn(
            f"latency: the machine must have no other work while it is measured, got {shown(timing)}; "
            "ask for the structure again when it is quiet",
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
        bar: Bar,
    ) -> None:
        assert limits.latency_ms is not None
        self.model, self.sweep, self.limits, self.build = model, sweep, limits, build
        self.limit: float = limits.latency_ms
        self.bar = bar
        self._tries_ms: float = _TRIES_MS
        self._confirmed: set[int] = set()
        self._fixed: Timing | None = None  # the reference's times, where they shall not drift
        # The widest network that the other limits allow. Every other one is timed in turns with it, since a machine that
        # has other work is slower now and faster later: what stays is how much faster one network is than the other.
        self.most = sweep.largest_steps(replace(limits, latency_ms=None))
        self._reference = model.task(build(sweep.keep(self.most)))
        self._count = _FEW
        self._reference_times = self._turns(self._reference)
        bar.update()
        turns = int(_TURNS_MS / (2 * self._reference_times[0].median))
        self._count = min(max(turns, _FEW), _MANY)
        self._ratios = {self.most: Timing(1.0, 0.0, 1.0)}
        if limits.latency is not None:
            self._fix_reference()
        model.scale *= self._time(self.most).median / model.evaluate(sweep.keep(self.most))

    def _fix_reference(self) -> None:
        """A limit that is a share of the dense network's latency is judged by ratios to that network alone."""
        keep = self.sweep.keep(self.most)
        assert self.model.whole is not None
        ratio = 1.0 if keep.all() else self._ratio(np.ones_like(keep)).median
        found = self._reference_times[0]
        scale = self.model.whole / ratio / found.median
        self._fixed = Timing(*(scale * value for value in found))

    def run(self) -> tuple[np.ndarray, Timing]:
        best = None
        for turn in range(_ROUNDS):
            times = {steps: self._time(steps).median for steps in sorted(self._ratios)}
            best = max((s for s, t in times.items() if t <= self.limit), default=None)
            if best is not None and not self._is_sure(best):
                self._confirm(best)
                self.bar.update()
                continue
            if best == self.most:
                break
            above = min(s for s in times if times[s] > self.limit and (best is None or s > best))
            if above == 0:
                self._check_smallest()
                continue
            if best is not None and (times[best] >= _GOOD_ENOUGH * self.limit or above == best + 1):
                break
            self._measure(self._next(times, best, above, bisect=turn % 3 == 2))
            self.bar.update()
        times = {steps: self._time(steps) for steps in self._ratios}
        within = [steps for steps, timing in times.items() if timing.median <= self.limit]
        if not within:
            self._measure(0)
            self._check_smallest()
            within = [0]
        best = max(within)
        timing = self._time(best)
        self._check_noise([timing])
        return self.sweep.keep(best), timing

    def _check_smallest(self) -> None:
        """Raises where the smallest structure is above the limit.

        Where it also seems slower than the whole network, that is noise, and it is measured again.
        """
        whole = np.ones_like(self.sweep.keep(0))
        for tries in range(_TRIES):
            if tries:
                self._measure(0)
            smallest = self._time(0)
            if smallest.median <= self.limit:
                return
            same = self.sweep.keep(self.most).all()
            largest = self._time(self.most) if same else self._scaled(self._ratio(whole))
            if smallest.median <= largest.median:
                self._check_noise([smallest])
                raise InfeasibleBudgetError(self._infeasible(smallest, largest))
        raise busy(
            f"{shown(smallest)} for the smallest structure and {shown(largest)} for the whole network",
            self.limit,
            self.model.run,
        )

    def _is_sure(self, steps: int) -> bool:
        """Whether a place within the limit is so by more than noise, or was measured twice.

        The largest of several noisy places within a limit is the one that was measured too fast.
        """
        timing = self._time(steps)
        calm = timing.spread <= _SURE * timing.median or timing.median + timing.spread <= self.limit
        return calm or steps in self._confirmed or steps == self.most

    def _confirm(self, steps: int) -> None:
        first, second = self._ratios[steps], self._ratio(self.sweep.keep(steps))
        self._ratios[steps] = Timing(
            *(statistics.fmean(pair) for pair in zip(first, second, strict=True))
        )
        self._confirmed.add(steps)

    def _measure(self, steps: int) -> None:
        self._ratios[steps] = self._ratio(self.sweep.keep(steps))

    def _ratio(self, keep: np.ndarray) -> Timing:
        """Time of a network as a share of the reference's, both taken in turns."""
        found, reference = self._turns(self.model.task(self.build(keep)), self._reference)
        self._reference_times.append(reference)
        scale = 1 / reference.median
        return Timing(*(scale * value for value in found))

    def _turns(self, *tasks: Task) -> list[Timing]:
        """Times of tasks in turns: those of a calm moment, if there is one within a few tries.

        Times that decide nothing get more tries, while there is time for them.
        """
        tries: list[list[Timing]] = []
        most, kept_ms = 1, 0.0
        while len(tries) < most and (not tries or self._tries_ms > kept_ms):
            tries.append(self.model.timer(tasks, self._count))
            if len(tries) > 1:
                self._tries_ms -= self._count * sum(timing.median for timing in tries[-1])
            found = min(tries, key=_scatter)
            self.bar.update(0, at=shown(found[0]), tries=len(tries), limit=f"{self.limit:.4g} ms")
            if not all(decides(timing, self.limit) for timing in found):
                most, kept_ms = _TRIES_OF_NOISE, 0.0
            elif _scatter(found) > _CALM:
                most, kept_ms = _TRIES, _TRIES_MS / 2
            else:
                break
        self._check_noise(found, f" in the calmest of {len(tries)} tries" if len(tries) > 1 else "")
        return found

    def _check_noise(self, timings: Sequence[Timing], tries: str = "") -> None:
        for timing in timings:
            if not decides(timing, self.limit):
                raise busy(shown(timing) + tries, self.limit, self.model.run)

    def _time(self, steps: int) -> Timing:
        """Milliseconds at a place that was measured."""
        return self._scaled(self._ratios[steps])

    def _scaled(self, ratio: Timing) -> Timing:
        """Milliseconds of a share of the reference's time, by all that is known of the reference."""
        times = self._reference_times if self._fixed is None else [self._fixed]
        reference = statistics.median(t.median for t in times)
        spread = statistics.median(t.spread for t in times)
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

    def _infeasible(self, smallest: Timing, whole: Timing) -> str:
        limits, run = self.limits, self.model.run
        rules = ", widen widths or ignore less" if limits.widths or limits.ignore else ""
        runtime = "" if run.runtime == "eager" else f", {run.runtime}"
        return (
            f"solve: budget must be feasible: latency_ms must be in [{smallest.median:.4g}, {whole.median:.4g}] (measured on "
            f"{self.model.device}, batch {run.batch}, {run.precision}{runtime}, spread {smallest.spread:.2g} ms), got {self.limit:g}; "
            f"raise the limit, lower min_channels ({limits.min_channels}) or multiple_of ({limits.multiple_of}){rules}, or "
            "make more groups prunable"
        )
