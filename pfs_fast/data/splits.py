"""Image sets with labels, and their division into training, validation and test parts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoaderError
from .checks import as_images, as_labels
from .loader import DeviceLoader

_CHUNK = 1024  # images at a time where all at once would need eight times their memory


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images [N, C, H, W] (dense in channels_last), uint8 or floating at full scale 1, and labels [N] int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @classmethod
    def of(
        cls, images: Any, labels: Any, *, layout: str | None = None, function: str = "ImageSet.of"
    ) -> ImageSet:
        """Checks arrays or tensors of any usual layout; see `DeviceLoader` for what is taken."""
        stored = as_images(function, images, layout)
        return cls(stored.permute(0, 3, 1, 2), as_labels(function, labels, len(stored)))

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and standard deviation of each channel over all pixels, at full scale 1."""
        scale = 255.0 if self.images.dtype == torch.uint8 else 1.0
        total = total_squares = torch.zeros(self.images.shape[1], dtype=torch.float64)
        for part in self.images.split(_CHUNK):
            x = part.to(torch.float64) / scale
            total = total + x.sum((0, 2, 3)).cpu()
            total_squares = total_squares + x.square().sum((0, 2, 3)).cpu()
        count = self.images.numel() // self.images.shape[1]
        mean = total / count
        std = (total_squares / count - mean.square()).clamp_min(0).sqrt()
        # A channel that never changes carries nothing; any divisor will do for it.
        std = torch.where(std > 1e-6, std, torch.ones_like(std))
        return tuple(mean.tolist()), tuple(std.tolist())


class Loaders(NamedTuple):
    """One `DeviceLoader` for each part; None where the data set has no such part."""

    train: DeviceLoader
    val: DeviceLoader | None
    test: DeviceLoader | None


@dataclass(frozen=True, eq=False)
class Splits:
    """A data set in parts, with what its loaders need.

    Attributes:
        train, val, test: The parts; `val` is held out of the training images.
        num_classes: Classes over all parts.
        mean, std: Of each channel, full scale 1, for normalisation.
        name: For reports.
        flip: Whether mirrored images still belong to their class (digits do not).
    """

    train: ImageSet
    val: ImageSet | None
    test: ImageSet | None
    num_classes: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    name: str
    flip: bool = True

    def loaders(
        self, batch_size: int = 128, *, eval_batch_size: int | None = None, **options: Any
    ) -> Loaders:
        """Loaders of all parts, the first with augmentation.

        Args:
            batch_size: Of the training part.
            eval_batch_size: Of the other two; default: `batch_size`.
            **options: Of `DeviceLoader`, such as device, dtype, seed, crop_padding, flip; `drop_last` applies to training alone.
        """
        shared = {
            "mean": self.mean,
            "std": self.std,
            "flip": self.flip,
            "num_classes": self.num_classes,
            "layout": "NCHW",
            **options,
        }
        train = DeviceLoader(self.train.images, self.train.labels, batch_size, train=True, **shared)
        shared.pop("drop_last", None)
        size = batch_size if eval_batch_size is None else eval_batch_size
        val, test = (
            None if part is None else DeviceLoader(part.images, part.labels, size, **shared)
            for part in (self.val, self.test)
        )
        return Loaders(train, val, test)

    def __str__(self) -> str:
        parts = [("train", self.train), ("val", self.val), ("test", self.test)]
        counts = ", ".join(f"{len(part)} {label}" for label, part in parts if part is not None)
        shape = "x".join(map(str, self.train.images.shape[1:]))
        return f"{self.name}: {counts}; {shape}, {self.num_classes} classes"


@dataclass(frozen=True, eq=False)
class WholeSplits(Splits):
    """`Splits` of which no part is missing, so that no loader is None to a type checker either."""

    val: ImageSet
    test: ImageSet

    if TYPE_CHECKING:

        def loaders(  # type: ignore[override]
            self, batch_size: int = 128, *, eval_batch_size: int | None = None, **options: Any
        ) -> WholeLoaders: ...


if TYPE_CHECKING:

    class WholeLoaders(NamedTuple):
        """`Loaders` of which none is missing."""

        train: DeviceLoader
        val: DeviceLoader
        test: DeviceLoader


def split(images: Any, labels: Any, last: int = 5000) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Holds out the last images, as the paper does with the last 5,000 of CIFAR-10's 50,000.

    Args:
        images, labels: Anything that can be sliced, of equal length.
        last: How many to hold out.

    Returns:
        (training images, labels), (validation images, labels).
    """
    if len(images) != len(labels):
        raise LoaderError(
            f"split: labels must be as many as images, got {len(labels)} and {len(images)}; check that they belong together"
        )
    if isinstance(last, bool) or not isinstance(last, int) or not 0 < last < len(images):
        raise LoaderError(
            f"split: last must be an integer in [1, {len(images) - 1}], got {last!r}; both parts need an image"
        )
    cut = len(images) - last
    return (images[:cut], labels[:cut]), (images[cut:], labels[cut:])


def make_splits(
    function: str,
    name: str,
    train: ImageSet,
    test: ImageSet | None,
    *,
    val: int = 0,
    statistics: tuple[tuple[float, ...], tuple[float, ...]] | None = None,
    flip: bool = True,
) -> Splits:
    """Puts a data set together: holds out the last `val` training images, checks that the parts agree."""
    parts = [train] if test is None else [train, test]
    shapes = {tuple(part.images.shape[1:]) for part in parts}
    if len(shapes) > 1:
        raise LoaderError(
            f"{function}: test images must have the shape of the training images {list(train.images.shape[1:])}, "
            f"got {list(parts[1].images.shape[1:])}; resize one of them"
        )
    num_classes = 1 + max(int(part.labels.max()) for part in parts)
    held_out = None
    if val != 0:
        if isinstance(val, bool) or not isinstance(val, int) or not 0 < val < len(train):
            raise LoaderError(
                f"{function}: val must be an integer in [0, {len(train) - 1}], got {val!r}; "
                "it is the number of last training images held out for validation"
            )
        rest, last = split(train.images, train.labels, val)
        train, held_out = ImageSet(*rest), ImageSet(*last)
    mean, std = train.statistics() if statistics is None else statistics
    if held_out is None or test is None:
        return Splits(train, held_out, test, num_classes, mean, std, name, flip)
    return WholeSplits(train, held_out, test, num_classes, mean, std, name, flip)
