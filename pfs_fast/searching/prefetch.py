"""Batches of any loader on their way to a CUDA device while the step before is running there.

The host asks the device for a step and goes on at once, so the next batch is fetched and copied while that step runs; the copy
has a stream of its own and starts from pinned memory, or else it would wait for the step. On the CPU nothing is prefetched: a
thread would take its time from the step, which has all cores already; loading in other processes is what a DataLoader's workers
are for.

The CUDA part is written from PyTorch's documentation; not run on a GPU yet.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

AHEAD = 4
"""Steps that the host may be ahead of the device. Without a limit a fast loader would fill the memory with batches."""


class Event(Protocol):
    """A place in the work of a device. ``torch.cuda.Event`` is one."""

    def synchronize(self) -> None: ...


class Transfer(Protocol):
    """Moves tensors to a device beside its work; the CUDA one below, another in tests."""

    def send(self, images: Tensor) -> Tensor: ...

    def pin(self, labels: Tensor) -> Tensor: ...

    def stay_in_stream(self) -> None: ...

    def mark(self) -> Event: ...


class CudaTransfer:
    """Copies from pinned memory in a stream of its own.

    Args:
        device: A CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream: torch.cuda.Stream | None = torch.cuda.Stream(device)

    def send(self, images: Tensor) -> Tensor:
        """Images on the device, for work asked for from now on in the current stream."""
        source = self.pin(images)
        if self._stream is None:
            return source.to(self._device, non_blocking=True)
        current = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._stream):
            copy = source.to(self._device, non_blocking=True)
        current.wait_stream(self._stream)
        # Its memory belongs to the copying stream, which must not take it back before the step has read it.
        copy.record_stream(current)
        return copy

    def pin(self, labels: Tensor) -> Tensor:
        """The same values in pinned memory, which is copied from without waiting."""
        return labels if labels.is_pinned() else labels.pin_memory()

    def stay_in_stream(self) -> None:
        """Copy in the current stream from now on, and no longer beside its work.

        A capture that failed can leave PyTorch's allocator in the belief that one is under way. It then never takes back memory
        that two streams have used.
        """
        self._stream = None

    def mark(self) -> torch.cuda.Event:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return event


def prefetched(
    batches: Iterator[tuple[Tensor, Tensor]], transfer: Transfer, ahead: int = AHEAD
) -> Iterator[tuple[Tensor, Tensor]]:
    """The same batches with images on the device and labels in pinned memory, where the host can check them.

    Batches whose images are on a device stay as they are. Errors of the loader come through unchanged, and closing this
    iterator closes ``batches``.

    Args:
        batches: (images, labels).
        transfer: To the device.
        ahead: Batches in use at the same time.
    """
    marks: deque[Event] = deque()
    try:
        for images, labels in batches:
            if images.device.type == "cpu":
                images = transfer.send(images)
            yield images, transfer.pin(labels) if labels.device.type == "cpu" else labels
            marks.append(transfer.mark())  # the step over this batch has been asked for
            if len(marks) > ahead:
                marks.popleft().synchronize()
    finally:
        close = getattr(batches, "close", None)
        if close is not None:
            close()
