"""What a forward leaves on its modules (``self.mean = self.mean.type_as(x)``), while nothing real runs: it is put back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

_ABSENT = object()
_DEPTH = 3  # of lists and dictionaries that are looked into


@dataclass(frozen=True)
class Left:
    """An attribute in which a forward left something.

    Attributes:
        module: Whose attribute.
        name: Of the attribute; ``"_buffers"`` where it is one of them.
        value: What was left. Lists and dictionaries are copies.
    """

    module: nn.Module
    name: str
    value: Any


class ModuleState:
    """The attributes of all modules of a network, before it runs.

    Args:
        root: The network.
    """

    def __init__(self, root: nn.Module) -> None:
        self._before = [
            (module, {name: (value, _copy(value)) for name, value in vars(module).items()})
            for module in root.modules()
        ]

    def undo(self, kind: type) -> list[Left]:
        """Put back every attribute that holds something of a kind, as it was. Returns what was there."""
        left = []
        for module, before in self._before:
            for name, value in list(vars(module).items()):
                if not holds(value, kind):
                    continue
                left.append(Left(module, name, _copy(value)))
                _restore(module, name, before)
        return left

    def restore(self, left: list[Left]) -> None:
        """Put back these attributes, as they were."""
        names = {(id(found.module), found.name) for found in left}
        for module, before in self._before:
            for name in [n for i, n in names if i == id(module)]:
                _restore(module, name, before)


@contextmanager
def put_back(root: nn.Module, kind: type) -> Iterator[None]:
    """Afterwards no attribute holds something of a kind that the modules did not hold before."""
    state = ModuleState(root)
    try:
        yield
    finally:
        state.undo(kind)


def holds(value: Any, kind: type, depth: int = _DEPTH) -> bool:
    """Whether a value, or what a list, tuple or dictionary holds, is of a kind."""
    if isinstance(value, kind):
        return True
    if depth and isinstance(value, (dict, list, tuple)):
        entries = value.values() if isinstance(value, dict) else value
        return any(holds(entry, kind, depth - 1) for entry in entries)
    return False


def _restore(module: nn.Module, name: str, before: dict[str, tuple[Any, Any]]) -> None:
    old, content = before.get(name, (_ABSENT, None))
    if old is _ABSENT:
        vars(module).pop(name, None)
        return
    if isinstance(old, dict):
        old.clear()
        old.update(content)
    elif isinstance(old, list):
        old[:] = content
    vars(module)[name] = old


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return dict(value)
    return list(value) if isinstance(value, list) else value
