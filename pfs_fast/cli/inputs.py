"""Which network and which images: plain records that a run's file keeps, and what they build."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from .. import data, models
from ..data import ImageSet, Splits
from ..errors import FileFormatError, LoaderError, ModelError, PfsError
from ..models.registry import is_listed
from .terminal import escaped

# Arguments of torchvision's and timm's builders that open a file or the network.
_OPENS = re.compile("^weights|pretrain|checkpoint|(^|_)(dir|file|url)$")


@dataclass(frozen=True)
class ModelSpec:
    """A network by name, with all arguments of its factory.

    Attributes:
        name: As ``pfs_fast.models.get`` takes it.
        arguments: Keyword arguments of the factory.
    """

    name: str
    arguments: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, name: str, num_classes: int | None, extra: Mapping[str, Any]) -> ModelSpec:
        """A network for so many classes; None: as its factory does by default.

        A factory of the user's that takes no ``num_classes`` decides itself.
        """
        if num_classes is None or "num_classes" in extra:
            return cls(name, dict(extra))
        spec = cls(name, {"num_classes": num_classes, **extra})
        if ":" in name and not is_listed(name) and not name.startswith("torchvision:"):
            try:
                spec.build()
            except ModelError:
                return cls(name, dict(extra))
        return spec

    def build(self, seed: int | None = None) -> nn.Module:
        """The network with random weights, drawn with a seed of their own where one is given.

        Raises:
            ModelError: Unknown name, or arguments that the factory does not take.
        """
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            with _importable_from_here(self.name):
                return models.get(self.name, **self.arguments)

    def is_plain(self) -> bool:
        """Whether a file may name it: a listed network, with plain values that make its builder open nothing."""
        return is_listed(self.name) and all(
            _is_plain(value) and (value in (None, False) or not _OPENS.search(name))
            for name, value in self.arguments.items()
        )

    def recorded(self, path: os.PathLike[str]) -> ModelSpec:
        """The same network as a file names it, if files may.

        Raises:
            FileFormatError: It is something else, which the user must name.
        """
        if not self.is_plain():
            raise FileFormatError(
                f"train: '{path}' must name a network of pfs_fast, torchvision or timm with plain values and no weights, got "
                f"{self}; nothing else is called because a file names it: if you trust it, add {self.options()}"
            )
        return _RecordedSpec(self.name, self.arguments)

    def options(self) -> str:
        """The options of a command that name this network; the number of classes is that of the data."""
        words = ["--model", self.name]
        for name, value in self.arguments.items():
            if name != "num_classes":
                words += ["--model-arg", f"{name}={value}"]
        return escaped(shlex.join(words))

    def base(self) -> ModelSpec:
        """The same network before widening."""
        widening = ("expansion", "multiplier")
        return ModelSpec(self.name, {k: v for k, v in self.arguments.items() if k not in widening})


class _RecordedSpec(ModelSpec):
    """A network that a file names."""

    def build(self, seed: int | None = None) -> nn.Module:
        try:
            return super().build(seed)
        except PfsError:
            raise
        except Exception as error:  # whatever a builder makes of the values of a damaged file
            raise FileFormatError(
                f"train: the record must hold arguments that its network takes, got {self} ({type(error).__name__}: {error}); "
                f"name the network yourself: {self.options()}"
            ) from error


@dataclass(frozen=True)
class DataSpec:
    """Images by name.

    Attributes:
        source: A name of ``pfs_fast.data.names()``, "imagefolder", or the path of an .npz file or folder.
        path: Where the data of a named source lie; None: its default place.
        size: Height and width, where the source resizes; None: its default.
        val: Training images held out for validation (folders: of each class); None: the source's default.
    """

    source: str
    path: str | None = None
    size: int | None = None
    val: int | None = None

    def splits(self) -> Splits:
        """Reads the images.

        Raises:
            LoaderError: There are none, or not as said.
        """
        load = self._loader()
        options = {"size": self.size, "val": self.val}
        if self._is_folder():
            options["val_per_class"] = options.pop("val")
        elif self.source not in ("digits", "fashion-mnist"):
            if self.size is not None:
                raise LoaderError(
                    f"data: --size must be left out for {self.source!r}, got {self.size}; its images have a size of their own"
                )
            options.pop("size")
        return load(**{name: value for name, value in options.items() if value is not None})

    def _loader(self) -> Any:
        takes_path = {"cifar10": data.cifar10, "fashion-mnist": data.fashion_mnist}
        if self.path is not None and self.source in takes_path:
            return partial(takes_path[self.source], self.path)
        if self.source == "imagefolder":
            if self.path is None:
                raise LoaderError(
                    "data: imagefolder must come with a folder, got none; use --data imagefolder DIR"
                )
            return partial(data.imagefolder, self.path)
        if self.path is not None:
            known = ", ".join([*takes_path, "imagefolder"])
            raise LoaderError(
                f"data: a path must belong to one of {known}, got {self.path!r} for {self.source!r}; leave it out"
            )
        named = {"digits": data.digits, "synthetic": data.synthetic, "cifar10": data.cifar10}
        named["fashion-mnist"] = data.fashion_mnist
        if self.source in named:
            return named[self.source]
        if self._is_folder():
            return partial(data.imagefolder, self.source)
        if self.source.endswith(".npz") or os.path.isfile(self.source):
            return partial(data.from_npz, self.source)
        return partial(_unknown, self.source)

    def _is_folder(self) -> bool:
        if self.source in data.names():
            return False
        return self.source == "imagefolder" or os.path.isdir(self.source)


def joined(splits: Splits) -> ImageSet:
    """All images to train on, those held out for validation included."""
    if splits.val is None:
        return splits.train
    parts = (splits.train, splits.val)
    return ImageSet(torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts]))


def _unknown(source: str, **_: Any) -> Splits:
    return data.load(source)  # raises, with the names that are close


def _is_plain(value: Any) -> bool:
    values = value if isinstance(value, list | tuple) else [value]
    return all(item is None or isinstance(item, bool | int | float | str) for item in values)


@contextmanager
def _importable_from_here(name: str) -> Iterator[None]:
    """``package.module:factory`` is looked up in the current folder too, as with ``python -m``; listed networks are not."""
    if is_listed(name):
        yield
        return
    here = os.getcwd()
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)
