"""JSON out of files that may be damaged or hostile."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = (
    100  # far below where Python's own recursion ends, so that what was read can be printed too
)


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Args:
        text: The text.

    Raises:
        ValueError: It is no JSON, or nested more than ``MAX_DEPTH`` deep.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        value, level = None, [None]
    else:
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [
                child
                for item in level
                if isinstance(item, dict | list)
                for child in (item.values() if isinstance(item, dict) else item)
            ]
    if level:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    return value
