"""Images on the device and where they come from.

`DeviceLoader` holds all images on one device and augments them there. The other functions read data
sets into `Splits`, whose `loaders()` are ready for `search` and `train`:

    train, val, test = data.digits().loaders(batch_size=128)
"""

from __future__ import annotations

from .by_name import load, names
from .folder import from_dataset, imagefolder
from .idx import fashion_mnist
from .loader import CIFAR10_MEAN, CIFAR10_STD, DeviceLoader
from .sources import cifar10, digits, from_npz, synthetic
from .splits import ImageSet, Loaders, Splits, WholeSplits, split

__all__ = [
    "CIFAR10_MEAN",
    "CIFAR10_STD",
    "DeviceLoader",
    "ImageSet",
    "Loaders",
    "Splits",
    "WholeSplits",
    "cifar10",
    "digits",
    "fashion_mnist",
    "from_dataset",
    "from_npz",
    "imagefolder",
    "load",
    "names",
    "split",
    "synthetic",
]
