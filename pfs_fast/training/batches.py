"""What a loop may expect of a loader and of a model's outputs, and the error where it does not get it."""

from __future__ import annotations

import numbers
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._ambient import callers_settings
from .._tensors import require_dense
from ..errors import LoaderError, ModelError

Loader = Iterable[tuple[Tensor, Tensor]]

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_ONE_LABEL = "give each image one label; labels of pixels, boxes or sequences are not supported"
_BATCHES = (
    "yield batches of images [N, C, H, W] and labels [N], as a DataLoader with a batch_size does"
)


def check_reiterable(loader: Any, epochs: int, caller: str, name: str = "loader") -> None:
    """Refuses what cannot be iterated, and a generator where more than one pass is needed."""
    if isinstance(loader, type) or not (
        hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")
    ):
        raise LoaderError(
            f"{caller}: {name} must be an iterable of (images, labels), got {type(loader).__name__}; "
            "pass a list, a DataLoader or a DeviceLoader"
        )
    if isinstance(loader, types.GeneratorType) and epochs > 1:
        raise LoaderError(
            f"{caller}: {name} must be re-iterable for {epochs} passes, got a generator, which is used up after one; "
            "pass a list, a DataLoader or a DeviceLoader"
        )


def num_batches(loader: Any) -> int | None:
    """Batches of one pass; None where nobody knows, as of a DataLoader over an iterable data set."""
    try:
        return len(loader)
    except (TypeError, NotImplementedError):
        return None


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
        f"{caller}: {name} must yield at least one batch, got none; pass a list, a DataLoader or a DeviceLoader that was not "
        "used up before, and set drop_last only where the images fill a batch"
    )


def _usable(tensor: Tensor) -> Tensor:
    """A copy of what was made in ``torch.inference_mode()``, which no backward pass can keep; else the same."""
    return tensor.clone() if tensor.is_inference() else tensor


def _checked(batch: Any, caller: str, name: str) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise LoaderError(
            f"{caller}: {name} must yield pairs (images, labels), got {type(batch).__name__}{size}; return just these two from "
            "the collate_fn of a DataLoader, or from a class around it with an __iter__ of its own"
        )
    images, labels = batch
    if not isinstance(images, Tensor) or not isinstance(labels, Tensor):
        raise LoaderError(
            f"{caller}: {name} must yield tensors, got {type(images).__name__} and {type(labels).__name__}; "
            f"{_tensor_repair(images, labels)}"
        )
    require_dense(LoaderError, f"{caller}: images", images)
    require_dense(LoaderError, f"{caller}: labels", labels)
    if not images.is_floating_point():
        raise LoaderError(
            f"{caller}: images must be floating point, got {images.dtype}; convert and normalise them, or hand the raw "
            "uint8 images to pfs_fast.data.DeviceLoader"
        )
    if images.dim() < 2 or images.size(0) == 0:
        raise LoaderError(
            f"{caller}: images must have shape [N, C, ...] with N >= 1, got {list(images.shape)}; {_BATCHES}, and leave out "
            "empty ones"
        )
    soft = labels.is_floating_point() and labels.dim() == 2
    if not soft and (labels.dim() != 1 or labels.dtype not in _INTEGERS):
        raise LoaderError(
            f"{caller}: labels must be integers of shape [N], or probabilities of shape [N, classes], got {labels.dtype} of "
            f"shape {list(labels.shape)}; {_label_repair(labels, len(images))}"
        )
    if len(labels) != len(images):
        raise LoaderError(
            f"{caller}: labels must be as many as images, got {len(labels)} labels for {len(images)} images; {_ONE_LABEL}"
        )
    return images, labels if soft else labels.long()


def _tensor_repair(images: Any, labels: Any) -> str:
    """How a pair that holds something else than tensors becomes one that is taken."""
    if isinstance(labels, numbers.Number):  # an item of a data set
        return f"{_BATCHES}, over images that a transform has made tensors"
    if isinstance(images, list | tuple | Mapping):
        return (
            "stack images of equal size into one tensor; a network of several inputs takes them joined along the channels, "
            "and splits them in its forward"
        )
    if isinstance(labels, Mapping) or (
        isinstance(labels, list | tuple)
        and not all(isinstance(label, numbers.Number) for label in labels)
    ):
        return _ONE_LABEL
    return "convert with torch.as_tensor"


def _label_repair(labels: Tensor, num_images: int) -> str:
    """How labels of a wrong dtype or shape become ones that are taken."""
    if labels.dim() == 0:
        return _BATCHES
    if labels.numel() == num_images:
        return "use labels.flatten().long() where they are class indices; other targets, as of regression, are not supported"
    if labels.dim() == 2 and len(labels) == num_images:
        return "use labels.long().argmax(1) where they are one-hot; several labels for an image are not supported"
    return _ONE_LABEL


def check_labels(labels: Tensor, num_classes: int, caller: str) -> None:
    """Refuses labels outside ``[0, num_classes)``, and rows that are no probabilities. Reads them: for labels on the CPU."""
    if labels.is_floating_point():
        _check_columns(labels, num_classes, caller)
        check_noted((0, 0, float(_row_error(labels))), num_classes, caller)
        return
    low, high = (int(value) for value in torch.aminmax(labels))
    check_noted((-low, high, 0), num_classes, caller)


