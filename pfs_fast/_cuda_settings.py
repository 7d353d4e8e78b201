"""PyTorch's settings for the whole process that decide what a GPU computes, set for as long as a call takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

# Of each kind of product; oneDNN's is only put back, which the setting of cuBLAS changes, too.
_PRODUCTS = (
    torch.backends.cudnn.conv,
    torch.backends.cudnn.rnn,
    torch.backends.cuda.matmul,
    torch.backends.mkldnn.matmul,
)


@contextmanager
def cuda_settings(
    device: torch.device, float32: str | None = "ieee", *, repeatable: bool = False
) -> Iterator[None]:
    """Inside: how a CUDA device multiplies float32, and whether its convolutions give the same bits each time.

    On the CPU nothing is set. What the caller had is back at the end.

    Args:
        device: Where the work runs.
        float32: ``"ieee"``: products of float32. ``"tf32"``: of ten bits, on tensor cores, as PyTorch's default is for
            convolutions. None: as the caller has set it.
        repeatable: Only algorithms of cuDNN that add in a fixed order, none of them chosen by a clock.
    """
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    restore = None if float32 is None else _set_float32(float32)
    algorithms = cudnn.deterministic, cudnn.benchmark
    if repeatable:
        cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = algorithms
        if restore is not None:
            restore()


def _set_float32(precision: str) -> Callable[[], None]:
    """Sets it, in PyTorch's old settings and in the new ones, which must agree for either to be read; returns what undoes it."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [part.fp32_precision for part in _PRODUCTS]
    old: tuple[bool, str] | None = None
    with suppress(RuntimeError):  # the caller's two do not agree: then the new ones decide
        old = cudnn.allow_tf32, torch.get_float32_matmul_precision()
    if old is not None:
        cudnn.allow_tf32 = matmul.allow_tf32 = precision == "tf32"
    for part in _PRODUCTS[:-1]:
        part.fp32_precision = precision

    def restore() -> None:
        if old is not None:
            cudnn.allow_tf32 = old[0]
            torch.set_float32_matmul_precision(old[1])
        for part, value in zip(_PRODUCTS, before, strict=True):
            part.fp32_precision = value

    return restore
