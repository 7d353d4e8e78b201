"""Shared by all benchmarks: the timer, memory figures, the machine's record, CSV and Markdown.

Variants are timed in alternating order within one process, and compared round by round: on a shared
machine the ratio of two neighbours is worth more than two medians taken minutes apart.
"""

from __future__ import annotations

import csv
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

import pfs_fast

TOTAL = "total"


class Clock:
    """Splits one run of a variant into named phases; CUDA events on a GPU, wall time elsewhere."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._names: list[str] = []
        self._marks: list[torch.cuda.Event | float] = []
        self._mark()

    def _mark(self) -> None:
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def lap(self, name: str) -> None:
        """Ends a phase."""
        self._names.append(name)
        self._mark()

    def read(self) -> dict[str, float]:
        """Milliseconds per phase, and their sum as ``total``. Waits for the GPU."""
        if self._cuda:
            torch.cuda.synchronize()
        laps: dict[str, float] = {}
        for name, start, end in zip(self._names, self._marks, self._marks[1:], strict=False):
            ms = start.elapsed_time(end) if self._cuda else (end - start) * 1e3
            laps[name] = laps.get(name, 0.0) + ms
        laps[TOTAL] = sum(laps.values())
        return laps


# Runs once and calls clock.lap(...) after each phase.
Variant = Callable[[Clock], None]


@dataclass(frozen=True)
class Spread:
    """Median with the 20 % and 80 % quantiles of n values."""

    median: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """From at least one value."""
        quantiles = torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)
        middle, low, high = torch.tensor(values, dtype=torch.float64).quantile(quantiles).tolist()
        return cls(middle, low, high, len(values))

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


def time_variants(
    variants: Mapping[str, Variant],
    *,
    device: torch.device,
    repeats: int = 15,
    warmup: int = 3,
) -> Timings:
    """Times the variants in turn, in an order that changes from round to round.

    Args:
        variants: By name; all must lap the same phases.
        device: Whose clock to use.
        repeats: Rounds that count.
        warmup: Rounds before them.

    Returns:
        The times of all rounds.
    """
    names = list(variants)
    rounds: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    for index in range(warmup + repeats):
        shift = index % len(names)
        order = names[shift:] + names[:shift]
        for name in order if index // len(names) % 2 == 0 else reversed(order):
            if device.type == "cuda":
                torch.cuda.synchronize()
            clock = Clock(device)
            variants[name](clock)
            for phase, ms in clock.read().items():
                if index >= warmup:
                    rounds[name].setdefault(phase, []).append(ms)
    return Timings(rounds)


def saved_bytes(forward: Callable[[], object], *, min_bytes: int = 0) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward``.

    Each storage counts once, also one that the caller holds anyway (an input).

    Args:
        forward: Runs the forward pass.
        min_bytes: Smaller storages (per-channel vectors) do not count.
    """
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # as long as they live, no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= min_bytes:
            sizes[storage.data_ptr()] = storage.nbytes()
        held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(sizes.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """Peak of allocated CUDA memory above what was allocated before; None on other devices."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Machine:
    """What a figure depends on beside the code; goes into every CSV row."""

    device: str
    cpu_isa: str
    threads: int
    load: str
    torch: str
    cuda: str
    python: str
    commit: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Of this process; ``load`` is the load average of the last minute where there is one."""
        is_cuda = device.type == "cuda"
        load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        return cls(
            device=torch.cuda.get_device_name(device) if is_cuda else _cpu_name(),
            cpu_isa=pfs_fast.backends().cpu_isa,
            threads=torch.get_num_threads(),
            load=load,
            torch=torch.__version__,
            cuda=(torch.version.cuda or "") if is_cuda else "",
            python=platform.python_version(),
            commit=_commit(),
        )

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items() if value != "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of the source tree, "+" if it has changes; "" outside of git."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return ""


Row = Mapping[str, object]


def timing_rows(case: Row, timings: Timings, *, baseline_of: str, **values: Row) -> list[dict]:
    """One row per variant and phase, in long form.

    Args:
        case: What is the same for all rows (shape, dtype, ...).
        timings: Of the case.
        baseline_of: Variant that the ratios refer to: ``ratio`` = time of the row / time of it.
        **values: Further columns: name = {variant: value}.
    """
    rows = []
    for variant, phases in timings.rounds.items():
        for phase in phases:
            time_ms = timings.time(variant, phase)
            ratio = timings.ratio(variant, baseline_of, phase)
            row = dict(case, variant=variant, phase=phase, n=time_ms.n)
            row.update(ms=time_ms.median, ms_p20=time_ms.low, ms_p80=time_ms.high)
            row.update(ratio=ratio.median, ratio_p20=ratio.low, ratio_p80=ratio.high)
            row.update({name: by_variant.get(variant) for name, by_variant in values.items()})
            rows.append(row)
    return rows


def append_csv(path: Path, rows: Iterable[Row], machine: Machine) -> None:
    """Appends rows with the machine's record; a new file gets a header.

    Raises:
        ValueError: The file has other columns.
    """
    records = [{**row, **asdict(machine)} for row in rows]
    if not records:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = list(records[0])
    is_new = not path.exists() or path.stat().st_size == 0
    if not is_new:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file))
        if found != columns:
            raise ValueError(
                f"append_csv: {path} must have the columns {columns}, got {found}; use a new file"
            )
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows(_short(record) for record in records)


def _short(record: Row) -> dict[str, object]:
    return {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in record.items()}


def markdown_table(rows: Sequence[Row]) -> str:
    """A Markdown table with the keys of the first row as its header."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns)]
    lines += [[str(row[column]) for column in columns] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
