"""CUDA graphs: a sequence of device work recorded once and started again with one call.

Written from PyTorch's documentation of ``torch.cuda.graph``; not run on a GPU yet.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# What PyTorch says once in a process that uses the debug mode for synchronisation; it tells of no wait.
MODE_NOTICE = "Synchronization debug mode is a prototype feature"


class Graph(Protocol):
    """Recorded work. ``torch.cuda.CUDAGraph`` is one."""

    def replay(self) -> None: ...

    def reset(self) -> None: ...


class Graphs(Protocol):
    """Records work; the CUDA one below, another in the tests of those who use it."""

    def capture(self, work: Callable[[], None]) -> Graph:
        """Record what ``work`` asks of the device, without doing it."""
        ...

    def waits(self, work: Callable[[], None]) -> str | None:
        """Do ``work``, and say what in it a graph cannot do: wait for the device, or read from the host; None: nothing."""
        ...


class CudaGraph:
    """A recorded graph with the pool of memory that it works in."""

    def __init__(self, graph: torch.cuda.CUDAGraph) -> None:
        self._graph, self.alive = graph, True

    def replay(self) -> None:
        self._graph.replay()

    def reset(self) -> None:
        self._graph.reset()
        self.alive = False

    def pool(self) -> tuple[int, int]:
        return self._graph.pool()


class CudaGraphs:
    """Graphs in the current stream of one device, which must not be the default one.

    Graphs that exist at the same time share their memory: none of them leaves anything behind but in tensors made before.
    """

    device_type = "cuda"

    def __init__(self) -> None:
        self._made: list[CudaGraph] = []

    def capture(self, work: Callable[[], None]) -> CudaGraph:
        # A pool goes with its last graph, so only that of a graph that is still there can be shared.
        self._made = [made for made in self._made if made.alive]
        pool = self._made[0].pool() if self._made else None
        graph = torch.cuda.CUDAGraph()
        # thread_local: threads of a loader may pin memory meanwhile, which "global" would take for an error.
        with torch.cuda.graph(
            graph,
            pool=pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            work()
        self._made.append(CudaGraph(graph))
        return self._made[-1]

    def waits(self, work: Callable[[], None]) -> str | None:
        # A wait inside a capture leaves PyTorch's allocator and random state in the middle of it; a warning costs nothing.
        before = torch.cuda.get_sync_debug_mode()
        operands = _HostOperands(self.device_type)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                torch.cuda.set_sync_debug_mode("warn")
                with operands:
                    work()
            finally:
                torch.cuda.set_sync_debug_mode(before)
        waits = operands.found
        for warning in caught:
            if "synchronizing CUDA operation" in str(warning.message):
                waits = f"{warning.message} ({warning.filename}:{warning.lineno})"
            elif not str(warning.message).startswith(MODE_NOTICE):
                warnings.warn_explicit(
                    warning.message, warning.category, warning.filename, warning.lineno
                )
        return waits


class _HostOperands(TorchDispatchMode):
    """Notes an operator that takes values of the host to the device or back: a replay would find the memory of the capture.

    Numbers (tensors without dimensions) become part of a launch. Copies of this kind do not always wait, so that the debug mode
    does not tell of them.
    """

    def __init__(self, device_type: str) -> None:
        super().__init__()
        self._device_type = device_type
        self.found: str | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        host = next((t for t in given if t.device.type == "cpu" and t.dim() > 0), None)
        if host is not None and self.found is None:
            made = [t for t in tree_leaves(results) if isinstance(t, Tensor)]
            if any(t.device.type == self._device_type for t in (*given, *made)):
                self.found = f"{func} of a tensor of shape {list(host.shape)} on the CPU"
        return results


@contextmanager
def side_stream(device: torch.device, stream: torch.cuda.Stream | None = None) -> Iterator[None]:
    """Makes another stream the current one, ordered behind the caller's and before what the caller does next.

    A capture cannot run in the default stream, and steps before a capture must have run where it runs.

    Args:
        device: On the CPU nothing is done.
        stream: Of the device; None: a new one.
    """
    if device.type != "cuda":
        yield
        return
    with torch.cuda.device(device):
        outer = torch.cuda.current_stream()
        stream = torch.cuda.Stream() if stream is None else stream
        stream.wait_stream(outer)
        try:
            with torch.cuda.stream(stream):
                yield
        finally:
            outer.wait_stream(stream)
