"""What became of each limit of a budget: asked, predicted, measured."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from ..errors import FileFormatError
from .budget import COSTS

_TITLES = {
    "macs": "MACs",
    "params": "params",
    "weight_bytes": "weight bytes",
    "peak_activation_bytes": "peak activation bytes",
    "latency_ms": "latency, ms",
}


@dataclass(frozen=True)
class LimitCheck:
    """One limit of a budget, and how far a structure is from it.

    Attributes:
        name: The cost: ``"macs"``, ``"params"``, ``"weight_bytes"``, ``"peak_activation_bytes"`` or ``"latency_ms"``.
        asked: The limit.
        predicted: Of the structure; exact for all costs but latency.
        whole: Predicted of the whole network.
        measured: On the slim network; None where it was not.
        spread: Of ``measured``: half the distance between the quartiles.
    """

    name: str
    asked: float
    predicted: float
    whole: float
    measured: float | None = None
    spread: float | None = None

    @property
    def holds(self) -> bool:
        """Whether what is known best is within the limit: the measured figure, else the predicted one."""
        found = self.predicted if self.measured is None else self.measured
        return found <= self.asked


def limit_table(checks: Sequence[LimitCheck]) -> list[tuple[str, ...]]:
    """Rows of text, the first of them titles."""
    rows: list[tuple[str, ...]] = [("limit", "asked", "predicted", "measured", "whole network")]
    for check in checks:
        measured = "-"
        if check.measured is not None:
            measured = show(check.name, check.measured)
            if check.name == "latency_ms":
                measured += f" ± {check.spread:.2g}"
        shown = (show(check.name, v) for v in (check.asked, check.predicted))
        rows.append((_TITLES[check.name], *shown, measured, show(check.name, check.whole)))
    return rows


def limit_notes(checks: Sequence[LimitCheck]) -> list[str]:
    """What the figures of ``limit_table`` are that do not speak for themselves; none without a measured latency."""
    if not any(c.name == "latency_ms" and c.measured is not None for c in checks):
        return []
    return [
        "predicted latency: sum of layers timed alone, times one factor that fits it to the first whole network",
        "measured latency: the slim network timed end to end, ± half the distance between the quartiles; the limit is for it",
    ]


def show(name: str, value: int | float) -> str:
    """A cost as text: whole numbers with commas, milliseconds with four digits."""
    return f"{value:.4g}" if name == "latency_ms" else f"{value:,.0f}"


def read_checks(entries: Any) -> tuple[LimitCheck, ...]:
    """Checks of a structure's JSON text.

    Raises:
        FileFormatError: An entry has other fields, or numbers that are none.
    """
    names = {f.name for f in fields(LimitCheck)}
    checks = []
    for entry in entries if isinstance(entries, list) else [entries]:
        good = isinstance(entry, dict) and set(entry) == names and entry["name"] in COSTS
        if good:
            numbers = {name: entry[name] for name in names - {"name"}}
            good = all(
                (value is None and name in ("measured", "spread"))
                or (type(value) in (int, float) and 0 <= value <= sys.float_info.max)
                for name, value in numbers.items()
            )
            good = good and (entry["measured"] is None) == (entry["spread"] is None)
        if not good:
            raise FileFormatError(
                f"Structure.from_json: limits must be a list of checks with {', '.join(sorted(names))}, got {str(entry)[:80]}"
            )
        checks.append(LimitCheck(**entry))
    return tuple(checks)
