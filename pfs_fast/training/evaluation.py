"""Running a classifier on batches: where it is, in which precision, and how often it is right."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._ambient import own_settings
from .._cuda_settings import cuda_settings
from .._modules import require_module
from ..errors import ConfigError, LoaderError, ModelError, NonFiniteLossError, PfsError
from .batches import LabelWatch, Loader, check_reiterable, checked_batches, split_outputs
from .bf16_convs import SoundConvs, may_run_bf16
from .onednn import in_layout
from .recipes import AMP_MODES, autocast_dtype, float32_products


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
        NonFiniteLossError: The loss is NaN or infinite.
    """
    require_module("evaluate", unwrap(model))
    if not isinstance(amp, str) or amp not in AMP_MODES:
        raise ConfigError(f"evaluate: amp must be one of {', '.join(AMP_MODES)}, got {amp!r}")
    check_reiterable(loader, 1, "evaluate")
    plain = unwrap(model)
    device = device_of(plain, device, "evaluate")
    plain.to(device)
    forward = Forward(plain, device, autocast_dtype(amp, device, "evaluate"), layout=None)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with cuda_settings(device, float32_products(amp)):
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
    if not math.isfinite(loss_sum):
        raise NonFiniteLossError(
            f"{caller}: loss of the evaluation must be finite, got {loss_sum} over {count} images; normalise the images, look "
            "for NaN in them and in the weights, and evaluate with amp='off'"
        )
    return Accuracy(hits / count, loss_sum / count, count)


class Forward:
    """Moves a batch to the device, runs the model in the chosen precision, and checks what comes back.

    A network that fails on the first batch in channels_last and runs in NCHW is run in NCHW from then on, with a warning.

    Args:
        plain: The model, unwrapped.
        device: Where it is.
        autocast: None for none.
        layout: Of 4-d images; None: as they come.
        to_nchw: Undoes what a failed forward did to the model, and moves its weights to NCHW; None: weights stay.
    """

    def __init__(
        self,
        plain: nn.Module,
        device: torch.device,
        autocast: torch.dtype | None,
        layout: torch.memory_format | None,
        to_nchw: Callable[[], None] | None = None,
    ) -> None:
        floating = (p.dtype for p in plain.parameters() if p.is_floating_point())
        self.device = device
        self.dtype = next(floating, torch.float32)
        self.autocast = autocast
        self.layout = layout
        self.to_nchw = to_nchw
        self._sound_convs = SoundConvs(plain, may_run_bf16(plain, device, autocast))
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
        images = self._laid_out(images)
        random = _random_state(self.device) if first else None
        try:
            outputs = self._run(model, images, watch.caller)
        except (torch.OutOfMemoryError, PfsError):
            raise
        except (RuntimeError, ValueError) as error:
            if random is None:
                raise
            _set_random_state(self.device, random)
            outputs = self._run_in_nchw(model, images, error, watch.caller)
        logits, auxiliary = split_outputs(outputs, len(images), watch.caller)
        if logits.dtype in (torch.float16, torch.bfloat16):
            logits = logits.float()
        return logits, auxiliary, watch.checked(labels, logits.size(1)).to(self.device)

    def _laid_out(self, images: Tensor) -> Tensor:
        return (
            images if self.layout is None or images.dim() != 4 else in_layout(images, self.layout)
        )

    def _run(self, model: nn.Module, images: Tensor, caller: str) -> Any:
        autocast = torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        )
        with autocast, self._sound_convs(caller):
            return model(images)

    def _run_in_nchw(self, model: nn.Module, images: Tensor, error: Exception, caller: str) -> Any:
        """The first batch again, for networks that channels_last is wrong for, such as those that flatten with ``view``."""
        nchw = in_layout(images, torch.contiguous_format) if images.dim() == 4 else images
        if self.layout != torch.contiguous_format and (
            self.to_nchw is not None or nchw.stride() != images.stride()
        ):
            self.layout = torch.contiguous_format
            if self.to_nchw is not None:
                self.to_nchw()
            try:
                outputs = self._run(model, nchw, caller)
            except torch.OutOfMemoryError:
                raise
            except (RuntimeError, ValueError):
                pass  # not the layout's fault: the first error tells more
            else:
                reason = str(error).partition("\n")[0]
                warnings.warn(
                    f"{caller}: model must run in channels_last, got {type(error).__name__}: {reason}; going on in NCHW, which gives "
                    "the same up to rounding; flatten with reshape in place of view",
                    UserWarning,
                    stacklevel=2,
                )
                return outputs
        raise LoaderError(
            f"{caller}: images must fit the model, got shape {list(images.shape)}: {error}; resize them, build the model for them, "
            "take larger batches where batch statistics need them; where a view fails, set channels_last=False and call "
            "model.to(memory_format=torch.contiguous_format)"
        ) from error


def _random_state(device: torch.device) -> list[Tensor]:
    """Of the CPU's generator, and the device's."""
    cuda = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cuda]


def _set_random_state(device: torch.device, states: list[Tensor]) -> None:
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


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
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    on_meta = torch.device("meta") in devices
    outside = "build all of it outside of torch.device('meta')"
    if device is None:
        if len(devices) > 1:
            names = ", ".join(sorted(map(str, devices)))
            repair = outside if on_meta else "pass device= or call model.to(device)"
            raise ModelError(f"{caller}: model must be on one device, got {names}; {repair}")
        device = next(iter(devices), torch.device("cpu"))
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"{caller}: device must be a torch device such as 'cpu' or 'cuda:0', got {device!r}"
        ) from error
    if on_meta:
        raise ModelError(
            f"{caller}: model must hold values, got tensors on the meta device; {outside}"
        )
    if device.type == "meta":
        raise ModelError(f"{caller}: device must hold values, got meta; choose the CPU or a GPU")
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not (device.index or 0) < there:
            raise ConfigError(
                f"{caller}: device must be there, got '{device}' of {there} CUDA devices; use device='cpu'"
            )
        if device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
    return device
