"""Data sets from files and installed packages; nothing is downloaded."""

from __future__ import annotations

import math
import os
import zipfile
import zlib
from pathlib import Path
from typing import overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import BackendError, LoaderError
from .checks import check_count
from .loader import CIFAR10_MEAN, CIFAR10_STD
from .splits import ImageSet, Splits, WholeSplits, make_splits

_NPZ_NAMES = "x_train and y_train (with x_test and y_test), or images and labels"
CIFAR10_VARIABLE = "PFS_FAST_CIFAR10"


def from_npz(path: str | os.PathLike[str], *, val: int = 0, layout: str | None = None) -> Splits:
    """A data set from one `.npz` file.

    Args:
        path: File with the arrays x_train, y_train and, if there is a test part, x_test, y_test;
            or with images and labels. Forms of the arrays: see `DeviceLoader`.
        val: Number of last training images to hold out for validation.
        layout: "NCHW" or "NHWC" where the channel axis is not evident.

    Raises:
        LoaderError: The file cannot be read, lacks an array, or an array is not as said.
    """
    return _from_npz("from_npz", path, val=val, layout=layout)


def cifar10(path: str | os.PathLike[str] | None = None, *, val: int = 5000) -> Splits:
    """CIFAR-10 with the paper's split (45,000 / 5,000 / 10,000) and normalisation.

    Args:
        path: An `.npz` file as for `from_npz`, or the folder in which torchvision keeps CIFAR-10.
            Default: the environment variable PFS_FAST_CIFAR10.
        val: Number of last training images to hold out for validation.

    Raises:
        LoaderError: There is no such file, or it holds something else than CIFAR-10.
    """
    place = os.environ.get(CIFAR10_VARIABLE) if path is None else path
    if not place:
        raise LoaderError(
            f"cifar10: path must name the data, got {path!r} and {CIFAR10_VARIABLE} is not set; "
            "pass an .npz file or the folder of torchvision.datasets.CIFAR10"
        )
    if Path(place).is_dir():
        train, test = _torchvision_cifar10(Path(place))
    else:
        whole = _from_npz("cifar10", place)
        train, test = whole.train, whole.test
    if train.images.shape[1:] != (3, 32, 32) or int(train.labels.max()) != 9:
        raise LoaderError(
            "cifar10: images must be 3x32x32 of 10 classes, got "
            f"{list(train.images.shape[1:])} of {int(train.labels.max()) + 1}; "
            "use from_npz for other data"
        )
    statistics = (CIFAR10_MEAN, CIFAR10_STD)
    return make_splits("cifar10", "cifar10", train, test, val=val, statistics=statistics)


@overload
def digits(size: int = 32, *, channels: int = 3) -> WholeSplits: ...


@overload
def digits(size: int = 32, *, channels: int = 3, val: int) -> Splits: ...


def digits(size: int = 32, *, channels: int = 3, val: int = 180) -> Splits:
    """The 1,797 handwritten digits that come with scikit-learn, enlarged from 8x8.

    The last 360 are the test part.

    Args:
        size: Height and width of the images.
        channels: Grey values are repeated over so many channels.
        val: Number of last training images to hold out for validation.

    Raises:
        BackendError: scikit-learn is not installed. LoaderError: A size is no whole number from 1.
    """
    for argument, value in (("size", size), ("channels", channels)):
        check_count("digits", argument, value, 1)
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise BackendError(
            f"digits: the package scikit-learn cannot be imported ({error}); "
            "pip install scikit-learn"
        ) from error
    bunch = load_digits()
    grey = torch.from_numpy(bunch.images).float().unsqueeze(1) * (255.0 / 16.0)
    grey = F.interpolate(grey, size=(size, size), mode="bilinear", align_corners=False)
    images = _grey_to_channels(grey.round().to(torch.uint8), channels)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    cut = len(images) - 360
    train, test = ImageSet(images[:cut], labels[:cut]), ImageSet(images[cut:], labels[cut:])
    return make_splits("digits", "digits", train, test, val=val, flip=False)


