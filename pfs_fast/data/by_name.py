"""Data sets by name, for the command line."""

from __future__ import annotations

import difflib
from pathlib import Path

from ..errors import LoaderError
from .folder import imagefolder
from .idx import fashion_mnist
from .sources import cifar10, digits, from_npz, synthetic
from .splits import Splits

_NAMED = {
    "cifar10": cifar10,
    "digits": digits,
    "fashion-mnist": fashion_mnist,
    "synthetic": synthetic,
}


def names() -> tuple[str, ...]:
    """Names that `load` takes besides paths."""
    return tuple(_NAMED)


def load(source: str, *, size: int | None = None) -> Splits:
    """A data set by name or path.

    Args:
        source: One of `names()`, the path of an `.npz` file, or a folder of image folders.
        size: Height and width, for the sources that resize: digits, fashion-mnist, folders.

    Raises:
        LoaderError: There is no such source, or it cannot be read.
    """
    if not isinstance(source, str) or "\0" in source:
        raise LoaderError(
            f"load: source must be one of {', '.join(names())}, an .npz file or a folder, got {source!r}; pass a string"
        )
    if source in ("digits", "fashion-mnist") and size is not None:
        return _NAMED[source](size=size)
    if source not in _NAMED and Path(source).is_dir():
        return imagefolder(source) if size is None else imagefolder(source, size)
    if size is not None:
        raise LoaderError(
            f"load: size must be None for {source!r}, got {size}; its images have a size of their own"
        )
    if source in _NAMED:
        return _NAMED[source]()
    if source.endswith(".npz") or Path(source).is_file():
        return from_npz(source)
    close = difflib.get_close_matches(source, names(), n=1)
    hint = f"did you mean {close[0]}?" if close else "check the path"
    raise LoaderError(
        f"load: source must be one of {', '.join(names())}, an .npz file or a folder, "
        f"got {source!r}; {hint}"
    )
