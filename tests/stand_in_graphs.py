"""Stands in for CUDA graphs on the CPU: records the operations on tensors, and repeats them on the same memory.

As in a graph, Python runs only while recording, so a host number or a tensor that was made anew stays what it was; and recording
does no work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


class _Recording(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[Any, tuple, dict, Any]] = []
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in READS:
            raise RuntimeError("operation not permitted when stream is capturing")
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[i] if i < len(args) else kwargs.get(argument.name)
                self.before += [(t, t.clone()) for t in tree_flatten(value)[0] if _is_tensor(t)]
        result = func(*args, **kwargs)
        self.operations.append((func, args, kwargs, result))
        return result


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.reads.append(str(func))
        return func(*args, **(kwargs or {}))


class StandInGraph:
    def __init__(self, operations: list[tuple[Any, tuple, dict, Any]], log: list[str]) -> None:
        self._operations, self._log = operations, log

    @torch.no_grad()
    def replay(self) -> None:
        self._log.append("replay")
        for func, args, kwargs, result in self._operations:
            inputs = {_memory(t) for t in tree_flatten((args, kwargs))[0] if _is_tensor(t)}
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(result)[0], tree_flatten(again)[0], strict=True):
                if _is_tensor(old) and _memory(old) not in inputs:
                    old.copy_(new)

    def reset(self) -> None:
        self._log.append("reset")
        self._operations = None


class StandInGraphs:
    """``log``: "capture", "replay" and "reset" as they came."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def capture(self, work: Callable[[], None]) -> StandInGraph:
        self.log.append("capture")
        random = torch.random.get_rng_state()
        tape = _Recording()
        try:
            with tape:
                work()
        finally:
            with torch.no_grad():
                for tensor, old in reversed(tape.before):
                    tensor.copy_(old)
            torch.random.set_rng_state(random)
        return StandInGraph(tape.operations, self.log)

    def waits(self, work: Callable[[], None]) -> str | None:
        with _Counting() as counting:
            work()
        return counting.reads[0] if counting.reads else None


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
