"""Images of the searches, on the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

import pfs_fast as pfs
from benchmarks.settings import NETWORKS, Settings

CIFAR10_TRAINING = 45_000  # the paper's split of the 50,000


@functools.lru_cache(maxsize=1)
def _splits(name: str, path: str | None) -> pfs.data.Splits:
    if name == "cifar10":
        return pfs.data.cifar10(path)
    if name == "digits":
        return pfs.data.digits()
    generator = torch.Generator().manual_seed(0)
    shape = (CIFAR10_TRAINING, 3, 32, 32)
    images = torch.randint(256, shape, dtype=torch.uint8, generator=generator)
    labels = torch.randint(10, shape[:1], generator=generator)
    noise = pfs.data.ImageSet(images.contiguous(memory_format=torch.channels_last), labels)
    return pfs.data.Splits(noise, None, None, 10, (0.5,) * 3, (0.25,) * 3, "random")


def training_loader(
    settings: Settings, *, seed: int = 0, dtype: torch.dtype, channels_last: bool = True
) -> pfs.data.DeviceLoader:
    """The training part in batches of ``profile.search_batch`` images, augmented; the same for every dtype and layout."""
    options = {"seed": seed, "device": settings.device, "dtype": dtype}
    batch = settings.profile.search_batch
    splits = _splits(*settings.data)
    return splits.loaders(batch, channels_last=channels_last, **options).train


def endless(loader: pfs.data.DeviceLoader) -> Iterator[tuple[Tensor, Tensor]]:
    """Epoch after epoch."""
    while True:
        yield from loader


def searchable(name: str) -> bool:
    """Whether a network takes these images."""
    return NETWORKS[name].size == 32
