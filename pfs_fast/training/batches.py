"""What a loop may expect of a loader and of a model's outputs, and the error where it does not get it."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from .._ambient import callers_settings
from ..errors import LoaderError, ModelError

Loader = Iterable[tuple[Tensor, Tensor]]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def check_reiterable(loader: Any, epochs: int, caller: str, name: str = "loader") -> None:
    """Refuses what cannot be iterated, and a generator where more than one pass is needed."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise LoaderError(
            f"{caller}: {name} must be an iterable of (images, labels), got {type(loader).__name__}"
        )
    if isinstance(loader, types.GeneratorType) and epochs > 1:
        raise LoaderError(
            f"{caller}: {name} must be re-iterable for {epochs} passes, got a generator, which is used up after one; "
            "pass a list, a DataLoader or a DeviceLoader"
        )


def checked_batches(
    loader: Loader, caller: str, *, epoch: int = 0, name: str = "loader"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields the batches of one pass, each a pair of floating-point images [N, ...] and labels [N] (or [N, classes]).

    Raises:
        LoaderError: A batch of another form, or no batch at all (in a later epoch: the loader was used up).
    """
    with callers_settings():
        iterator = iter(loader)
    empty, end = True, object()
    try:
        while True:
            with callers_settings():
                batch = next(iterator, end)
            if batch is end:
                break
            empty = False
            images, labels = _checked(batch, caller, name)
            yield _usable(images), _usable(labels)
    finally:
        # A pass that is broken off leaves nothing open; what the caller made himself is his.
        close = getattr(iterator, "close", None)
        if iterator is not loader and callable(close):
            close()
    if not empty:
        return
    if epoch:
        raise LoaderError(
            f"{caller}: {name} must be re-iterable, got no batch in pass {epoch + 1} (a generator or iterator that was used "
            "up?); pass a list, a DataLoader or a DeviceLoader"
        )
    raise LoaderError(
        f"{caller}: {name} must yield at least one batch, got none; is drop_last set with fewer images than one batch, or "
        "was the iterator used before?"
    )


def _usable(tensor: Tensor) -> Tensor:
    """A copy of what was made in ``torch.inference_mode()``, which no backward pass can keep; else the same."""
    return tensor.clone() if tensor.is_inference() else tensor


def _checked(batch: Any, caller: str, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise LoaderError(
            f"{caller}: {name} must yield pairs (images, labels), got {type(batch).__name__}{size}"
        )
    images, labels = batch
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise LoaderError(
            f"{caller}: {name} must yield tensors, got {type(images).__name__} and {type(labels).__name__}; "
            "convert with torch.as_tensor"
        )
    if not images.is_floating_point():
        raise LoaderError(
            f"{caller}: images must be floating point, got {images.dtype}; convert and normalise them, or hand the raw "
            "uint8 images to pfs_fast.data.DeviceLoader"
        )
    if images.dim() < 2 or images.size(0) == 0:
        raise LoaderError(
            f"{caller}: images must have shape [N, C, ...] with N >= 1, got {list(images.shape)}"
        )
    soft = labels.is_floating_point() and labels.dim() == 2
    if not soft and (labels.dim() != 1 or labels.dtype not in _INTEGERS):
        raise LoaderError(
            f"{caller}: labels must be integers of shape [N], got {labels.dtype} of shape {list(labels.shape)}; "
            "use labels.long().flatten()"
        )
    if len(labels) != len(images):
        raise LoaderError(
            f"{caller}: labels must be as many as images, got {len(labels)} labels for {len(images)} images"
        )
    return images, labels if soft else labels.long()


def check_labels(labels: Tensor, num_classes: int, caller: str) -> None:
    """Refuses labels outside ``[0, num_classes)``. Reads the labels: for labels on the CPU only."""
    if labels.is_floating_point():
        if labels.size(1) != num_classes:
            raise LoaderError(
                f"{caller}: labels must have one column per class ({num_classes}), got {labels.size(1)}"
            )
        return
    low, high = (int(value) for value in torch.aminmax(labels))
    if low < 0 or high >= num_classes:
        raise LoaderError(label_message(caller, num_classes, low if low < 0 else high))


def label_message(caller: str, num_classes: int, label: int) -> str:
    """The one text for a label outside the classes, wherever it is found."""
    return (
        f"{caller}: labels must be in [0, {num_classes - 1}], the model's outputs, got {label}; "
        "number the classes from 0, or build the model with more classes"
    )


def split_outputs(outputs: Any, num_images: int, caller: str) -> tuple[Tensor, list[Tensor]]:
    """The logits [N, classes] of a model's outputs, and the auxiliary logits, which may be none.

    Outputs may be a tensor; a tuple (first entry, or the field ``logits``); a mapping (entry "logits" or "out", else the
    first). Auxiliary logits are the fields ``aux_logits*`` of a named tuple, as GoogLeNet and Inception of torchvision have.
    """
    auxiliary: list[Tensor] = []
    logits = outputs
    if isinstance(outputs, Mapping):
        key = next((key for key in ("logits", "out") if key in outputs), next(iter(outputs), None))
        logits = outputs.get(key)
    elif isinstance(outputs, tuple | list):
        fields = getattr(outputs, "_fields", ())
        auxiliary = [
            value
            for field, value in zip(fields, outputs, strict=False)
            if field.startswith("aux_logits") and isinstance(value, Tensor)
        ]
        logits = (
            outputs[fields.index("logits")] if "logits" in fields else next(iter(outputs), None)
        )
    elif hasattr(outputs, "logits"):
        logits = outputs.logits
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != num_images:
        got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ModelError(
            f"{caller}: model must return logits of shape [{num_images}, classes], got {got}; flatten them, or return them as "
            "the first output"
        )
    return logits, auxiliary


class LabelWatch:
    """Checks labels against the number of classes without waiting for the device.

    Labels on the CPU are checked at once. Of labels on a device the smallest and largest are kept there until `read`, and the
    labels are clamped: a loss kernel that meets a label out of range would stop the whole process's use of the device.

    Args:
        device: Where the labels will be used.
        caller: Name of the public function for the error message.
        enabled: False skips labels on a device, such as those that an earlier epoch has shown to be right.
    """

    def __init__(self, device: torch.device, caller: str, enabled: bool = True) -> None:
        self.caller = caller
        self._device = device
        self._enabled = enabled
        self._range: Tensor | None = None  # [2]: largest of (-label, label)
        self._num_classes = 0

    def checked(self, labels: Tensor, num_classes: int) -> Tensor:
        """Returns labels that are safe to use."""
        self._num_classes = num_classes
        if labels.device.type == "cpu" or labels.is_floating_point():
            check_labels(labels, num_classes, self.caller)
            return labels
        if not self._enabled:
            return labels
        low, high = torch.aminmax(labels)
        present = torch.stack([-low, high])
        self._range = present if self._range is None else torch.maximum(self._range, present)
        return labels.clamp(0, num_classes - 1)

    def read(self) -> None:
        """Waits for the device and raises if a label was out of range."""
        if self._range is None:
            return
        low, high = self._range.tolist()
        self._range = None
        if -low < 0 or high >= self._num_classes:
            label = -low if -low < 0 else high
            raise LoaderError(label_message(self.caller, self._num_classes, label))
