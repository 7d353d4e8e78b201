"""Which convolutions of a search network run by Winograd's minimal filtering, and with which tile.

``ops.winograd_conv`` needs fewer products than a direct convolution, and pays with transforms whose cost grows with the channels
alone. The rule here counts products and asks for enough channels and tiles to pay for the transforms; its two bounds were
measured (``python -m benchmarks --suite convs``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

MIN_CHANNELS = 8  # of input and of output; below, the transforms take as long as the products saved
MIN_TILES = 4  # of a whole batch; below, transforming the weights takes as long
DIRECT = 0


def can_use(conv: nn.Module) -> bool:
    """Whether a convolution has the form that ``ops.winograd_conv`` computes: 3x3, stride 1, not dilated or grouped, padded by
    numbers of at most 2."""
    return (
        type(conv) is nn.Conv2d
        and conv.kernel_size == (3, 3)
        and conv.stride == (1, 1)
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and not isinstance(conv.padding, str)
        and max(conv.padding) <= 2
    )


def tile_for(
    batch: int, in_channels: int, out_channels: int, out_height: int, out_width: int
) -> int:
    """Tile for one convolution that `can_use` accepts, on one batch.

    The tile that needs fewer products; the smaller and more exact one where both need as many.

    Args:
        batch: Images.
        in_channels: Of the input.
        out_channels: Of the output.
        out_height: Rows of the output.
        out_width: Columns of the output.

    Returns:
        2 or 4, or `DIRECT` (0) where a direct convolution is as fast: narrow layers, and batches of few tiles.

    Example:
        >>> tile_for(128, 64, 64, 8, 8), tile_for(128, 512, 512, 2, 2), tile_for(128, 3, 64, 32, 32)
        (4, 2, 0)
    """
    tiles = {m: batch * -(-out_height // m) * -(-out_width // m) for m in (2, 4)}
    best = min((2, 4), key=lambda m: tiles[m] * (m + 2) ** 2)
    wide = min(in_channels, out_channels) >= MIN_CHANNELS
    return best if wide and tiles[best] >= MIN_TILES else DIRECT


def serves(dtype: torch.dtype) -> bool:
    """Whether the filtering is the faster way for values of a dtype on this processor's cores.

    Its products are float32 whatever the values are. Against those, bf16 instructions on vectors are twice as fast and lose; the
    matrix units of AMX are sixteen times as fast by their specification, and are left to oneDNN.
    """
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and not torch.cpu._is_amx_tile_supported()
    )


def tile_of(conv: nn.Conv2d, x: Tensor) -> int:
    """`tile_for` this layer on this input; `DIRECT` for all but [N, C, H, W] of a dtype that it `serves` in channels_last on the CPU."""
    if not (
        x.dim() == 4
        and x.device.type == "cpu"
        and serves(x.dtype)
        and conv.weight.dtype == x.dtype
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return DIRECT
    height, width = (
        size + 2 * pad - 2 for size, pad in zip(x.shape[2:], conv.padding, strict=True)
    )
    return tile_for(x.shape[0], conv.in_channels, conv.out_channels, height, width)
