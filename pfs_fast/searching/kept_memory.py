"""Memory that the operators allocate and free in every step of a loop on the CPU, kept for its next step.

PyTorch takes CPU memory from the C library, which gives much of it back to the system when a tensor dies; the next step then has
every page of it trapped into and cleared again. Inside `KeptMemory` the outputs and the working memory of this package's operators
come from blocks that stay with the process instead. Nothing else changes: not a bit of any result, and no tensor of any other
library.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import torch

from .. import _library


class KeptMemory:
    """Blocks allocated inside ``with`` are kept until `close`; ``with`` may be entered any number of times before.

    At most 1.5 times the bytes that were in use at once are held. Without the compiled operators this does nothing, since
    there is nothing that it could serve.

    Example:
        >>> memory = KeptMemory()
        >>> with memory:
        ...     pass  # steps
        >>> memory.close()
    """

    def __init__(self) -> None:
        self._pool = _library._C.KeptMemory() if _library.is_loaded() else None

    def __enter__(self) -> KeptMemory:
        if self._pool is not None:
            self._pool.enter()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._pool is not None:
            self._pool.exit()

    def close(self) -> None:
        """Returns all free blocks to the system; those of living tensors follow when these die."""
        self._pool = None


@contextmanager
def kept_memory(device: torch.device) -> Iterator[None]:
    """`KeptMemory` for one loop on ``device``; nothing on devices whose allocator keeps blocks itself."""
    if device.type != "cpu":
        yield
        return
    memory = KeptMemory()
    try:
        with memory:
            yield
    finally:
        memory.close()


def kept_bytes() -> tuple[int, int]:
    """``(bytes in use by tensors, bytes kept free)`` of the blocks of every `KeptMemory`."""
    return _library._C.kept_bytes() if _library.is_loaded() else (0, 0)
