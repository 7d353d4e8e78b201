"""The batches of a ``DeviceLoader`` made by device work alone, from storage at fixed addresses, so that a graph can hold it."""

from __future__ import annotations

import torch
from torch import Tensor

from .loader import DeviceLoader


class DeviceFeed:
    """Gives the batches that a training ``DeviceLoader`` gives, bit for bit, without the host's part in each.

    The random draws of an epoch are copied to fixed tensors at its start; a counter on the device says which batch is next.

    Args:
        loader: A loader with ``train=True``. Its own position (``epoch``, ``state_dict``) moves along.

    Attributes:
        batch_size: Images of a full batch.
        num_classes: All labels are below.
        full_left: Full batches left in the epoch.
    """

    def __init__(self, loader: DeviceLoader) -> None:
        self._loader = loader
        self.batch_size, self.num_classes = loader.batch_size, loader.num_classes
        self.full_left = 0
        self._plan = loader.plan(0)
        self._offsets = torch.arange(loader.batch_size, device=loader.device)
        self._next = torch.zeros(1, dtype=torch.int64, device=loader.device)

    @staticmethod
    def serves(loader: object, device: torch.device) -> bool:
        """Whether a loader's batches can be made so: a training one of just this class, on this device."""
        if type(loader) is not DeviceLoader or not loader.train:
            return False
        place = loader.device
        index = (
            torch.cuda.current_device()
            if place.type == "cuda" and place.index is None
            else place.index
        )
        return place.type == device.type and index == device.index

    def __len__(self) -> int:
        return len(self._loader)

    def start(self, epoch: int) -> None:
        """Go to the first batch of an epoch."""
        self._loader.set_epoch(epoch)
        for fixed, drawn in zip(self._plan, self._loader.plan(epoch), strict=True):
            fixed.copy_(drawn, non_blocking=True)
        self._next.zero_()
        self.full_left = self._loader.num_images // self.batch_size

    def make(self) -> tuple[Tensor, Tensor]:
        """The next full batch: (images, labels). Device work only; ``count`` is the host's part."""
        index = self._offsets + self._next
        self._next.add_(self.batch_size)
        return self._loader.batch(type(self._plan)(*(x.index_select(0, index) for x in self._plan)))

    def count(self, batches: int) -> None:
        """So many full batches were made, here or in a replay."""
        self.full_left -= batches
        self._loader.advance(batches)

    def rest(self) -> tuple[Tensor, Tensor]:
        """The last batch of the epoch, smaller than the others."""
        start = self._loader.num_images // self.batch_size * self.batch_size
        self._loader.advance(1)
        return self._loader.batch(type(self._plan)(*(x[start:] for x in self._plan)))
