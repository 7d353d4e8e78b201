"""How a measurement tells how far it is, without knowing who shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol


class Bar(Protocol):
    """What shows the steps of one measurement."""

    def update(self, n: int = 1, **metrics: Any) -> None:
        """``n`` more steps are done. ``metrics`` replace or join those given before."""
        ...


Bars = Callable[[int, str], AbstractContextManager[Bar]]
"""Opens a bar: of how many steps at most, and what is measured."""


class _Silent:
    def update(self, n: int = 1, **metrics: Any) -> None:
        pass


@contextmanager
def silent(total_steps: int, desc: str) -> Iterator[Bar]:
    """Shows nothing."""
    yield _Silent()
