"""The convolutions: they keep no input for a weight gradient that nobody takes."""

from __future__ import annotations

import torch
from torch import Tensor

from pfs_fast._library import require_ops
from pfs_fast.ops._branch import FrozenConvBranchFunction
from pfs_fast.ops._options import per_dimension
from pfs_fast.ops.reference import checked_step


def frozen_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
) -> Tensor:
    """Convolution with constant weight and bias, which does not keep its input for backward.

    PyTorch's own convolution keeps its input for a weight gradient even if nobody takes one
    (https://github.com/pytorch/pytorch/issues/133566). This one keeps the weight alone; it is
    differentiable once, in ``x``. ``weight`` and ``bias`` get no gradient, whether they require one
    or not.

    Args:
        x: Input. [N, C_in, *spatial], 3 to 5 dimensions, floating point.
        weight: Kernel. [C_out, C_in / groups, *kernel], dtype of x.
        bias: Shift, or None. [C_out], dtype of x.
        stride: Stride, one number or one per spatial dimension.
        padding: Zeros added on each side, likewise.
        dilation: Distance between kernel elements, likewise.
        groups: Number of groups of channels.

    Returns:
        The convolution, [N, C_out, *spatial_out], as ``torch.nn.functional.conv2d`` (1d, 3d) gives
        it.

    Raises:
        ValueError: A shape or an option does not fit.
        TypeError: ``weight`` or ``bias`` is not of the dtype of ``x``.
        BackendError: The compiled operators are missing.
    """
    require_ops()
    spatial_dims = x.dim() - 2
    return torch.ops.pfs_fast.frozen_conv(
        x,
        weight.detach(),
        None if bias is None else bias.detach(),
        per_dimension(stride, spatial_dims),
        per_dimension(padding, spatial_dims),
        per_dimension(dilation, spatial_dims),
        groups,
    )


def frozen_conv_branch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    step: int | tuple[int, ...] = 2,
) -> tuple[Tensor, Tensor]:
    """``frozen_conv(x, ...)``, and the pixels of x that a 1x1 convolution of stride ``step`` reads.

    For the two convolutions at the beginning of a residual block that makes images smaller: the
    gradient of those pixels is added where that of x is made, so that it need not be spread over an
    image of zeros and added in a pass over all of it.

    Args:
        x: Input. [N, C_in, *spatial], 3 to 5 dimensions, floating point.
        weight: As in ``frozen_conv``.
        bias: Likewise.
        stride: Likewise.
        padding: Likewise.
        dilation: Likewise.
        groups: Likewise.
        step: Distance of the pixels, one number or one per spatial dimension, at least 1.

    Returns:
        (y, pixels). y as ``frozen_conv`` gives it; pixels: [N, C_in, *ceil(spatial / step)], a copy
        in the layout of x.

    Raises:
        ValueError: A shape or an option does not fit.
        TypeError: ``weight`` or ``bias`` is not of the dtype of ``x``.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import frozen_conv, frozen_conv_branch
        >>> x = torch.randn(8, 16, 32, 32, requires_grad=True)
        >>> y, pixels = frozen_conv_branch(x, torch.randn(32, 16, 3, 3), stride=2, padding=1)
        >>> (y + frozen_conv(pixels, torch.randn(32, 16, 1, 1))).sum().backward()
    """
    require_ops()
    dims = x.dim() - 2
    return FrozenConvBranchFunction.apply(
        x,
        weight.detach(),
        None if bias is None else bias.detach(),
        (*(per_dimension(value, dims) for value in (stride, padding, dilation)), groups),
        checked_step(step, dims),
    )


def winograd_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    padding: int | tuple[int, int] = 1,
    *,
    tile: int = 4,
) -> Tensor:
    """``frozen_conv`` of a 3x3 kernel with stride 1 on the CPU, with fewer products.

    Winograd's minimal filtering F(tile x tile, 3x3) (Lavin and Gray, arXiv 1509.09308): 4 times
    fewer products than a direct convolution with tile 4, 2.25 times fewer with tile 2. The sums are
    the same but for rounding: a relative error of about 2e-7 to 8e-7 (tile 2) or 5e-7 to 3e-6 (tile
    4) for 16 to 600 channels, where a direct convolution has 1e-7 to 1e-6. In bfloat16 transforms and
    sums are float32 too, and rounded once, at the end. NaN and infinity in a tile spread over the
    whole tile. Weights are transformed in every call, so that they may change
    between two calls and nothing but the weight is kept for the backward pass. The result does not
    depend on the number of threads. Differentiable once, in ``x``.

    Args:
        x: Input. [N, C_in, H, W], float32 or bfloat16, channels_last; other strides are copied
            first.
        weight: Kernel. [C_out, C_in, 3, 3], dtype of x.
        bias: Shift, or None. [C_out], dtype of x.
        padding: Zeros added on each side, 0 to 2, one number or one per spatial dimension.
        tile: Outputs that are computed together, in each direction: 2 or 4.

    Returns:
        The convolution, [N, C_out, H + 2 * padding - 2, W + 2 * padding - 2], channels_last or
        contiguous as x.

    Raises:
        ValueError: A shape or an option does not fit.
        TypeError: A tensor is neither float32 nor bfloat16, or not of the dtype of x.
        NotImplementedError: The tensors are not on the CPU.
        BackendError: The compiled operators are missing.

    Example:
        >>> import torch
        >>> from pfs_fast.ops import winograd_conv
        >>> winograd_conv(torch.randn(8, 16, 32, 32), torch.randn(24, 16, 3, 3)).shape
        torch.Size([8, 24, 32, 32])
    """
    require_ops()
    return torch.ops.pfs_fast.winograd_conv(
        x,
        weight.detach(),
        None if bias is None else bias.detach(),
        per_dimension(padding, 2),
        tile,
    )
