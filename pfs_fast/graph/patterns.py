"""Names and patterns with which a user points at layers."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable
from fnmatch import fnmatchcase

from ..errors import BudgetError


def matching(pattern: str, layers: Iterable[str]) -> list[str]:
    """Layers that a pattern means: by their own name, or by the name of a module around them.

    Args:
        pattern: A shell-style pattern (``*``, ``?``, ``[...]``; ``*`` also crosses dots), matched against the whole of
            either name.
        layers: Qualified module names.

    Example:
        >>> matching("layer?", ["layer1.0.conv1", "layer10.conv", "fc"])
        ['layer1.0.conv1']
    """
    return [name for name in layers if any(fnmatchcase(part, pattern) for part in _around(name))]


def require_known(option: str, pattern: str, layers: Collection[str]) -> list[str]:
    """``matching``, or an error that offers the closest names.

    Raises:
        BudgetError: The pattern means no layer.
    """
    found = matching(pattern, layers)
    if found:
        return found
    names = list(dict.fromkeys(part for name in layers for part in _around(name)))
    close = difflib.get_close_matches(pattern.strip("*."), names, n=3, cutoff=0.4)
    closest = ", ".join(map(repr, close or list(layers)[:3]))
    raise BudgetError(
        f"Budget: {option} must name layers of the model, got {pattern!r}, which matches none; the closest names are {closest}"
    )


def _around(name: str) -> list[str]:
    """The name and those of the modules around it: ``a.b.c``, ``a.b``, ``a``."""
    parts = name.split(".")
    return [".".join(parts[:end]) for end in range(len(parts), 0, -1)]
