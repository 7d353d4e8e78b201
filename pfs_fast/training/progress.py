"""One line of live progress for loops of many short steps: a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, TextIO

from ..errors import ConfigError

BAR_INTERVAL = 0.2
"""Seconds between two refreshes on a terminal. A refresh may read a tensor of the device, so it is kept rare."""

LINE_INTERVAL = 5.0
"""Seconds between two plain lines where the output is a file or a pipe; more in long runs."""

LINES_SHARE = 50
"""The interval grows to this fraction of the time passed, so that a run of hours does not fill its log."""

RATE_SMOOTHING = 0.5
"""Weight of the newest interval in the step time: the step gets faster during a search, so the mean would lag."""

PERCENT_METRICS = frozenset({"acc", "alive", "best", "change", "val_acc", "top1"})
"""Metrics in [0, 1] that are shown in percent."""


class Progress:
    """Shows how far a loop is, its step time, the time left and a few metrics.

    On a terminal this is a ``tqdm`` bar, else one plain line every few seconds and one at the end. A metric may be a
    number, a string, a 0-d tensor or a function without arguments that returns one of these; the latter two are read only when
    the display is refreshed (at most five times a second), so that handing over the loss of each step costs no synchronisation
    with the device.

    Args:
        total_steps: Number of steps of the whole loop, or None where it is not known.
        desc: A word or two in front of the line.
        enabled: False shows nothing and reads no metric.
        initial: Steps done before this run; a loop that was resumed starts there.
        file: Stream to write to; standard error by default.

    Example:
        >>> with Progress(1000, "search", enabled=False) as bar:
        ...     for step in range(1000):
        ...         bar.update(loss=0.5, alive=0.9)
    """

    def __init__(
        self,
        total_steps: int | None,
        desc: str,
        enabled: bool = True,
        *,
        initial: int = 0,
        file: TextIO | None = None,
    ) -> None:
        if total_steps is not None and total_steps < 0:
            raise ConfigError(
                f"Progress: total_steps must be at least 0 or None, got {total_steps}"
            )
        self.total = total_steps
        self.desc = desc
        self.step = initial
        self._file = sys.stderr if file is None else file
        self._enabled = enabled and self._file is not None
        self._metrics: dict[str, Any] = {}
        self._shown_step = initial
        self._seconds_per_step: float | None = None
        self._start = self._shown_at = time.monotonic()
        self._closed = False
        self._unshown = True
        self._bar = self._make_bar() if self._enabled and _is_terminal(self._file) else None
        self._interval = LINE_INTERVAL if self._bar is None else BAR_INTERVAL

    def update(self, n: int = 1, **metrics: Any) -> None:
        """Counts ``n`` more steps. ``metrics`` replace or join those given before."""
        self.step += n
        if not self._enabled or self._closed:
            return
        self._metrics.update(metrics)
        self._unshown = True
        if time.monotonic() - self._shown_at >= self._interval:
            self._show()

    def note(self, text: str) -> None:
        """Writes one line of its own above the bar, such as an event of the loop."""
        if self._enabled:
            self._write(text)

    def close(self) -> None:
        """Shows the last state and ends the line. Calling it again does nothing."""
        self._close(read_metrics=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error a metric may no longer be readable (a failed device), and would hide the first error.
        self._close(read_metrics=kind is None)

    @property
    def seconds_per_step(self) -> float | None:
        """Smoothed duration of one step in seconds, None before the first refresh."""
        return self._seconds_per_step

    def _close(self, read_metrics: bool) -> None:
        if self._closed:
            return
        self._closed = True
        if not self._enabled:
            return
        if not read_metrics:
            self._metrics.clear()
        if self._unshown:
            self._show(last=True)
        if self._bar is not None:
            self._guard(self._bar.close)
        self._metrics.clear()

    def _show(self, last: bool = False) -> None:
        values = {name: _read(value) for name, value in self._metrics.items()}
        now = time.monotonic()
        steps = self.step - self._shown_step
        if steps > 0:
            newest = (now - self._shown_at) / steps
            before = newest if self._seconds_per_step is None else self._seconds_per_step
            self._seconds_per_step = RATE_SMOOTHING * newest + (1 - RATE_SMOOTHING) * before
        self._shown_step, self._shown_at, self._unshown = self.step, now, False
        text = self._text(values)
        if self._bar is None:
            self._interval = max(LINE_INTERVAL, (now - self._start) / LINES_SHARE)
            self._write(self._line(text, now - self._start, last))
            return
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.n = self.step
        self._guard(self._bar.refresh)

    def _text(self, values: Mapping[str, Any]) -> str:
        parts = [f"{name} {format_metric(name, value)}" for name, value in values.items()]
        if self._seconds_per_step is not None:
            parts.append(f"{format_step(self._seconds_per_step)}/step")
        return ", ".join(parts)

    def _line(self, text: str, elapsed: float, last: bool) -> str:
        if self.total is None:
            count = f"{self.step} steps"
        else:
            share = 100 * self.step / self.total if self.total else 100.0
            count = f"{self.step}/{self.total} ({share:.0f} %)"
        times = f"{format_seconds(elapsed)} passed"
        if not last and self.total is not None and self._seconds_per_step is not None:
            left = max(self.total - self.step, 0) * self._seconds_per_step
            times += f", {format_seconds(left)} left"
        return ", ".join(part for part in (f"{self.desc}: {count}", times, text) if part)

    def _make_bar(self) -> Any:
        from tqdm import tqdm

        # mininterval=inf: only this class decides when to draw. The last column holds the step time in the postfix.
        return tqdm(
            total=self.total,
            desc=self.desc,
            initial=self.step,
            file=self._file,
            dynamic_ncols=True,
            mininterval=float("inf"),
            bar_format="{desc}: {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} "
            "[{elapsed}<{remaining}{postfix}]"
            if self.total is not None
            else "{desc}: {n_fmt} [{elapsed}{postfix}]",
        )

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._guard(lambda: self._bar.write(line, file=self._file))
        else:
            self._guard(lambda: print(line, file=self._file, flush=True))

    def _guard(self, action: Callable[[], Any]) -> None:
        """A terminal that went away must not end a run of hours: the display stops, the loop goes on."""
        try:
            action()
        except (OSError, ValueError):
            self._enabled = False


def format_metric(name: str, value: Any) -> str:
    """A metric in few characters: shares in percent, other numbers to four digits."""
    if isinstance(value, str):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if name in PERCENT_METRICS:
        return f"{100 * float(value):.2f}%"
    return f"{float(value):.4g}"


def format_step(seconds: float) -> str:
    """The duration of a step in ms, or in s from one second on."""
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def format_seconds(seconds: float) -> str:
    """A duration as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _read(value: Any) -> Any:
    value = value() if callable(value) else value
    return value.item() if hasattr(value, "item") else value


def _is_terminal(file: TextIO) -> bool:
    try:
        return bool(file.isatty())
    except (AttributeError, ValueError):
        return False