def synthetic(
    num_images: int = 2048,
    shape: tuple[int, int, int] = (3, 32, 32),
    num_classes: int = 10,
    *,
    noise: float = 0.2,
    seed: int = 0,
    val: int = 0,
) -> Splits:
    """Images that can be learnt: a smooth random pattern for each class, plus noise.

    A quarter as many test images come with them.

    Args:
        num_images: Number of training images.
        shape: Channels, height and width.
        noise: Standard deviation of the noise, full scale 1.
        seed: Of the patterns and the noise.
        val: Number of last training images to hold out for validation.
    """
    for argument, value in (("num_images", num_images), ("num_classes", num_classes)):
        check_count("synthetic", argument, value, 1)
    if not isinstance(shape, tuple | list) or len(shape) != 3:
        raise LoaderError(
            f"synthetic: shape must be channels, height and width, got {shape!r}; write e.g. (3, 32, 32)"
        )
    for size in shape:
        check_count("synthetic", "shape", size, 1)
    check_count("synthetic", "seed", seed, 0)
    if not isinstance(noise, int | float) or not 0 <= noise < math.inf:
        raise LoaderError(
            f"synthetic: noise must be a finite number of at least 0, got {noise!r}; full scale is 1"
        )
    draw = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    coarse = torch.rand(num_classes, channels, 4, 4, generator=draw)
    size = (height, width)
    patterns = F.interpolate(coarse, size=size, mode="bicubic", align_corners=False)

    def part(count: int) -> ImageSet:
        labels = torch.randint(num_classes, (count,), generator=draw)
        x = patterns[labels] + noise * torch.randn(count, *shape, generator=draw)
        images = (x.clamp(0, 1) * 255).round().to(torch.uint8)
        return ImageSet(images.contiguous(memory_format=torch.channels_last), labels)

    train, test = part(num_images), part(max(1, num_images // 4))
    return make_splits("synthetic", "synthetic", train, test, val=val)


def _from_npz(
    function: str, path: str | os.PathLike[str], *, val: int = 0, layout: str | None = None
) -> Splits:
    arrays = _read_npz(function, path)
    train_names = ("x_train", "y_train") if "x_train" in arrays else ("images", "labels")
    missing = [name for name in train_names if name not in arrays]
    if "x_test" in arrays and "y_test" not in arrays:
        missing.append("y_test")
    if missing:
        raise LoaderError(
            f"{function}: {path} must hold {_NPZ_NAMES}, got {sorted(arrays)}; "
            f"add {' and '.join(missing)}"
        )
    train = _image_set(f"{function}: {path}", arrays, train_names, layout)
    test = None
    if "x_test" in arrays:
        test = _image_set(f"{function}: {path}", arrays, ("x_test", "y_test"), layout)
    return make_splits(function, Path(path).stem, train, test, val=val)


def _image_set(
    function: str, arrays: dict[str, np.ndarray], names: tuple[str, str], layout: str | None
) -> ImageSet:
    images, labels = (arrays[name] for name in names)
    return ImageSet.of(
        images, labels, layout=layout, function=f"{function} ({' and '.join(names)})"
    )


def _read_npz(function: str, path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    if not isinstance(path, str | os.PathLike):
        raise LoaderError(
            f"{function}: path must be the path of an .npz file, got {path!r}; write e.g. 'images.npz'"
        )
    path = Path(path)
    wanted = ("x_train", "y_train", "x_test", "y_test", "images", "labels")
    try:
        # Opened here because NumPy leaves the file open when it finds that it cannot read it.
        with path.open("rb") as file:
            archive = np.load(file, allow_pickle=False)
            if isinstance(archive, np.ndarray):
                raise ValueError("it holds one array, not an archive of named ones")
            found = {name: archive[name] for name in archive.files if name in wanted}
            return found or {name: np.empty(0) for name in archive.files}
    except FileNotFoundError as error:
        raise LoaderError(
            f"{function}: path must be an existing .npz file, got {path}; check the spelling"
        ) from error
    # RuntimeError: encrypted; NotImplementedError: packed by a method that Python has not; MemoryError: a header of any size.
    except (
        OSError,
        ValueError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        TypeError,
        RuntimeError,
        MemoryError,
    ) as error:
        raise LoaderError(
            f"{function}: path must be a readable .npz file without pickled objects, got {path} "
            f"({error}); write it again with numpy.savez"
        ) from error


def _torchvision_cifar10(root: Path) -> tuple[ImageSet, ImageSet]:
    from torchvision import datasets

    try:
        parts = [datasets.CIFAR10(root, train=train, download=False) for train in (True, False)]
    except (RuntimeError, OSError) as error:
        raise LoaderError(
            f"cifar10: path must be a folder with torchvision's CIFAR10, got {root} ({error}); "
            "download it there with torchvision or pass an .npz file"
        ) from error
    train, test = (ImageSet.of(p.data, p.targets, function="cifar10") for p in parts)
    return train, test


def _grey_to_channels(grey: Tensor, channels: int) -> Tensor:
    """[N, 1, H, W] as [N, channels, H, W], dense in channels_last."""
    return grey.expand(-1, channels, -1, -1).contiguous(memory_format=torch.channels_last)
