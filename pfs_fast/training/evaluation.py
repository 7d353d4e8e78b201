"""Running a classifier on batches: where it is, in which precision, and how often it is right."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._ambient import own_settings
from ..errors import ConfigError, LoaderError, ModelError, PfsError
from .batches import LabelWatch, Loader, check_reiterable, checked_batches, split_outputs
from .onednn import in_layout
from .recipes import AMP_MODES, autocast_dtype


@dataclass(frozen=True)
class Accuracy:
    """Result of `evaluate`."""

    top1: float
    """Share of images whose largest logit is the label's, in [0, 1]."""
    loss: float
    """Mean cross entropy, without label smoothing."""
    n: int
    """Number of images."""

    def __str__(self) -> str:
        return f"top-1 {100 * self.top1:.2f} %, loss {self.loss:.4f} on {self.n} images"


@own_settings()
def evaluate(
    model: nn.Module,
    loader: Loader,
    device: torch.device | str | None = None,
    *,
    amp: str = "off",
) -> Accuracy:
    """Top-1 accuracy and mean cross entropy of a model in eval mode. The model's mode is put back afterwards.

    Of the caller's settings (autocast, defaults, inference mode) the loader alone sees something, as in `train`.

    Args:
        model: The classifier; moved to ``device`` where that is given.
        loader: Yields (images, labels) as for `train`; one pass is made.
        device: None for where the model is.
        amp: Autocast as in `TrainConfig`.

    Raises:
        LoaderError: An empty loader, or batches of a wrong form, dtype or label range.
        ModelError: Parameters on several devices, or outputs that are no logits.
    """
    if amp not in AMP_MODES:
        raise ConfigError(f"evaluate: amp must be one of {', '.join(AMP_MODES)}, got {amp!r}")
    check_reiterable(loader, 1, "evaluate")
    plain = unwrap(model)
    device = device_of(plain, device, "evaluate")
    plain.to(device)
    forward = Forward(plain, device, autocast_dtype(amp, device), layout=None)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        return evaluate_with(forward, model, checked_batches(loader, "evaluate"), "evaluate")
    finally:
        for module, training in modes.items():
            module.training = training


@torch.no_grad()
def evaluate_with(
    forward: Forward, model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], caller: str
) -> Accuracy:
    """`evaluate` of a model that is in place and in eval mode; the device is read once, at the end."""
    totals = torch.zeros(2, device=forward.device, dtype=forward.sum_dtype)  # hits, loss
    watch = LabelWatch(forward.device, caller)
    count = 0
    for images, labels in batches:
        logits, _, labels = forward(model, images, labels, watch, first=count == 0)
        loss = F.cross_entropy(logits, labels, reduction="sum")
        totals += torch.stack([correct(logits, labels).to(totals.dtype), loss.to(totals.dtype)])
        count += len(images)
    watch.read()
    hits, loss_sum = totals.tolist()
    return Accuracy(hits / count, loss_sum / count, count)


class Forward:
    """Moves a batch to the device, runs the model in the chosen precision, and checks what comes back."""

    def __init__(
        self,
        plain: nn.Module,
        device: torch.device,
        autocast: torch.dtype | None,
        layout: torch.memory_format | None,  # of 4-d images; None: as they come
    ) -> None:
        floating = (p.dtype for p in plain.parameters() if p.is_floating_point())
        self.device = device
        self.dtype = next(floating, torch.float32)
        self.autocast = autocast
        self.layout = layout
        self.sum_dtype = torch.float32 if device.type == "mps" else torch.float64  # mps lacks fp64

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, watch: LabelWatch, *, first: bool
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Returns logits [N, classes] in at least fp32, auxiliary logits, and the labels on the device.

        Args:
            first: The first batch: an error of the model is then one of the images' shape.
        """
        halved = self.autocast is not None and images.dtype == self.autocast
        images = images.to(
            self.device,
            images.dtype if halved else self.dtype,
            non_blocking=True,
        )
        if self.layout is not None and images.dim() == 4:
            images = in_layout(images, self.layout)
        try:
            with torch.autocast(
                self.device.type, dtype=self.autocast, enabled=self.autocast is not None
            ):
                outputs = model(images)
        except (torch.OutOfMemoryError, PfsError):
            raise
        except (RuntimeError, ValueError) as error:
            if not first:
                raise
            raise LoaderError(
                f"{watch.caller}: images must fit the model, got shape {list(images.shape)}: {error}"
            ) from error
        logits, auxiliary = split_outputs(outputs, len(images), watch.caller)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return logits, auxiliary, watch.checked(labels, logits.size(1)).to(self.device)


def correct(logits: Tensor, labels: Tensor) -> Tensor:
    """Number of images whose largest logit is the label's (the likeliest label's), 0-d on the device."""
    return (logits.argmax(1) == (labels if labels.dim() == 1 else labels.argmax(1))).sum()


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside DataParallel, DistributedDataParallel and torch.compile."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
            model = model._orig_mod
        else:
            return model


def device_of(model: nn.Module, device: torch.device | str | None, caller: str) -> torch.device:
    """Where to run: ``device``, else the one device of the model; CUDA devices with their index."""
    if device is None:
        devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            raise ModelError(
                f"{caller}: model must be on one device, got {names}; pass device= or call model.to(device)"
            )
        device = next(iter(devices), torch.device("cpu"))
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return device
