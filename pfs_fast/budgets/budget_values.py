"""The values that a budget is made of: checked, and read from text."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from fractions import Fraction

from ..errors import BudgetError

_SUFFIX = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "B": 10**9}
_BINARY = {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_NUMBER = re.compile(
    r"^(\d+(?:\.\d*)?|\.\d+)(?:e([+-]?\d+))?\s*(KiB|MiB|GiB|[KMGB%]?)$", re.IGNORECASE
)

LARGEST = 2**63 - 1  # that costs are counted in
MOST_CHANNELS = 2**31 - 1
_DIGITS = 100  # of a number in a text
_EXPONENT = 400

Width = int | float | None
Widths = tuple[tuple[str, tuple[Width, Width]], ...]


def checked_limit(name: str, value: object) -> float | int | None:
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
    if _is_beyond(value):
        if isinstance(value, float) and not math.isfinite(value):
            raise BudgetError(
                f"Budget: {name} must be finite, got {value!r}; leave it out for no limit"
            )
        raise BudgetError(
            f"Budget: {name} must be at most 2**63 - 1, got a number beyond; leave it out for no limit"
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


def _is_beyond(value: numbers.Real) -> bool:
    """Whether no 64-bit integer is near: also true of NaN."""
    try:
        return (
            not abs(int(value) if isinstance(value, numbers.Integral) else float(value)) <= LARGEST
        )
    except OverflowError:
        return True


def checked_count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise BudgetError(
            f"Budget: {name} must be a whole number of channels, got {value!r}; pass e.g. 8"
        )
    if value > MOST_CHANNELS:
        raise BudgetError(f"Budget: {name} must be at most 2**31 - 1, got more; lower it")
    if value < 1:
        raise BudgetError(f"Budget: {name} must be at least 1, got {value!r}; leave it out for 1")
    return int(value)


def checked_time(value: object) -> float | None:
    """A valid latency: ``None``, or milliseconds above 0."""
    if value is None:
        return None
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not real or _is_beyond(value):
        got = (
            "a number beyond 2**63"
            if isinstance(value, int) and not isinstance(value, bool)
            else repr(value)
        )
        raise BudgetError(
            f"Budget: latency_ms must be a finite number of milliseconds, got {got}; pass e.g. 20"
        )
    if value <= 0:
        raise BudgetError(
            f"Budget: latency_ms must be above 0, got {value!r}; pass milliseconds, e.g. 20"
        )
    return float(value)


def checked_share(name: str, value: object) -> float | None:
    """A valid share: ``None``, or a number in (0, 1]."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not 0 < value <= 1:
        raise BudgetError(f"Budget: {name} must be a share in (0, 1], got {value!r}; pass e.g. 0.5")
    return float(value)


def checked_widths(widths: object) -> Widths:
    """``(pattern, (least, most))`` pairs, from a mapping or from such pairs (JSON gives lists)."""
    pairs = widths.items() if isinstance(widths, Mapping) else widths
    if isinstance(pairs, str) or not hasattr(pairs, "__iter__"):
        raise BudgetError(
            f'Budget: widths must map patterns to (least, most), got {widths!r}; write e.g. {{"layer3.*": (8, 64)}}'
        )
    checked = []
    for pair in pairs:
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not isinstance(pair[0], str):
            raise BudgetError(
                f'Budget: widths must map patterns to (least, most), got {pair!r}; write e.g. {{"layer3.*": (8, 64)}}'
            )
        pattern, ends = pair
        if not isinstance(ends, (tuple, list)) or len(ends) != 2 or tuple(ends) == (None, None):
            raise BudgetError(
                f"Budget: widths[{pattern!r}] must be (least, most), got {ends!r}; write None for an open end, e.g. (8, None)"
            )
        checked.append((pattern, tuple(_checked_width(pattern, end) for end in ends)))
        least, most = checked[-1][1]
        if type(least) is type(most) and least > most:
            raise BudgetError(
                f"Budget: widths[{pattern!r}] must have its least at or below its most, got ({least:g}, {most:g}); swap them"
            )
    return tuple(checked)


def _checked_width(pattern: str, width: object) -> Width:
    if width is None:
        return None
    real = isinstance(width, numbers.Real) and not isinstance(width, bool)
    if real and width > MOST_CHANNELS:
        raise BudgetError(
            f"Budget: widths[{pattern!r}] must be at most 2**31 - 1 channels, got more; write None for an open end"
        )
    if real and isinstance(width, numbers.Integral) and width >= 1:
        return int(width)
    if real and not isinstance(width, numbers.Integral) and 0 < width <= 1:
        return float(width)
    raise BudgetError(
        f"Budget: widths[{pattern!r}] must have whole numbers of channels or shares in (0, 1], got {width!r}; write e.g. 8 or 0.5"
    )


def checked_patterns(ignore: object) -> tuple[str, ...]:
    if isinstance(ignore, str) or not isinstance(ignore, (tuple, list, set, frozenset)):
        raise BudgetError(
            f'Budget: ignore must be a list of names or patterns, got {ignore!r}; write e.g. ["layer4.*"]'
        )
    for pattern in ignore:
        if not isinstance(pattern, str) or not pattern:
            raise BudgetError(
                f"Budget: ignore must hold names or patterns, got {pattern!r}; write e.g. 'layer4.*'"
            )
    return tuple(sorted(ignore) if isinstance(ignore, (set, frozenset)) else ignore)


def parsed_number(number: str, text: str) -> float | int:
    """An int for a whole number above 1 (after its suffix), else a float."""
    match = _NUMBER.match(number)
    if match is None:
        raise BudgetError(
            f"Budget.parse: a value must be a number such as 0.5, 50%, 150M or 1000000, got {number!r} in {text!r}"
        )
    digits, exponent, suffix = match.groups()
    if len(number) > _DIGITS or abs(int(exponent or 0)) > _EXPONENT:
        shown = number if len(number) <= _DIGITS else f"{number[:20]}..."
        raise BudgetError(
            f"Budget.parse: a value must have at most {_DIGITS} characters and an exponent up to {_EXPONENT}, got {shown!r}; "
            "write fewer digits"
        )
    value = Fraction(digits) * Fraction(10) ** int(exponent or 0)
    if value > LARGEST:
        return LARGEST + 1  # the budget refuses it by its name
    if suffix == "%":
        return float(value / 100)
    value *= {**_SUFFIX, **_BINARY}[suffix.upper()]
    is_absolute = value.denominator == 1 and (value > 1 or "." not in digits)
    return int(value) if is_absolute else float(value)


def absolute(limit: float | int | None, reference: int | None) -> int | None:
    if isinstance(limit, float):
        if reference is None:
            raise ValueError(
                "a share needs the whole network's figure"
            )  # a mistake of this package
        # The decimal that the user wrote: 0.3 of 10 is 3, although the nearest float to 0.3 is below it.
        return math.floor(Fraction(repr(limit)) * reference)
    return limit
