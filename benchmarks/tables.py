"""Rows in long form, CSV files that only grow, Markdown tables."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from benchmarks.machine import Machine
from benchmarks.timing import Spread, Timings

Row = Mapping[str, object]


@dataclass(frozen=True)
class Case:
    """What a suite found out about one case.

    Attributes:
        rows: For the CSV file: one row for each variant and phase.
        lines: For the tables: ``{title: lines}``.
    """

    rows: list[dict[str, object]]
    lines: dict[str, list[dict[str, object]]] = field(default_factory=dict)


def timing_columns(time: Spread | None, ratio: Spread | None) -> dict[str, object]:
    """The columns of a time in ms and of its ratio to the library's own; empty where there is none."""
    columns: dict[str, object] = {"n": time.n if time else 0}
    for name, spread in (("ms", time), ("ratio", ratio)):
        for suffix, value in (("", "median"), ("_p25", "low"), ("_p75", "high")):
            columns[name + suffix] = getattr(spread, value) if spread else None
    return columns


def timing_rows(
    case: Row, timings: Timings, *, baseline_of: str, skipped: Row | None = None, **values: Row
) -> list[dict[str, object]]:
    """One row per variant and phase, in long form.

    Args:
        case: What is the same for all rows (shape, dtype, ...).
        timings: Of the case.
        baseline_of: Variant that the ratios refer to: ``ratio`` = time of the row / time of it.
        skipped: Variants that were not run, with the reason.
        **values: Further columns: name = {variant: value, or {phase: value}}.
    """
    rows = []
    for variant, phases in timings.rounds.items():
        for phase in phases:
            ratio = timings.ratio(variant, baseline_of, phase)
            row = dict(case, variant=variant, phase=phase)
            row |= timing_columns(timings.time(variant, phase), ratio)
            for name, by_variant in values.items():
                value = by_variant.get(variant)
                row[name] = value.get(phase) if isinstance(value, Mapping) else value
            rows.append(row | {"note": ""})
    for variant, reason in (skipped or {}).items():
        row = dict(case, variant=variant, phase="total", **timing_columns(None, None))
        rows.append(row | dict.fromkeys(values) | {"note": f"not run: {reason}"})
    return rows


def append_csv(path: Path, rows: Iterable[Row], machine: Machine) -> Path:
    """Appends rows with the machine's record; a new file gets a header.

    A file with other columns stays as it is: the rows then go to the first of ``name-2.csv``, ``name-3.csv``, ... that takes them.

    Returns:
        The file that was written.
    """
    records = [{**row, **asdict(machine)} for row in rows]
    if not records:
        return path
    columns = list(records[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    stem, number = path.stem, 1
    while (found := _header(path)) not in (None, columns):
        number += 1
        path = path.with_name(f"{stem}-{number}{path.suffix}")
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        if found is None:
            writer.writeheader()
        writer.writerows(_short(record) for record in records)
    return path


def _header(path: Path) -> list[str] | None:
    if not path.exists() or path.stat().st_size == 0:
        return None
    with path.open(newline="", encoding="utf-8") as file:
        return next(csv.reader(file))


def _short(record: Row) -> dict[str, object]:
    return {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in record.items()}


def markdown_table(lines: Sequence[Row]) -> str:
    """A Markdown table; its header has every key of every line, in the order of their first appearance."""
    columns = list(dict.fromkeys(key for line in lines for key in line))
    cells = [columns, ["---"] * len(columns)]
    cells += [[_cell(line.get(column)) for column in columns] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def mib(nbytes: int | None) -> str | None:
    """Bytes as a cell in MiB."""
    return None if nbytes is None else f"{nbytes / 2**20:.1f}"
