"""What a command prints: text that may stem from a file never steers the terminal."""

from __future__ import annotations

import sys
from typing import TextIO


def escaped(text: object, keep: str = "") -> str:
    r"""Text with every character that a terminal does not show as itself written out, such as ``\x1b``.

    Args:
        text: Anything with a text form.
        keep: Characters that stay as they are.
    """
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in str(text)
    )


def say(text: object = "", file: TextIO | None = None) -> None:
    """Prints lines to the standard output, or to ``file``; only their ends are left of all that is not shown as itself."""
    print(escaped(text, keep="\n"), file=sys.stdout if file is None else file)