def note_labels(labels: Tensor, num_classes: int, caller: str) -> tuple[Tensor, Tensor]:
    """Labels on a device that are safe to use, and what `check_noted` will need, without reading either.

    A loss kernel that meets a label out of range would stop the whole process's use of the device.

    Returns:
        Integers [N] clamped to the classes, or probabilities [N, classes] as they are; and [3]: the largest ``-label``, the
        largest label, and how far a row is from probabilities. Joined over batches by ``torch.maximum``, from zeros on.

    Raises:
        LoaderError: Another number of columns than classes.
    """
    zero = labels.new_zeros(())
    if labels.is_floating_point():
        _check_columns(labels, num_classes, caller)
        return labels, torch.stack([zero.float(), zero.float(), _row_error(labels)])
    low, high = torch.aminmax(labels)
    return labels.clamp(0, num_classes - 1), torch.stack([-low, high, zero])


def check_noted(noted: Sequence[float], num_classes: int, caller: str) -> None:
    """Raises for what `note_labels` noted, or `check_labels` read.

    Raises:
        LoaderError: A label outside the classes, or a row that is no probabilities (NaN included).
    """
    lowest, highest, row_error = -noted[0], noted[1], noted[2]
    if lowest < 0 or highest >= num_classes:
        label = int(lowest if lowest < 0 else highest)
        repair = (
            "number the classes from 0, and leave out images without a class"
            if label < 0
            else f"number the classes from 0, or build the model with {label + 1} outputs or more"
        )
        raise LoaderError(
            f"{caller}: labels must be in [0, {num_classes - 1}], the model's outputs, got {label}; {repair}"
        )
    if row_error != 0:
        repair = (
            "pass one class for each image, as labels.argmax(1); a loss for several classes (multi-hot labels) is not supported"
            if num_classes > 1
            else "build the model with an output for each class, and use labels.flatten().long()"
        )
        raise LoaderError(
            f"{caller}: labels [N, classes] must be probabilities, at least 0 and with a sum of 1 in each row, got a row that "
            f"misses this by {row_error:.3g}; {repair}"
        )


def _check_columns(labels: Tensor, num_classes: int, caller: str) -> None:
    columns = labels.size(1)
    if columns == num_classes:
        return
    if columns == 1:
        repair = _label_repair(labels, len(labels))
    else:
        repair = f"build the model with {columns} outputs"
        if float(_row_error(labels)) != 0:
            repair += ", and pass one class for each image, as labels.argmax(1)"
    raise LoaderError(
        f"{caller}: labels must have one column per class ({num_classes}), got {columns}; {repair}"
    )


def _row_error(labels: Tensor) -> Tensor:
    """How far the worst row of [N, classes] is from probabilities; 0 within rounding. Scalar, float32."""
    # Rounded entries of one sign miss the sum by less than eps; a mix of two such rows by little more.
    allowed = max(1e-3, 4 * torch.finfo(labels.dtype).eps)
    rows = labels.detach().float()
    error = torch.maximum((rows.sum(1) - 1).abs().max(), -rows.min())
    return torch.where(error <= allowed, 0.0, error)  # NaN stays


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
            f"{caller}: model must return logits of shape [{num_images}, classes], got {got}; return them as the first output, "
            "with outputs.flatten(1) of [N, classes, 1, 1], or outputs.mean((2, 3)) of maps"
        )
    return logits, auxiliary


def require_gradient(logits: Tensor, caller: str) -> None:
    """Refuses logits that no backward pass can start from."""
    if not logits.requires_grad:
        raise ModelError(
            f"{caller}: model must return outputs that carry a gradient, got logits without; take detach(), torch.no_grad() "
            "and requires_grad_(False) out of its forward"
        )


class LabelWatch:
    """Checks labels against the number of classes without waiting for the device.

    Labels on the CPU are checked at once. What is wrong with labels on a device is noted there until `read`.

    Args:
        device: Where the labels will be used.
        caller: Name of the public function for the error message.
        enabled: False skips integers on a device, such as those that an earlier epoch has shown to be right.
    """

    def __init__(self, device: torch.device, caller: str, enabled: bool = True) -> None:
        self.caller = caller
        self._device = device
        self._enabled = enabled
        self._noted: Tensor | None = None
        self._num_classes = 0

    def checked(self, labels: Tensor, num_classes: int) -> Tensor:
        """Returns labels that are safe to use."""
        self._num_classes = num_classes
        if labels.device.type == "cpu":
            check_labels(labels, num_classes, self.caller)
            return labels
        if not self._enabled and not labels.is_floating_point():
            return labels
        safe, noted = note_labels(labels, num_classes, self.caller)
        self._noted = noted if self._noted is None else torch.maximum(self._noted, noted)
        return safe

    def read(self) -> None:
        """Waits for the device and raises if a label was wrong."""
        if self._noted is None:
            return
        noted, self._noted = self._noted.tolist(), None
        check_noted(noted, self._num_classes, self.caller)
