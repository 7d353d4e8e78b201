"""The max pool."""

from __future__ import annotations

import torch
from torch import Tensor

from pfs_fast._library import require_ops
from pfs_fast.ops._options import per_dimension


def max_pool(
    x: Tensor,
    kernel: int | tuple[int, int],
    stride: int | tuple[int, int] | None = None,
    padding: int | tuple[int, int] = 0,
) -> Tensor:
    """Maximum over windows, which keeps one byte for each value of its output.

    ``torch.nn.functional.max_pool2d`` keeps its input and an int64 index for each output. This one
    gives the same values, bit for bit, and keeps where in its window each maximum was. Of equal
    maxima the first in the window counts, a NaN is the maximum, and where windows overlap gradients
    add up in float32 (float64 for float64), in one order whatever the number of threads.
    Differentiable once.

    Args:
        x: Input, contiguous or channels_last; other strides are copied first. [N, C, H, W];
            float32, bfloat16 or float64, on CUDA also float16.
        kernel: Height and width of a window, at most 255 values; one number is both.
        stride: Distance between windows, likewise. None is ``kernel``.
        padding: Rows and columns of -infinity added on each side, likewise; at most half of
            ``kernel``.

    Returns:
        The maxima, [N, C, H_out, W_out] with ``H_out = (H + 2 * padding - kernel) // stride + 1``,
        dtype of x, contiguous or channels_last as x.

    Raises:
        ValueError: A shape or an option does not fit.
        TypeError: The dtype is not supported.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import max_pool
        >>> max_pool(torch.randn(8, 16, 32, 32), 2).shape
        torch.Size([8, 16, 16, 16])
    """
    require_ops()
    options = (kernel, kernel if stride is None else stride, padding)
    y, _ = torch.ops.pfs_fast.max_pool(x, *(per_dimension(value, 2) for value in options))
    return y
