"""Memory of a step: what autograd keeps between forward and backward, and the peak of what is allocated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from benchmarks.timing import synchronize

# The profiler tells of missing GPUs and of its own start on standard error.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")

# Smaller storages are per-channel vectors: a mask of a bit a value of the smallest layer measured here is larger.
MIN_BYTES = 2**13


def saved_bytes(
    forward: Callable[[], object], *, without: Iterable[Tensor] = (), min_bytes: int = MIN_BYTES
) -> int:
    """Bytes that autograd keeps for the backward pass of ``forward``.

    Each storage counts once, also one that the caller holds anyway (an input).

    Args:
        forward: Runs the forward pass, and the backward pass if it likes.
        without: Tensors that do not count: weights and buffers.
        min_bytes: Smaller storages do not count.
    """
    left_out = {tensor.untyped_storage().data_ptr() for tensor in without}
    sizes: dict[int, int] = {}
    held: list[Tensor] = []  # as long as they live, no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes() >= min_bytes and storage.data_ptr() not in left_out:
            sizes[storage.data_ptr()] = storage.nbytes()
        held.append(tensor.detach())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward()
    del output
    return sum(sizes.values())


def peak_bytes(run: Callable[[], object], device: torch.device) -> int:
    """Peak of memory allocated through PyTorch while ``run`` runs, above what was allocated before.

    On CUDA the allocator's own figure. On the CPU the running sum of the profiler's allocation records; what a library allocates
    behind PyTorch's back is in neither.
    """
    if device.type != "cuda":
        return _cpu_peak(run)
    synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(run: Callable[[], object]) -> int:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    records = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    allocated = peak = 0
    for _, nbytes in sorted(records, key=lambda record: record[0]):
        allocated += nbytes
        peak = max(peak, allocated)
    return peak
