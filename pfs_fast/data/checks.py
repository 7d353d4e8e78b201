"""Images and labels from any array, checked and in one form: images [N, H, W, C] dense, labels [N] int64."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._tensors import require_dense
from ..errors import LoaderError

# The layouts that an array without a stated one may have; three-dimensional arrays are [N, H, W], one grey channel.
LAYOUTS = ("NCHW", "NHWC")
_USUAL_CHANNELS = (1, 3)


def as_images(function: str, images: Any, layout: str | None = None) -> Tensor:
    """Images as a dense tensor [N, H, W, C], uint8 or floating, on the device they are on.

    Args:
        function: Name that error messages begin with.
        images: Tensor or array, [N, C, H, W], [N, H, W, C] or [N, H, W]; uint8, or floating and finite.
        layout: "NCHW" or "NHWC"; None finds the axis that has 1 or 3 channels.

    Raises:
        LoaderError: The array is empty, of another type or shape, or not finite; or both axes could be the channels.
    """
    x = _as_tensor(function, "images", images)
    if x.dtype != torch.uint8 and not x.is_floating_point():
        raise LoaderError(
            f"{function}: images must be uint8 or floating, got {x.dtype}; convert to uint8 in 0..255"
        )
    if x.dim() == 3:
        x = x.unsqueeze(-1)
    elif x.dim() != 4:
        raise LoaderError(
            f"{function}: images must have shape [N, C, H, W], [N, H, W, C] or [N, H, W], got {list(x.shape)}; "
            "stack the images of equal size along a first axis"
        )
    elif _find_layout(function, tuple(x.shape), layout) == "NCHW":
        x = x.permute(0, 2, 3, 1)
    if x.numel() == 0:
        raise LoaderError(
            f"{function}: images must hold at least one pixel, got shape {list(images.shape)}; check the source"
        )
    if x.is_floating_point() and not torch.isfinite(x).all():
        bad = int((~torch.isfinite(x)).flatten(1).any(1).nonzero()[0])
        raise LoaderError(
            f"{function}: images must be finite, got NaN or infinity in image {bad}; clean the data first"
        )
    return x.contiguous()


def as_labels(
    function: str, labels: Any, num_images: int, num_classes: int | None = None
) -> Tensor:
    """Labels as a tensor [N] int64; classes count from 0.

    Raises:
        LoaderError: There is not one integer in [0, num_classes) for each image.
    """
    y = _as_tensor(function, "labels", labels)
    if y.dtype == torch.bool or y.is_floating_point() or y.is_complex():
        raise LoaderError(
            f"{function}: labels must be integers (class indices), got {y.dtype} of shape {list(y.shape)}; "
            f"{_label_repair(y, num_images)}"
        )
    if tuple(y.shape) != (num_images,):
        raise LoaderError(
            f"{function}: labels must have shape [{num_images}], one for each image, got {list(y.shape)}; "
            f"{_label_repair(y, num_images)}"
        )
    y = y.to(torch.int64)
    low, high = int(y.min()), int(y.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        limit = "" if num_classes is None else f" and < num_classes = {num_classes}"
        wrong = low if low < 0 else high
        repair = (
            "and leave out images without a class"
            if low < 0
            else f"or set num_classes to {high + 1} or more"
        )
        raise LoaderError(
            f"{function}: labels must be >= 0{limit}, got {wrong}; number the classes from 0, {repair}"
        )
    return y


def _label_repair(labels: Tensor, num_images: int) -> str:
    """How labels of a wrong dtype or shape become ones that are taken."""
    if labels.dim() == 2 and labels.size(0) == num_images and labels.size(1) > 1:
        return "use torch.as_tensor(labels).long().argmax(1) where rows are one-hot; several labels for an image are not supported"
    if labels.numel() == num_images:
        return (
            "use torch.as_tensor(labels).flatten().long() where they are class indices; other targets, as of regression, are not "
            "supported"
        )
    return "give each image one label; labels of pixels, boxes or sequences are not supported"


def check_count(function: str, argument: str, value: Any, least: int) -> None:
    """Refuses what is no whole number of at least ``least`` that 63 bits hold."""
    whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not whole or not least <= value < 2**63:
        got = "more than 2**63" if whole and value > least else repr(value)
        raise LoaderError(
            f"{function}: {argument} must be an integer >= {least}, got {got}; pass a plain int"
        )


def _as_tensor(function: str, argument: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        require_dense(LoaderError, f"{function}: {argument}", value)
        return value.detach()
    if not isinstance(value, (np.ndarray, list, tuple)):
        raise LoaderError(
            f"{function}: {argument} must be a tensor or an array, got {type(value).__name__}; "
            "data.from_dataset reads torchvision datasets"
        )
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise LoaderError(
            f"{function}: {argument} must have rows of equal shape, got a ragged sequence ({error}); stack equal sizes"
        ) from error
    if array.dtype.kind not in "uifb":
        repair = (
            "number the classes, as numpy.unique(labels, return_inverse=True)[1] does"
            if argument == "labels"
            else "stack images of equal size as uint8 or float32"
        )
        raise LoaderError(
            f"{function}: {argument} must be numeric, got an array of {array.dtype}; {repair}"
        )
    if argument == "labels" and array.dtype.kind in "ui":
        array = array.astype(np.int64)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # PyTorch warns about arrays that it could write to against their owner's will.
    return torch.from_numpy(np.require(array, requirements=("C", "W")))


def _find_layout(function: str, shape: tuple[int, ...], layout: str | None) -> str:
    if layout in LAYOUTS:
        return layout
    if layout is not None:
        raise LoaderError(
            f'{function}: layout must be "NCHW", "NHWC" or None, got {layout!r}; None finds it for 1 or 3 channels'
        )
    first, last = shape[1] in _USUAL_CHANNELS, shape[3] in _USUAL_CHANNELS
    if first == last:
        raise LoaderError(
            f"{function}: images must have 1 or 3 channels on one of the axes 1 and 3, got shape {list(shape)}; "
            'pass layout="NCHW" or layout="NHWC" to DeviceLoader, ImageSet.of or from_npz'
        )
    return "NCHW" if first else "NHWC"
