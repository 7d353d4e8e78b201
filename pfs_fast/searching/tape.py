"""Work on the CPU as a list of operator calls: recorded while it is done, then made again without Python and autograd.

What a CUDA graph is to a GPU. The calls of a step are the same from step to step, and so is all that Python, the dispatcher's autograd
layers and the autograd engine do to get at them; for small networks and batches that takes longer than the operators.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from .. import _library
from .._modules import has_hooks

# Their results are host numbers, or tensors whose shapes tell of values: Python may go on differently the next time.
_DEPENDS_ON_DATA = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})

# Code of these packages runs operators and nothing else that would have to run in every step.
_KNOWN_PACKAGES = frozenset(
    {"_operator", "builtins", "math", "operator", "pfs_fast", "timm", "torch", "torchvision"}
)


class NotRecordedError(Exception):
    """Why work cannot be made again."""


class Tape:
    """Recorded work.

    Attributes:
        num_calls: Operators of a replay.
    """

    def __init__(self, recorded: Any) -> None:
        self._recorded = recorded
        self.num_calls: int = recorded.num_calls

    def replay(self, *inputs: Tensor) -> list[Tensor]:
        """Does the work again.

        Args:
            inputs: As those of the recording in number, shape, dtype and strides.

        Returns:
            What the work returned, made of these inputs and of what the fixed tensors hold now.
        """
        return self._recorded.replay(inputs)


def can_record() -> bool:
    """Whether the compiled library, which makes the calls, is there."""
    return _library.is_loaded()


def record(
    work: Callable[..., tuple[Tensor, ...]], inputs: tuple[Tensor, ...], fixed: Iterable[Tensor]
) -> tuple[tuple[Tensor, ...], Tape | NotRecordedError]:
    """Does ``work(*inputs)`` and records it on the way.

    Args:
        work: Tensor operations on the CPU, and nothing that must happen again but these.
        inputs: What is new in every replay.
        fixed: Tensors that are read or written where they are in every replay.

    Returns:
        What ``work`` returned, and the tape; in its place the reason where there can be none: an operator's result is not a tensor or
        has a shape that depends on values, or a tensor comes from neither the work nor ``inputs`` nor ``fixed``.
    """
    recording = _Recording(_library._C.Tape(list(inputs), list(fixed)))
    with recording:
        outputs = work(*inputs)
    if recording.reason is None:
        recording.attempt(recording.tape.finish, list(outputs))
    if recording.reason is not None:
        return outputs, recording.reason
    return outputs, Tape(recording.tape)


class _Recording(TorchDispatchMode):
    def __init__(self, tape: Any) -> None:
        super().__init__()
        self.tape = tape
        self.reason: NotRecordedError | None = None

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        results = func(*args, **kwargs)
        if self.reason is None:
            self._add(func, args, kwargs, results)
        return results

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            self.reason = NotRecordedError(f"{func} is no plain operator")
        elif _DEPENDS_ON_DATA & set(func.tags) and not _indexes_by_number(func, args):
            self.reason = NotRecordedError(f"{func} looks at the values of a tensor")
        else:
            schema = func._schema
            name, overload = schema.name, schema.overload_name
            self.attempt(self.tape.add, name, overload, args, kwargs, results)

    def attempt(self, call: Callable[..., None], *args: Any) -> None:
        try:
            call(*args)
        except (RuntimeError, TypeError, ValueError) as error:
            self.reason = NotRecordedError(str(error).partition("\n")[0])


def _indexes_by_number(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether this is ``x[indices]`` without a mask: then its shape is that of the indices."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return all(index is None or index.dtype in (torch.int32, torch.int64) for index in args[1])


def foreign_code(net: fx.GraphModule) -> str | None:
    """What in a graph runs Python that a tape would leave out: hooks, and functions and modules that were not traced; None: nothing."""
    modules = dict(net.named_modules(remove_duplicate=False))
    for node in net.graph.nodes:
        if node.op == "call_function" and _package(node.target) not in _KNOWN_PACKAGES:
            return (
                f"the function '{getattr(node.target, '__name__', node.target)}' at '{node.name}'"
            )
        if node.op != "call_module":
            continue
        for name, module in modules[node.target].named_modules(prefix=str(node.target)):
            if has_hooks(module) or module._backward_hooks or module._backward_pre_hooks:
                return f"a hook of '{name}'"
            if _package(type(module).forward) not in _KNOWN_PACKAGES:
                return f"the module '{name}', a {type(module).__name__}"
    return None


def _package(function: Any) -> str:
    return str(getattr(function, "__module__", None) or "builtins").partition(".")[0]
