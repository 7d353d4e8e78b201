"""Fashion-MNIST, from the idx files that Debian packages."""

from __future__ import annotations

import gzip
import math
import os
import zlib
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import LoaderError
from .splits import ImageSet, Splits, WholeSplits, make_splits

_DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
_UNSIGNED_BYTE = 0x08


@overload
def fashion_mnist(
    folder: str | os.PathLike[str] | None = None, size: int = 32, *, channels: int = 3
) -> WholeSplits: ...


@overload
def fashion_mnist(
    folder: str | os.PathLike[str] | None = None, size: int = 32, *, channels: int = 3, val: int
) -> Splits: ...


def fashion_mnist(
    folder: str | os.PathLike[str] | None = None,
    size: int = 32,
    *,
    channels: int = 3,
    val: int = 5000,
) -> Splits:
    """Fashion-MNIST: 60,000 training and 10,000 test images of 28x28 grey pixels in 10 classes.

    Args:
        folder: Where the four `*-ubyte.gz` files are; default: where Debian's package
            dataset-fashion-mnist puts them.
        size: Height and width, at least 28; images are padded with zeros on all sides.
        channels: Grey values are repeated over so many channels.
        val: Number of last training images to hold out for validation.

    Raises:
        LoaderError: The files are missing or damaged.
    """
    if size < 28:
        raise LoaderError(
            f"fashion_mnist: size must be >= 28, got {size}; images are padded, never shrunk"
        )
    root = Path(_DEBIAN_FOLDER if folder is None else folder)
    train, test = (_part(root, prefix, size, channels) for prefix in ("train", "t10k"))
    return make_splits("fashion_mnist", "fashion-mnist", train, test, val=val)


def _part(root: Path, prefix: str, size: int, channels: int) -> ImageSet:
    grey = read_idx(root / f"{prefix}-images-idx3-ubyte.gz")
    labels = read_idx(root / f"{prefix}-labels-idx1-ubyte.gz")
    before, after = (size - 28) // 2, size - 28 - (size - 28) // 2
    padded = F.pad(grey, (before, after, before, after))
    images = padded.unsqueeze(-1).expand(-1, -1, -1, channels)
    return ImageSet.of(images, labels, layout="NHWC", function="fashion_mnist")


def read_idx(path: str | os.PathLike[str]) -> Tensor:
    """An array of unsigned bytes from a gzipped idx file.

    Raises:
        LoaderError: The file is missing or damaged.
    """
    try:
        with gzip.open(path) as file:
            content = file.read()
    except FileNotFoundError as error:
        raise LoaderError(
            f"fashion_mnist: folder must hold {Path(path).name}, got {Path(path).parent}; "
            "apt-get install dataset-fashion-mnist"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise LoaderError(
            f"fashion_mnist: {path} must be a whole gzip file ({error}); install the data again"
        ) from error
    rank = content[3] if len(content) >= 4 else 0
    shape = tuple(int(n) for n in np.frombuffer(content[4 : 4 + 4 * rank], dtype=">u4"))
    data = content[4 + 4 * rank :]
    is_bytes = content[:3] == bytes((0, 0, _UNSIGNED_BYTE))
    if not is_bytes or len(shape) != rank or len(data) != math.prod(shape):
        raise LoaderError(
            f"fashion_mnist: {path} must be an idx file of unsigned bytes, got {len(data)} bytes "
            f"for shape {list(shape)}; install the data again"
        )
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(shape)
