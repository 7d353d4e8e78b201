"""``isinstance(x, torch.Tensor)`` and ``torch.is_tensor(x)`` while a forward is traced: what stands for a tensor is one."""

from __future__ import annotations

import builtins
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx

_LIBRARIES = (str(Path(torch.__file__).parent) + os.sep, str(Path(__file__).parent) + os.sep)
# Functions of PyTorch that ask for the user.
_ON_BEHALF = frozenset({"is_tensor", "_isinstance"})
_isinstance = builtins.isinstance


@contextmanager
def questions_answered(kind: type[fx.Proxy], value: Callable[[fx.Proxy], Any]) -> Iterator[None]:
    """Inside, code of the user that asks for the class of a proxy gets the answer for the value in its place.

    Args:
        kind: Class of the proxies.
        value: The value that a proxy stands for.
    """

    def answer(obj: Any, classes: Any) -> bool:
        if type(obj) is not kind or not _is_asked_by_user(sys._getframe(1)):
            return _isinstance(obj, classes)
        if fx.Proxy in (classes if _isinstance(classes, tuple) else (classes,)):
            return True
        return _isinstance(value(obj), classes)

    builtins.isinstance = answer
    try:
        yield
    finally:
        builtins.isinstance = _isinstance


def _is_asked_by_user(frame: Any) -> bool:
    code = frame.f_code
    return code.co_name in _ON_BEHALF or not code.co_filename.startswith(_LIBRARIES)
