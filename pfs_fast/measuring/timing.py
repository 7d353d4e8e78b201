"""How long something takes: warmed up, interleaved, medians with their spread."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from .._ambient import turn

_SAMPLE_S = (
    3e-4  # a sample repeats its call until it lasts this long, well above the timer's resolution
)
_SLOW_S = 0.05  # a call that takes longer is sampled less often


class Timing(NamedTuple):
    """Milliseconds of one call.

    Attributes:
        median: Of all samples.
        spread: Half the distance between the quartiles.
        best: Of the fastest sample: what else the machine does can only add to it.
    """

    median: float
    spread: float
    best: float


@dataclass(frozen=True)
class Task:
    """Something to time.

    Attributes:
        name: What it is, for a reader.
        widths: Channels that it works on, (in, out) of a layer; empty for a whole network.
        run: One call.
        network: The network, where the task is a whole one.
    """

    name: str
    widths: tuple[int, ...]
    run: Callable[[], object]
    network: nn.Module | None = None


class Timer(Protocol):
    """Measures tasks side by side."""

    def __call__(self, tasks: Sequence[Task], samples: int) -> list[Timing]: ...


class DeviceTimer:
    """Times calls on a device.

    Every task is called before it is timed, then all tasks take turns, so that a slow moment of the machine meets each of
    them. A CUDA sample ends when the device has finished.

    Args:
        device: Where the calls compute.
        threads: CPU threads during the measurement; None: as they are.
    """

    def __init__(self, device: torch.device, threads: int | None = None) -> None:
        self.device = device
        self.threads = threads

    def __call__(self, tasks: Sequence[Task], samples: int) -> list[Timing]:
        times: list[list[float]] = [[] for _ in tasks]
        with torch.inference_mode(), _threads(self.threads):
            repeats = [self._repeats(task) for task in tasks]
            for turn in range(samples):
                for task, repeat, found in zip(tasks, repeats, times, strict=True):
                    if turn < 3 or repeat > 1 or found[0] < _SLOW_S or task.network is not None:
                        found.append(self._sample(task, repeat))
        return [_timing(found) for found in times]

    def _repeats(self, task: Task) -> int:
        self._sample(task, 1)  # the first call chooses algorithms and fills caches
        once = min(self._sample(task, 1), self._sample(task, 1))
        return max(1, min(1000, round(_SAMPLE_S / max(once, 1e-7))))

    def _sample(self, task: Task, repeat: int) -> float:
        run = task.run
        self._wait()
        start = time.perf_counter()
        for _ in range(repeat):
            run()
        self._wait()
        return (time.perf_counter() - start) / repeat

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _timing(seconds: list[float]) -> Timing:
    quarters = statistics.quantiles(seconds, n=4) if len(seconds) > 1 else [seconds[0]] * 3
    return Timing(
        1e3 * statistics.median(seconds), 1e3 * (quarters[2] - quarters[0]) / 2, 1e3 * min(seconds)
    )


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    with turn():  # the number is one for all threads
        before = torch.get_num_threads()
        try:
            if count is not None:
                torch.set_num_threads(count)
            yield
        finally:
            if count is not None:
                torch.set_num_threads(before)
