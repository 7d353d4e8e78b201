"""Small networks, each with the groups it must have and the reasons for what must be held whole."""

from __future__ import annotations

from . import attention, inputs, joins, layers, modules, pieces, sums
from .case import OUTPUT, Case

_TOPICS = (sums, joins, pieces, layers, attention, modules, inputs)
CASES: dict[str, Case] = {name: case for topic in _TOPICS for name, case in topic.CASES.items()}
assert len(CASES) == sum(len(topic.CASES) for topic in _TOPICS), "two cases have one name"

__all__ = ["CASES", "OUTPUT", "Case"]
