"""Batches from images that stay on the device, augmented there."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .._ambient import own_settings
from ..errors import LoaderError
from .augment import Normalize, crop, mirror, pixel_windows
from .checks import as_images, as_labels, check_count

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2023, 0.1994, 0.2010)


class EpochPlan(NamedTuple):
    """Everything random about one epoch (or a batch of it), in the order in which the images are served."""

    order: Tensor  # [N] int64, image indices
    corners: Tensor  # [N] int64, first pixel of each crop within its padded image
    mirrored: Tensor  # [N] bool


class DeviceLoader:
    """Iterates over (images [B, C, H, W], labels [B] int64), with all data on one device.

    With `train=True` each epoch has a new order, and every image a random crop out of its zero-padded self and a random
    mirroring. All random draws of an epoch come from one generator seeded with (seed, epoch), on the CPU and at once: the same
    seed gives the same batches on every device, at any batch of any epoch. With `train=False` the images come in their order and
    unchanged but for the normalisation.

    Args:
        images: Tensor or array, [N, C, H, W], [N, H, W, C] or [N, H, W]; uint8, or floating with full scale 1. Kept as they are;
            padded once where `train` and `crop_padding`, which takes (H + 2 p)(W + 2 p) / (H W) of their memory.
        labels: Class indices from 0. [N], any integer type.
        batch_size: Images of a batch.
        train: Whether to shuffle and augment.
        crop_padding: Pixels of zeros around an image, out of which the crop is taken; the paper's CIFAR recipe has 4.
        flip: Whether half of the images, drawn at random, are mirrored left to right.
        mean, std: For each channel (or one for all), full scale 1. Default: the paper's CIFAR-10 values for three
            channels, else 0.5 and 0.25.
        seed: Of the order and the augmentation.
        device: Where images live and batches are made; default: where `images` are.
        dtype: Of the batches: float32, bfloat16, float16 or float64.
        channels_last: Whether batches are dense in `torch.channels_last`, the order they are made in; else they are copied to NCHW.
        drop_last: Whether to leave out a last batch that is not full.
        num_classes: Labels must be below; default: the largest label plus one.
        layout: "NCHW" or "NHWC" for images whose channel axis is not evident.

    Attributes:
        epoch: The epoch that is being served, or that the next iteration serves. A pass that is broken off counts.

    Raises:
        LoaderError: Images, labels or options are not as said above.

    Example:
        >>> import torch
        >>> from pfs_fast import data
        >>> images = torch.zeros(10, 3, 32, 32, dtype=torch.uint8)
        >>> loader = data.DeviceLoader(images, torch.arange(10), batch_size=4, train=True)
        >>> [x.shape[0] for x, y in loader]
        [4, 4, 2]
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int],
        batch_size: int = 128,
        *,
        train: bool = False,
        crop_padding: int = 4,
        flip: bool = True,
        mean: float | Sequence[float] | None = None,
        std: float | Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        channels_last: bool = True,
        drop_last: bool = False,
        num_classes: int | None = None,
        layout: str | None = None,
    ) -> None:
        _check_count("batch_size", batch_size, 1)
        _check_count("crop_padding", crop_padding, 0)
        _check_count("seed", seed, 0)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise LoaderError(
                f"DeviceLoader: dtype must be a floating type, got {dtype}; use torch.float32 or torch.bfloat16"
            )
        stored = as_images("DeviceLoader", images, layout)
        if num_classes is not None:
            _check_count("num_classes", num_classes, 1)
        targets = as_labels("DeviceLoader", labels, len(stored), num_classes)
        self.device = stored.device if device is None else _device(device)
        self.batch_size, self.train, self.flip = batch_size, bool(train), bool(flip)
        self.seed, self.dtype = seed, dtype
        self.channels_last, self.drop_last = bool(channels_last), bool(drop_last)
        self.num_images, self._height, self._width, channels = stored.shape
        self.image_shape = (channels, self._height, self._width)
        self.num_classes = int(targets.max()) + 1 if num_classes is None else num_classes
        if len(self) == 0:
            raise LoaderError(
                f"DeviceLoader: images must fill one batch of {batch_size} when drop_last is set, "
                f"got {self.num_images}; lower batch_size"
            )
        default_mean, default_std = _default_statistics(channels)
        self.mean = _per_channel("mean", default_mean if mean is None else mean, channels)
        self.std = _per_channel("std", default_std if std is None else std, channels)
        if min(self.std) <= 0:
            raise LoaderError(
                f"DeviceLoader: std must be > 0 in every channel, got {self.std}; leave a constant channel at 1"
            )
        size = (self._height, self._width, channels)
        self._normalize = Normalize(self.mean, self.std, size, stored.dtype, dtype, self.device)
        self._padding = crop_padding if self.train else 0
        stored = stored.to(self.device)
        if self._padding > 0:
            p = self._padding
            stored = F.pad(stored, (0, 0, p, p, p, p))
        self._stored, self._labels = stored, targets.to(self.device)
        self._generator = torch.Generator()
        self.epoch = 0
        self._next_batch = 0
        self._resumes = False

    def __len__(self) -> int:
        """Batches of an epoch."""
        if self.drop_last:
            return self.num_images // self.batch_size
        return math.ceil(self.num_images / self.batch_size)

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.image_shape))
        kind = "train" if self.train else "eval"
        return (
            f"DeviceLoader({self.num_images} images {shape}, {self.num_classes} classes, {kind}, "
            f"{len(self)} batches of {self.batch_size}, {self.dtype}, {self.device})"
        )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        if self._next_batch > 0 and not self._resumes:
            self.set_epoch(self.epoch + 1)
        self._resumes = False
        return self._serve(self.epoch, self._next_batch)

    def set_epoch(self, epoch: int) -> None:
        """Makes `epoch` the one that the next iteration serves, from its first batch."""
        _check_count("epoch", epoch, 0)
        self.epoch, self._next_batch, self._resumes = epoch, 0, False

    def state_dict(self) -> dict[str, int]:
        """What is needed to go on from here: after the batch that was served last."""
        return {
            "seed": self.seed,
            "epoch": self.epoch,
            "batch": self._next_batch,
            "batch_size": self.batch_size,
            "num_images": self.num_images,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Makes the next iteration serve what the loader that gave `state` would have served next.

        Raises:
            LoaderError: `state` is not one of a loader with as many images and this batch size.
        """
        missing = [key for key in self.state_dict() if key not in state]
        if missing:
            raise LoaderError(
                f"DeviceLoader.load_state_dict: state must have {', '.join(missing)}, got keys {sorted(state)}; "
                "pass what state_dict() returned"
            )
        for key in ("batch_size", "num_images"):
            if state[key] != getattr(self, key):
                raise LoaderError(
                    f"DeviceLoader.load_state_dict: {key} must be {getattr(self, key)}, got {state[key]}; "
                    "build the loader from the same data and options"
                )
        for key in ("seed", "epoch", "batch"):
            _check_count(key, state[key], 0)
        if state["batch"] >= len(self):
            raise LoaderError(
                f"DeviceLoader.load_state_dict: batch must be < {len(self)}, got {state['batch']}; "
                "build the loader from the same data and options"
            )
        self.seed = state["seed"]
        self.set_epoch(state["epoch"])
        self._next_batch, self._resumes = state["batch"], True

    def _serve(self, epoch: int, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        plan = self.plan(epoch) if self.train else None
        for index in range(first, len(self)):
            start = index * self.batch_size
            stop = min(start + self.batch_size, self.num_images)
            if plan is None:
                batch = self._plain(start, stop)
            else:
                batch = self.batch(EpochPlan(*(x[start:stop] for x in plan)))
            # Said before the batch is handed over: a state taken inside the loop's body counts that batch as done.
            self.epoch, self._next_batch = divmod(epoch * len(self) + index + 1, len(self))
            yield batch

    def advance(self, batches: int) -> None:
        """Counts batches as served that were made by `batch`, from where the loader stands."""
        done = self.epoch * len(self) + self._next_batch + batches
        self.epoch, self._next_batch = divmod(done, len(self))

    @own_settings()
    def plan(self, epoch: int) -> EpochPlan:
        """The random draws of an epoch, on the device."""
        state = np.random.SeedSequence((self.seed, epoch)).generate_state(1, np.uint64)
        draw = self._generator.manual_seed(int(state[0]))
        n, offsets = self.num_images, 2 * self._padding + 1
        order = torch.randperm(n, generator=draw)
        top, left = torch.randint(offsets, (2, n), generator=draw)
        corners = top * (self._width + 2 * self._padding) + left
        mirrored = torch.rand(n, generator=draw) < 0.5
        drawn = (order, corners, mirrored)
        if self.device.type == "cuda":  # from pinned memory the copy does not wait for the device
            drawn = tuple(t.pin_memory() for t in drawn)
        return EpochPlan(*(t.to(self.device, non_blocking=True) for t in drawn))

    def _plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self._finish(self._stored[start:stop]), self._labels[start:stop].clone()

    def batch(self, part: EpochPlan) -> tuple[Tensor, Tensor]:
        """Images [B, C, H, W] and labels [B] of a part of a plan; device work of fixed shapes only."""
        order = part.order
        if self._padding > 0:
            rows, row_stride = self._stored.shape[1:3]
            windows = pixel_windows(self._stored, self._width)
            corners = order * (rows * row_stride) + part.corners
            images = crop(windows, corners, row_stride, self._height, self._width)
        else:
            images = self._stored.index_select(0, order)
        if self.flip:
            images = mirror(images, part.mirrored)
        return self._finish(images), self._labels.index_select(0, order)

    def _finish(self, images: Tensor) -> Tensor:
        batch = self._normalize(images).permute(0, 3, 1, 2)
        return batch if self.channels_last else batch.contiguous()


def _check_count(argument: str, value: Any, least: int) -> None:
    check_count("DeviceLoader", argument, value, least)


def _device(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        found = None
    if found is None or found.type == "meta":
        raise LoaderError(
            f"DeviceLoader: device must be one that holds images, such as 'cpu' or 'cuda:0', got {device!r}; use 'cpu'"
        )
    return found


def _default_statistics(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return (CIFAR10_MEAN, CIFAR10_STD) if channels == 3 else ((0.5,), (0.25,))


def _per_channel(argument: str, value: Any, channels: int) -> tuple[float, ...]:
    values = tuple(value) if isinstance(value, (tuple, list, np.ndarray, Tensor)) else (value,)
    try:
        numbers = tuple(float(v) for v in values)
    except (TypeError, ValueError):
        numbers = ()
    if len(numbers) not in (1, channels) or not all(math.isfinite(v) for v in numbers):
        raise LoaderError(
            f"DeviceLoader: {argument} must be one finite number or one for each of the {channels} channels, "
            f"got {value!r}; give them at full scale 1, not 255"
        )
    return numbers * (channels // len(numbers))
