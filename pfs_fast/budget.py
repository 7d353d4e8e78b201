"""Budgets: what a slim network may cost at most, as a user writes it and as integers."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass, fields
from fractions import Fraction

from .errors import BudgetError

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_NUMBER = re.compile(r"^(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d+))?\s*([KMGB%]?)$", re.IGNORECASE)


@dataclass(frozen=True)
class Limits:
    """A budget in absolute integers; ``None`` where nothing is limited.

    Attributes:
        macs: Largest number of multiply-accumulates of one image.
        params: Largest number of parameters.
        multiple_of: Widths of prunable groups are multiples of this many channels.
        min_channels: Every group keeps at least this many channels.
    """

    macs: int | None = None
    params: int | None = None
    multiple_of: int = 1
    min_channels: int = 1

    def allow(self, cost: tuple[int, int]) -> bool:
        """Whether ``(macs, params)`` exceeds no limit."""
        macs, params = cost
        return (self.macs is None or macs <= self.macs) and (
            self.params is None or params <= self.params
        )


@dataclass(frozen=True)
class Budget:
    """Upper limits on a slim network. All limits that are set hold together.

    A float in (0, 1] is a share of the reference network, a whole number is absolute: ``Budget(macs=0.5)``,
    ``Budget(macs=150_000_000, params=0.3)``. MACs are multiply-accumulates of one image.

    Args:
        macs: Share or number of multiply-accumulates.
        params: Share or number of parameters.
        latency_ms: Reserved; not supported yet.
        peak_activation_bytes: Reserved; not supported yet.
        multiple_of: Widths are multiples of this many channels; a group narrower than this keeps its full width.
        min_channels: Every prunable group keeps at least this many channels (or all, if it has fewer).

    Raises:
        BudgetError: For a value outside its range, or if no limit is set.

    Example:
        >>> Budget(macs=0.5, multiple_of=8).resolve((1000, 90))
        Limits(macs=500, params=None, multiple_of=8, min_channels=1)
    """

    macs: float | int | None = None
    params: float | int | None = None
    latency_ms: float | None = None
    peak_activation_bytes: int | None = None
    multiple_of: int = 1
    min_channels: int = 1

    def __post_init__(self) -> None:
        for name in ("latency_ms", "peak_activation_bytes"):
            if getattr(self, name) is not None:
                raise BudgetError(
                    f"Budget: {name} is not supported yet, got {getattr(self, name)!r}; limit macs or params instead"
                )
        if self.macs is None and self.params is None:
            raise BudgetError(
                "Budget: at least one limit must be set, got none; set macs or params, e.g. macs=0.5"
            )
        for name in ("macs", "params"):
            object.__setattr__(self, name, _checked_limit(name, getattr(self, name)))
        for name in ("multiple_of", "min_channels"):
            object.__setattr__(self, name, _checked_count(name, getattr(self, name)))

    @staticmethod
    def of(value: float | int | Budget) -> Budget:
        """A budget as it is, or a share (float) or number (int) of MACs as a budget."""
        if isinstance(value, Budget):
            return value
        if value is None:
            raise BudgetError(
                "Budget: budget must be a share, a number of MACs or a Budget, got None; pass e.g. 0.5"
            )
        return Budget(macs=value)

    @staticmethod
    def parse(text: str) -> Budget:
        """The budget of a command-line text: ``"0.5"``, ``"50%"``, ``"macs=150M"``, ``"params=1M,multiple_of=8"``.

        Raises:
            BudgetError: For an unknown key, a key given twice, or a value that is not a number.
        """
        if not isinstance(text, str):
            raise BudgetError(
                f"Budget.parse: text must be a string, got {text!r}; pass numbers to Budget itself"
            )
        known = [field.name for field in fields(Budget)]
        values: dict[str, float | int] = {}
        for part in text.split(","):
            key, equals, number = (piece.strip() for piece in part.partition("="))
            if not equals:
                key, number = "macs", key
            if key not in known:
                raise BudgetError(
                    f"Budget.parse: key must be one of {', '.join(known)}, got {key!r} in {text!r}"
                )
            if key in values:
                raise BudgetError(
                    f"Budget.parse: each key must be given once, got {key!r} twice in {text!r}"
                )
            values[key] = _parsed_number(number, text)
        return Budget(**values)

    def resolve(self, reference: tuple[int, int]) -> Limits:
        """Absolute limits for a reference network.

        Args:
            reference: ``(macs, params)`` that shares refer to.

        Returns:
            Limits: Shares become ``floor(share * reference)``, in exact arithmetic on the share as printed.
        """
        macs, params = reference
        return Limits(
            macs=_absolute(self.macs, macs),
            params=_absolute(self.params, params),
            multiple_of=self.multiple_of,
            min_channels=self.min_channels,
        )

    def __str__(self) -> str:
        parts = []
        for name in ("macs", "params"):
            value = getattr(self, name)
            if value is not None:
                parts.append(
                    f"{name} <= {value:,}"
                    if isinstance(value, int)
                    else f"{name} <= {value:g} of the reference"
                )
        parts += [
            f"{name} = {getattr(self, name)}"
            for name in ("multiple_of", "min_channels")
            if getattr(self, name) > 1
        ]
        return ", ".join(parts)


def _checked_limit(name: str, value: object) -> float | int | None:
    """A valid limit: ``None``, a float in (0, 1] (a share) or an int (absolute)."""
    if value is None:
        return None
    if isinstance(value, str):
        raise BudgetError(
            f"Budget: {name} must be a number, got {value!r}; use Budget.parse for text"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise BudgetError(
            f"Budget: {name} must be a number, got {value!r}; pass a share such as 0.5 or a whole number"
        )
    if not math.isfinite(value):
        raise BudgetError(
            f"Budget: {name} must be finite, got {value!r}; leave it out for no limit"
        )
    if value <= 0:
        raise BudgetError(
            f"Budget: {name} must be above 0, got {value!r}; pass a share in (0, 1] or a whole number"
        )
    if isinstance(value, numbers.Integral):
        if value == 1:
            raise BudgetError(
                f"Budget: {name} must be a share or an absolute limit, got the integer 1; write 1.0 for 100 %"
            )
        return int(value)
    if value <= 1:
        return float(value)
    if float(value).is_integer():
        return int(value)
    raise BudgetError(
        f"Budget: {name} must be a share in (0, 1] or a whole number, got {value!r}; a share must be in (0, 1]; "
        "an absolute limit is a whole number"
    )


def _checked_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise BudgetError(
            f"Budget: {name} must be a whole number of channels, got {value!r}; pass e.g. 8"
        )
    if value < 1:
        raise BudgetError(f"Budget: {name} must be at least 1, got {value!r}; leave it out for 1")
    return int(value)


def _parsed_number(number: str, text: str) -> float | int:
    """An int for a whole number above 1 (after its suffix), else a float."""
    match = _NUMBER.match(number)
    if match is None:
        raise BudgetError(
            f"Budget.parse: a value must be a number such as 0.5, 50%, 150M or 1000000, got {number!r} in {text!r}"
        )
    digits, exponent, suffix = match.groups()
    value = Fraction(digits) * Fraction(10) ** int(exponent or 0)
    if suffix == "%":
        return float(value / 100)
    value *= _SUFFIX[suffix.upper()]
    is_absolute = value.denominator == 1 and (value > 1 or "." not in digits)
    return int(value) if is_absolute else float(value)


def _absolute(limit: float | int | None, reference: int) -> int | None:
    if isinstance(limit, float):
        # The decimal that the user wrote: 0.3 of 10 is 3, although the nearest float to 0.3 is below it.
        return math.floor(Fraction(repr(limit)) * reference)
    return limit
