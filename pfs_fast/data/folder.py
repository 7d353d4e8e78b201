"""Image sets from torchvision data sets and from folders of image files, held in memory as uint8."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import BackendError, LoaderError
from .splits import ImageSet, Splits, make_splits

_DEFAULT_MAX_BYTES = 8 * 2**30
_TEST_FOLDERS = ("val", "test", "validation")
_MAX_WORKERS = 8


def from_dataset(
    dataset: Any, *, size: int | None = None, max_bytes: int = _DEFAULT_MAX_BYTES
) -> ImageSet:
    """All images of a torchvision data set, read once into memory.

    A data set that keeps its images as one uint8 array (CIFAR, MNIST, SVHN, STL-10) and has no
    transforms is taken as it is. Any other is read item by item, with its transforms; as these
    run once, they must not be random.

    Args:
        dataset: Anything with a length whose items are (image, class index) pairs; images are
            PIL images, uint8 arrays [H, W, C] or tensors [C, H, W].
        size: Height and width; PIL images are resized by their shorter side and cropped at the
            centre. None: all images must have one size already.
        max_bytes: Limit on the memory of the images.

    Raises:
        LoaderError: The images differ in size, take more than `max_bytes`, or cannot be read.
    """
    if not isinstance(dataset, Sized) or not hasattr(dataset, "__getitem__"):
        raise LoaderError(
            "from_dataset: dataset must have a length and items, "
            f"got {type(dataset).__name__}; iterable data sets can go to search and train as they are"
        )
    if len(dataset) == 0:
        raise LoaderError(
            "from_dataset: dataset must hold at least one image, got length 0; check its path"
        )
    whole = _resident_arrays(dataset) if size is None else None
    if whole is not None:
        return ImageSet.of(*whole, function="from_dataset")
    images, labels = _read_items(dataset, size, max_bytes)
    return ImageSet.of(images, labels, layout="NHWC", function="from_dataset")


def imagefolder(
    directory: str | os.PathLike[str],
    size: int = 224,
    *,
    val_per_class: int = 0,
    max_bytes: int = _DEFAULT_MAX_BYTES,
) -> Splits:
    """Images in one folder for each class, resized and held in memory.

    `directory` holds the class folders, or a folder `train` of class folders and, for the test
    part, one named `val`, `test` or `validation`.

    Args:
        size: Height and width; the shorter side is resized to it and the centre cropped.
        val_per_class: Number of last images of each training class to hold out for validation, as
            the paper does with 50 on ImageNet.
        max_bytes: Limit on the memory of the images of one part, 8 GiB by default.

    Raises:
        LoaderError: There are no class folders, the images take more memory than that, or one of
            them cannot be read.
        BackendError: torchvision is not installed.
    """
    root = Path(directory)
    if not root.is_dir():
        raise LoaderError(
            f"imagefolder: directory must be a folder, got {root}; check the spelling"
        )
    has_parts = (root / "train").is_dir()
    test_root = next((root / n for n in _TEST_FOLDERS if has_parts and (root / n).is_dir()), None)
    train_files, classes = _list_files(root / "train" if has_parts else root)
    train = _read_files(train_files, size, max_bytes)
    test = None
    if test_root is not None:
        test_files, test_classes = _list_files(test_root)
        if test_classes != classes:
            unlike = sorted(set(classes) ^ set(test_classes))
            raise LoaderError(
                f"imagefolder: {test_root} must have the classes of the training folder, "
                f"got a difference in {unlike[:5]}; give both the same folders"
            )
        test = _read_files(test_files, size, max_bytes)
    train, held_out = _hold_out_per_class(train, val_per_class)
    splits = make_splits("imagefolder", root.name, train, test)
    return Splits(
        train, held_out, test, len(classes), splits.mean, splits.std, splits.name, flip=True
    )


def _resident_arrays(dataset: Any) -> tuple[Any, Any] | None:
    """The images and labels of a data set that has them as arrays and nothing to apply to them."""
    images = getattr(dataset, "data", None)
    labels = getattr(dataset, "targets", getattr(dataset, "labels", None))
    changes = [
        getattr(dataset, name, None) for name in ("transform", "target_transform", "transforms")
    ]
    if any(change is not None for change in changes) or labels is None:
        return None
    if not isinstance(images, (np.ndarray, Tensor)) or images.dtype not in (np.uint8, torch.uint8):
        return None
    return images, labels


def _read_items(dataset: Any, size: int | None, max_bytes: int) -> tuple[Tensor, list[int]]:
    first = _as_pixels(dataset[0][0], size)
    _check_memory("from_dataset", len(dataset), first, max_bytes)
    images = torch.empty((len(dataset), *first.shape), dtype=first.dtype)
    labels = []
    for index in range(len(dataset)):
        image, label = dataset[index]
        pixels = _as_pixels(image, size)
        if pixels.shape != first.shape:
            raise LoaderError(
                f"from_dataset: images must all have the shape {list(first.shape)} of the first, "
                f"got {list(pixels.shape)} at {index}; pass size= to resize them"
            )
        images[index] = pixels
        labels.append(int(label))
    return images, labels


def _as_pixels(image: Any, size: int | None) -> Tensor:
    """One image as [H, W, C]."""
    if hasattr(image, "convert"):
        return _pil_pixels(image, size)
    pixels = torch.as_tensor(np.array(image)) if isinstance(image, np.ndarray) else image
    if not isinstance(pixels, Tensor) or pixels.dim() not in (2, 3):
        raise LoaderError(
            "from_dataset: images must be PIL images, arrays [H, W, C] or tensors [C, H, W], "
            f"got {type(image).__name__}; add a transform that makes them so"
        )
    if pixels.dim() == 2:
        pixels = pixels.unsqueeze(-1)
    elif isinstance(image, Tensor):
        pixels = pixels.permute(1, 2, 0)
    if size is not None and tuple(pixels.shape[:2]) != (size, size):
        raise LoaderError(
            f"from_dataset: images must have size {size}x{size} where they are not PIL images, "
            f"got {list(pixels.shape[:2])}; resize them in the data set's transform"
        )
    return pixels


def _pil_pixels(image: Any, size: int | None) -> Tensor:
    if image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    if size is not None:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height)).crop((left, top, left + size, top + size))
    pixels = torch.from_numpy(np.array(image))
    return pixels if pixels.dim() == 3 else pixels.unsqueeze(-1)


def _list_files(root: Path) -> tuple[list[tuple[str, int]], list[str]]:
    try:
        from torchvision.datasets import ImageFolder
    except ImportError as error:
        raise BackendError(
            f"imagefolder: the package torchvision cannot be imported ({error}); "
            "pip install torchvision"
        ) from error
    try:
        listing = ImageFolder(str(root))
    except FileNotFoundError as error:
        raise LoaderError(
            f"imagefolder: directory must hold one folder of images for each class, got {root} "
            f"({error}); see the names that torchvision.datasets.ImageFolder takes"
        ) from error
    return listing.samples, listing.classes


def _read_files(files: Sequence[tuple[str, int]], size: int, max_bytes: int) -> ImageSet:
    from torchvision.datasets.folder import pil_loader

    def read(path: str) -> Tensor:
        try:
            return _pil_pixels(pil_loader(path), size)
        except (OSError, SyntaxError, ValueError) as error:
            raise LoaderError(
                f"imagefolder: {path} must be a readable image ({error}); remove or replace it"
            ) from error

    first = read(files[0][0])
    _check_memory("imagefolder", len(files), first, max_bytes)
    images = torch.empty((len(files), *first.shape), dtype=torch.uint8)
    for index, pixels in enumerate(_in_parallel(read, [path for path, _ in files])):
        images[index] = pixels
    labels = torch.tensor([label for _, label in files])
    return ImageSet.of(images, labels, layout="NHWC", function="imagefolder")


def _in_parallel(read: Callable[[str], Tensor], paths: list[str]) -> Iterator[Tensor]:
    """Results in order; PIL decodes outside the interpreter lock, and few results wait at a time."""
    workers = min(_MAX_WORKERS, os.cpu_count() or 1)
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(paths), 64 * workers):
            yield from pool.map(read, paths[start : start + 64 * workers])


def _check_memory(function: str, count: int, first: Tensor, max_bytes: int) -> None:
    needed = count * first.numel() * first.element_size()
    if needed > max_bytes:
        raise LoaderError(
            f"{function}: images must fit into max_bytes = {max_bytes / 2**30:.2f} GiB, "
            f"got {count} of {'x'.join(map(str, first.shape))} = {needed / 2**30:.2f} GiB; "
            "lower size, raise max_bytes, or pass a torch.utils.data.DataLoader instead"
        )


def _hold_out_per_class(images: ImageSet, count: int) -> tuple[ImageSet, ImageSet | None]:
    if isinstance(count, bool) or not isinstance(count, int) or count < 0:
        raise LoaderError(
            f"imagefolder: val_per_class must be an integer >= 0, got {count!r}; 0 holds out none"
        )
    if count == 0:
        return images, None
    sizes = torch.bincount(images.labels)
    if int(sizes.min()) <= count:
        raise LoaderError(
            f"imagefolder: val_per_class must leave a training image of every class, got {count} "
            f"and a class of {int(sizes.min())}; lower it"
        )
    # Files are listed class by class, so an image's place within its class counts from the end.
    ends = sizes.cumsum(0)[images.labels]
    held_out = torch.arange(len(images)) >= ends - count
    parts = [ImageSet(images.images[m], images.labels[m]) for m in (~held_out, held_out)]
    return parts[0], parts[1]
