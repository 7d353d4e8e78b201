"""Progress: what is shown, how often, and that nothing is read between two refreshes."""

from __future__ import annotations

import io

import pytest
import torch

from pfs_fast.errors import ConfigError
from pfs_fast.training import progress
from pfs_fast.training.progress import Progress, format_metric, format_seconds, format_step


class Clock:
    """A clock that only moves when told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(progress.time, "monotonic", lambda: self.now)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError("gone")


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_plain_lines_come_only_after_the_interval(clock: Clock):
    file = io.StringIO()
    bar = Progress(100, "search", file=file)
    for _ in range(10):
        clock.now += 0.1
        bar.update(loss=2.0)
    assert file.getvalue() == ""
    clock.now += progress.LINE_INTERVAL
    bar.update(loss=1.5)
    assert file.getvalue().startswith("search: 11/100 (11 %), ")
    assert "loss 1.5" in file.getvalue()


def test_line_shows_step_time_and_time_left(clock: Clock):
    file = io.StringIO()
    bar = Progress(100, "train", file=file)
    clock.now += 10.0
    bar.update(20)
    assert file.getvalue().strip() == "train: 20/100 (20 %), 0:10 passed, 0:40 left, 500 ms/step"
    assert bar.seconds_per_step == pytest.approx(0.5)


def test_step_time_follows_the_newest_interval(clock: Clock):
    bar = Progress(1000, "train", file=io.StringIO())
    for seconds in (10.0, 5.0, 5.0, 5.0, 5.0):
        clock.now += seconds
        bar.update(10)
    assert 0.5 < bar.seconds_per_step < 0.56


def test_metrics_are_read_only_at_a_refresh(clock: Clock):
    reads = []
    bar = Progress(100, "search", file=io.StringIO())

    def loss() -> torch.Tensor:
        reads.append(1)
        return torch.tensor(0.25)

    for _ in range(50):
        bar.update(loss=loss)
    assert not reads
    clock.now += 100.0
    bar.update(loss=loss)
    assert len(reads) == 1


def test_terminal_is_refreshed_at_most_five_times_a_second(clock: Clock):
    reads = []
    with Progress(1000, "search", file=Terminal()) as bar:
        for _ in range(1000):
            clock.now += 0.001
            bar.update(loss=lambda: reads.append(1) or 0.5)
        assert 1 <= len(reads) <= 5


def test_terminal_bar_ends_at_the_last_step(clock: Clock):
    file = Terminal()
    with Progress(10, "search", file=file) as bar:
        for step in range(10):
            bar.update(loss=torch.tensor(float(step)), alive=0.5)
    last = file.getvalue().rstrip().split("\r")[-1]
    assert "100%" in last and "10/10" in last and "loss 9" in last and "alive 50.00%" in last


def test_close_shows_the_last_state_once(clock: Clock):
    file = io.StringIO()
    bar = Progress(None, "eval", file=file)
    bar.update(3, acc=0.875)
    bar.close()
    bar.close()
    bar.update(1, acc=0.0)
    assert file.getvalue().count("\n") == 1
    assert "eval: 3 steps" in file.getvalue() and "acc 87.50%" in file.getvalue()


def test_close_does_not_repeat_a_shown_line(clock: Clock):
    file = io.StringIO()
    with Progress(2, "train", file=file) as bar:
        clock.now += 60.0
        bar.update(2)
    assert file.getvalue().count("\n") == 1


def test_long_runs_write_fewer_lines(clock: Clock):
    file = io.StringIO()
    bar = Progress(None, "train", file=file)
    for _ in range(36_000):  # ten hours
        clock.now += 1.0
        bar.update()
    assert 100 < file.getvalue().count("\n") < 500


def test_error_inside_is_not_hidden_by_unreadable_metrics():
    def broken() -> float:
        raise RuntimeError("device lost")

    bar = Progress(10, "search", file=io.StringIO())
    with pytest.raises(ValueError, match="first"), bar:
        bar.update(loss=broken)
        raise ValueError("first")


def test_disabled_shows_and_reads_nothing(clock: Clock):
    file = io.StringIO()
    with Progress(10, "search", enabled=False, file=file) as bar:
        clock.now += 100.0
        bar.update(loss=lambda: pytest.fail("must not be read"))
        bar.note("event")
    assert file.getvalue() == "" and bar.step == 1


def test_lost_terminal_does_not_stop_the_loop(clock: Clock):
    with Progress(10, "search", file=Gone()) as bar:
        for _ in range(10):
            clock.now += 100.0
            bar.update(loss=1.0)
    assert bar.step == 10


def test_note_is_a_line_of_its_own(clock: Clock):
    for file in (io.StringIO(), Terminal()):
        with Progress(10, "search", file=file) as bar:
            bar.note("compacted to 3,000 channels")
        assert "compacted to 3,000 channels\n" in file.getvalue()


def test_resumed_loop_starts_at_its_step(clock: Clock):
    file = io.StringIO()
    bar = Progress(100, "search", initial=60, file=file)
    clock.now += 10.0
    bar.update(10)
    assert "search: 70/100 (70 %)" in file.getvalue() and "0:30 left" in file.getvalue()


def test_negative_total_is_refused():
    with pytest.raises(ConfigError, match="Progress: total_steps must be at least 0"):
        Progress(-1, "search")


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("loss", 2.302585, "2.303"),
        ("loss", float("nan"), "nan"),
        ("acc", 0.12345, "12.35%"),
        ("epoch", 3, "3"),
        ("epoch", "3/160", "3/160"),
        ("lr", 0.00025, "0.00025"),
    ],
)
def test_metric_text(name: str, value: object, text: str):
    assert format_metric(name, value) == text


@pytest.mark.parametrize(("seconds", "text"), [(0.0123, "12.3 ms"), (2.77, "2.77 s")])
def test_step_time_text(seconds: float, text: str):
    assert format_step(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0:00"), (59.6, "1:00"), (61, "1:01"), (3725, "1:02:05")]
)
def test_duration_text(seconds: float, text: str):
    assert format_seconds(seconds) == text
