"""The timer: variants in alternating order within one process, medians with quartiles.

Variants are compared round by round: on a shared machine the ratio of two neighbours is worth more than two medians taken
minutes apart.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

TOTAL = "total"


def synchronize(device: torch.device) -> None:
    """Waits for the GPU, if the device is one."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Clock:
    """Splits one run of a variant into named phases; CUDA events on a GPU, wall time elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names: list[str] = []
        self._marks: list[torch.cuda.Event | float] = []
        self._mark()

    def _mark(self) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def restart(self) -> None:
        """Leaves out what has run so far."""
        synchronize(self._device)
        self._names.clear()
        self._marks.clear()
        self._mark()

    def lap(self, name: str) -> None:
        """Ends a phase."""
        self._names.append(name)
        self._mark()

    def read(self) -> dict[str, float]:
        """Milliseconds per phase, and their sum as ``total``. Waits for the GPU."""
        synchronize(self._device)
        laps: dict[str, float] = {}
        for name, start, end in zip(self._names, self._marks, self._marks[1:], strict=False):
            cuda = self._device.type == "cuda"
            ms = start.elapsed_time(end) if cuda else (end - start) * 1e3
            laps[name] = laps.get(name, 0.0) + ms
        laps[TOTAL] = sum(laps.values())
        return laps


# Runs once and calls clock.lap(...) after each phase.
Variant = Callable[[Clock], None]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of n values."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From at least one value."""
        quantiles = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64)
        middle, low, high = torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist()
        return cls(middle, low, high, len(values))

    def times(self, factor: float) -> Spread:
        """The spread of all values multiplied by a positive factor."""
        return Spread(self.median * factor, self.low * factor, self.high * factor, self.n)

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True)
class Timings:
    """Milliseconds of every round: ``rounds[variant][phase][round]``."""

    rounds: dict[str, dict[str, list[float]]]

    def time(self, variant: str, phase: str = TOTAL) -> Spread:
        """Milliseconds of a phase."""
        return Spread.of(self.rounds[variant][phase])

    def ratio(self, slow: str, fast: str, phase: str = TOTAL) -> Spread:
        """How many times longer ``slow`` takes than ``fast``, round by round."""
        pairs = zip(self.rounds[slow][phase], self.rounds[fast][phase], strict=True)
        return Spread.of([a / b for a, b in pairs])


@dataclass(frozen=True)
class Effort:
    """How much to measure of one case: rounds until ``seconds`` have passed, but ``least`` to ``most`` of them."""

    seconds: float
    least: int = 3
    most: int = 15
    warmup: int = 1


def time_variants(
    variants: Mapping[str, Variant], *, device: torch.device, effort: Effort
) -> Timings:
    """Times the variants in turn, in an order that changes from round to round.

    Args:
        variants: By name; all must lap the same phases.
        device: Whose clock to use.
        effort: How many rounds; those of the warm-up do not count.

    Returns:
        The times of all rounds.
    """
    names = list(variants)
    rounds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    start, done = time.perf_counter(), -effort.warmup
    while done < effort.least or (
        done < effort.most and time.perf_counter() - start < effort.seconds
    ):
        index = done + effort.warmup
        shift = index % len(names)
        order = names[shift:] + names[:shift]
        for name in order if index // len(names) % 2 == 0 else reversed(order):
            synchronize(device)
            clock = Clock(device)
            variants[name](clock)
            for phase, ms in clock.read().items():
                if done >= 0:
                    rounds[name].setdefault(phase, []).append(ms)
        done += 1
        if done == 0:
            start = time.perf_counter()
    return Timings(rounds)
