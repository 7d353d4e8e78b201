"""bf16 convolutions that the library under PyTorch computes wrongly on the CPU: found by trial, and run in float32 instead."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

ISSUE = "https://github.com/pytorch/pytorch/issues/169688"

TRIALS = 4
"""Per form. Of single trials of five wrong forms 1,188 of 1,200 showed it, and at least 14 of 20 of each in every process."""

TOLERANCE = 2.0**-5
"""Of the largest value. Right results are off by 2**-8, wrong ones by more than they are themselves, or NaN."""

_CONVS = frozenset(
    {
        torch.conv1d,
        torch.conv2d,
        torch.conv3d,
        torch.conv_transpose1d,
        torch.conv_transpose2d,
        torch.conv_transpose3d,
        torch.convolution,
    }
)
# The fused operators that call PyTorch's convolutions; those that do not have kernels of their own.
_FUSED_CONVS = frozenset({"pfs_fast::frozen_conv", "pfs_fast::_frozen_conv_backward"})

_wrong: dict[Any, bool] = {}  # by form, for the whole process


class SoundConvs:
    """Contexts in which every bf16 convolution on the CPU gives what float32 gives, up to rounding.

    oneDNN, under PyTorch, computes some forms wrongly in bf16 (``ISSUE``): an output one pixel wide with a stride above 1, and
    dilated depthwise kernels among them. Some read memory that nobody wrote. Which forms differs from processor to processor.
    So each form is tried against float32 before it is first used in this process: the output, and the gradients that the call
    wants, on random values of the same spatial size with at least two images, in memory that was filled with NaN. A wrong one
    runs in float32, and its values are rounded to bf16.

    A form is all that a call says: shapes (but for the number of images), strides, padding, dilation, groups, dtypes,
    layouts, and the number of threads. CUDA is not checked, and neither is what ``torch.compile`` compiles.

    Args:
        model: Whose parameters give the layers their names.
        needed: Whether any convolution can be in bf16 on the CPU; without, the contexts do nothing.
    """

    def __init__(self, model: nn.Module, needed: bool) -> None:
        self._mode = _Mode(model) if needed else None

    @contextlib.contextmanager
    def __call__(self, caller: str) -> Iterator[None]:
        """While inside, ``caller`` warns once for each layer that runs in float32."""
        if self._mode is None:
            yield
            return
        self._mode.caller = caller
        with self._mode:
            yield

    def backward(self, loss: Tensor, caller: str) -> None:
        """``loss.backward()``, inside: gradients that are written in Python convolve, too."""
        if self._mode is None:
            loss.backward()
            return
        with self(caller):  # Tensor.backward switches modes off
            torch.autograd.Variable._execution_engine.run_backward(
                (loss,), (torch.ones_like(loss),), False, False, (), True, True
            )


def may_run_bf16(
    model: nn.Module, device: torch.device, autocast: torch.dtype | None = None
) -> bool:
    """Whether convolutions of a model can be in bf16 on the CPU, by autocast or by its parameters."""
    if device.type != "cpu":
        return False
    return autocast == torch.bfloat16 or any(p.dtype == torch.bfloat16 for p in model.parameters())


class _Mode(TorchFunctionMode):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._warned: set[str] = set()
        self.caller = ""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if not _is_conv(func) or torch.compiler.is_compiling() or not _is_bf16(args, kwargs):
            return _call(func, args, kwargs)
        form = _form(func, args, kwargs)
        if form not in _wrong:
            _wrong[form] = _differs(func, args, kwargs)
        if not _wrong[form]:
            return _call(func, args, kwargs)
        self._warn(args, kwargs)
        return _in_float32(func, args, kwargs).bfloat16()

    def _warn(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x, weight = _operands(args, kwargs)
        name = self._name(weight)
        if name in self._warned:
            return
        self._warned.add(name)
        rest = [*args[3:], *(f"{k}={v}" for k, v in kwargs.items() if not isinstance(v, Tensor))]
        warnings.warn(
            f"{self.caller}: bf16 convolutions must give what float32 gives, which {name} does not on this processor (input "
            f"{list(x.shape)}, weight {list(weight.shape)}, options {', '.join(map(str, rest))}; {ISSUE}); it runs in float32, which "
            "is slower and right",
            RuntimeWarning,
            stacklevel=2,
        )

    def _name(self, weight: Tensor) -> str:
        place = weight.data_ptr()
        for name, parameter in self._model.named_parameters():
            if parameter.data_ptr() == place:
                return f"layer '{name.rpartition('.')[0]}'"
        return f"a convolution of a computed weight {list(weight.shape)}"


def _is_conv(func: Any) -> bool:
    if func in _CONVS:
        return True
    packet = getattr(func, "overloadpacket", func)
    return getattr(packet, "_qualified_op_name", "") in _FUSED_CONVS


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    x = args[0] if args else kwargs["input"]
    return x, args[1] if len(args) > 1 else kwargs["weight"]


def _is_bf16(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call computes in bf16 on the CPU, on values."""
    x, weight = _operands(args, kwargs)
    if isinstance(x, FakeTensor) or x.device.type != "cpu" or x.numel() == 0:
        return False
    lowered = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if lowered else x.dtype
    return dtype == torch.bfloat16 and (lowered or weight.dtype == dtype)


