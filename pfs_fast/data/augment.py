"""Crop, mirror and normalise whole batches; images are [B, H, W, C], dense.

No loop over images and no index per pixel: a padded image set is read through overlapping windows, one image row long.
"""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_windows(padded: Tensor, width: int) -> Tensor:
    """A view of `padded` in which row i holds the `width` pixels from pixel i on.

    Args:
        padded: Image set [N, H, W, C], dense.
        width: Pixels of a window, at most W.

    Returns:
        View [N * H * W - width + 1, width * C]; its rows overlap, so it can only be read.
    """
    pixels, channels = padded.numel() // padded.shape[-1], padded.shape[-1]
    return padded.as_strided((pixels - width + 1, width * channels), (channels, 1))


def crop(windows: Tensor, corners: Tensor, row_stride: int, height: int, width: int) -> Tensor:
    """Crops of one size, each with its own corner.

    Args:
        windows: From `pixel_windows`, with the same width.
        corners: Index of each crop's first pixel in the padded image set. [B], int64.
        row_stride: Pixels from one row of a padded image to the next.

    Returns:
        [B, height, width, C].
    """
    rows = torch.arange(height, device=corners.device) * row_stride
    starts = corners.unsqueeze(1) + rows
    return windows.index_select(0, starts.flatten()).view(len(corners), height, width, -1)


def mirror(images: Tensor, chosen: Tensor) -> Tensor:
    """Mirrors the chosen images left to right.

    Args:
        images: [B, H, W, C], dense.
        chosen: [B], bool.
    """
    mirrored, plain = images.flip(2).flatten(1), images.flatten(1)
    if images.dtype == torch.uint8 and plain.shape[1] % 8 == 0:
        # The CPU kernel of `where` takes one element at a time: eight pixels as one integer are eight times faster.
        mirrored, plain = mirrored.view(torch.int64), plain.view(torch.int64)
    return torch.where(chosen.unsqueeze(1), mirrored, plain).view(images.dtype).view(images.shape)


class Normalize:
    """(x - mean) / std for each channel as one multiply-add, rounded once to the output dtype.

    Values of 0..255 (uint8) are divided by 255 in the same step; floating ones are taken as they are.

    Args:
        mean, std: One value for each channel, in units of the full scale 1.
        size: Height, width and channels of the images.
        source: Dtype of the images.
        dtype: Dtype of the result; the arithmetic is float64 for float64, else float32.
    """

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        size: tuple[int, int, int],
        source: torch.dtype,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        height, width, channels = size
        full_scale = 255.0 if source == torch.uint8 else 1.0
        means = torch.tensor(mean, dtype=torch.float64).expand(channels)
        stds = torch.tensor(std, dtype=torch.float64).expand(channels)
        self.dtype = dtype
        compute = torch.float64 if dtype == torch.float64 else torch.float32
        # Factors for a whole image: broadcasting over three channels would take the slow path of every kernel.
        self._scale = (1.0 / (full_scale * stds)).to(device, compute).repeat(height * width)
        self._shift = (-means / stds).to(device, compute).repeat(height * width)

    def __call__(self, images: Tensor) -> Tensor:
        """Images [B, H, W, C] normalised, of the same shape."""
        x = images.flatten(1).to(self._scale.dtype)
        return torch.addcmul(self._shift, x, self._scale).to(self.dtype).view(images.shape)