def _images(args: tuple[Any, ...], kwargs: dict[str, Any]) -> int | None:
    """Images of a trial: one for each thread, two at least; None without a dimension for them."""
    x, weight = _operands(args, kwargs)
    few = max(2, torch.get_num_threads())
    return min(x.shape[0], few) if x.dim() == weight.dim() else None


def _form(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, _ = _operands(args, kwargs)
    images = _images(args, kwargs)
    recorded = torch.is_grad_enabled()

    def describe(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = tuple(value.shape)
            if value is x and images is not None:
                shape = (images, *shape[1:])
            layout = suggest_memory_format(value)
            return shape, value.dtype, layout, recorded and value.requires_grad
        if isinstance(value, (list, tuple)):  # of which an input size begins with the images, too
            size = len(value) == x.dim() and images is not None
            return (images, *value[1:]) if size else tuple(value)
        return value

    named = tuple((key, describe(kwargs[key])) for key in sorted(kwargs))
    threads, autocast = torch.get_num_threads(), torch.is_autocast_enabled("cpu")
    return func, threads, autocast, tuple(map(describe, args)), named


def _differs(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a form gives anything else than in float32, in any of some trials on random values."""
    generator = torch.Generator().manual_seed(0)  # not the caller's
    x, _ = _operands(args, kwargs)
    images = _images(args, kwargs)
    recorded = torch.is_grad_enabled()

    def random(value: Any) -> Any:
        if isinstance(value, Tensor):
            shape = list(value.shape)
            if value is x and images is not None:
                shape[0] = images
            values = torch.randn(shape, generator=generator).bfloat16().to(value.dtype)
            values = values.contiguous(memory_format=suggest_memory_format(value))
            return values.requires_grad_(recorded and value.requires_grad)
        if isinstance(value, (list, tuple)) and len(value) == x.dim() and images is not None:
            return [images, *value[1:]]
        return value

    # Whoever records the work around this must not see it.
    with _disable_current_modes(), torch.inference_mode(False), torch.enable_grad():
        for _ in range(TRIALS):
            some, named = tuple(map(random, args)), {k: random(v) for k, v in kwargs.items()}
            exact, wanted = _results(_in_float32, func, some, named, None)
            got, _ = _results(_call, func, some, named, wanted)
            if not all(map(_close, got, exact)):
                return True
    return False


def _results(
    run: Callable[..., Tensor],
    func: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    direction: Tensor | None,
) -> tuple[list[Tensor], Tensor]:
    """Output of a call and the gradients that it wants, and the gradient of its output that they are of."""
    _fill_free_memory()
    output = run(func, args, kwargs)
    if direction is None:
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(output.shape, generator=generator).bfloat16()
        direction = direction.contiguous(memory_format=suggest_memory_format(output))
    results = [output.detach()]
    for tensor in (*args, *kwargs.values()):
        if isinstance(tensor, Tensor) and tensor.requires_grad:  # each alone, in fresh memory
            _fill_free_memory()
            gradient = direction.to(output.dtype)
            results += torch.autograd.grad(output, tensor, gradient, retain_graph=True)
    return results, direction


def _fill_free_memory() -> None:
    """Leaves NaN in what the allocator gives out next: a block of every size from 64 B to 2 MiB."""
    blocks = [torch.full((2**k,), torch.nan, dtype=torch.bfloat16) for k in range(5, 21)]
    del blocks


def _close(got: Tensor, exact: Tensor) -> bool:
    if exact.numel() == 0:
        return True
    error = (got.float() - exact.float()).abs().max()
    return bool(error <= TOLERANCE * exact.float().abs().max())  # False for NaN


def _call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _in_float32(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    def wide(value: Any) -> Any:
        return value.float() if isinstance(value, Tensor) else value

    with torch.autocast("cpu", enabled=False):
        return func(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})
