"""Training from scratch: SGD with the paper's recipes, evaluation, best and last states."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._ambient import alone, callers_settings, random_numbers
from .._cuda_settings import cuda_settings
from .._modules import require_module
from ..errors import ConfigError, ModelError, NonFiniteLossError
from .batches import (
    LabelWatch,
    Loader,
    check_reiterable,
    checked_batches,
    num_batches,
    require_gradient,
)
from .evaluation import Accuracy, Forward, correct, device_of, evaluate, evaluate_with, unwrap
from .onednn import ISSUE, unsafe_weight_gradients
from .progress import Progress
from .recipes import TrainConfig, autocast_dtype, float32_products, scratch_b_epochs
from .weights import (
    Average,
    Placement,
    Snapshot,
    finite_buffers,
    lay_out,
    not_finite,
    parameter_groups,
)

__all__ = ["Accuracy", "TrainConfig", "TrainResult", "evaluate", "scratch_b_epochs", "train"]

READ_EVERY = 50
"""Steps between two reads of the losses from a device: each read waits for the device."""

_AUXILIARY_WEIGHT = {1: 0.4, 2: 0.3}
"""Loss weight per number of auxiliary outputs: Inception v3 has one, GoogLeNet two (torchvision's training reference)."""


@dataclass(frozen=True)
class TrainResult:
    """Result of `train`. The states are on the CPU, of the averaged weights where ``config.ema`` is set."""

    accuracy: float | None
    """Top-1 on ``val_loader`` after the last epoch, in [0, 1]; None without a ``val_loader``."""
    best_accuracy: float | None
    best_epoch: int | None
    """Epoch of ``best_accuracy``, counted from 1; the first of equals."""
    epochs: int
    history: list[dict[str, Any]]
    """Per epoch: "epoch" (from 1), "lr", "loss", "accuracy" (on the training batches, as trained), "seconds" and, where
    evaluated, "val_loss", "val_accuracy"."""
    best_state: dict[str, Tensor] | None
    last_state: dict[str, Tensor]
    config: TrainConfig
    seconds: float

    def __str__(self) -> str:
        text = f"{self.epochs} epochs in {self.seconds:.1f} s, loss {self.history[-1]['loss']:.4f}"
        if self.accuracy is not None and self.best_accuracy is not None:
            text += f", top-1 {100 * self.accuracy:.2f} %"
            text += f" (best {100 * self.best_accuracy:.2f} % after epoch {self.best_epoch})"
        return text


@alone("train")
def train(
    model: nn.Module,
    loader: Loader,
    val_loader: Loader | None = None,
    config: TrainConfig | None = None,
    *,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> TrainResult:
    """Trains a model in place with SGD on cross entropy; by default with the paper's CIFAR recipe.

    On any error, and on Ctrl-C, the model is set back to its state after the last complete epoch (at first: as it was given),
    on the device and in the memory layout that it came with, and the error goes on to the caller.

    Autocast, gradient and inference mode, default device and default dtype of the caller reach his loaders, but not the training.
    It runs alone in its process, since random numbers are drawn all the time; with a seed the generators are put back at the end.

    Args:
        model: Any classifier; changed in place: weights, statistics, device and (``channels_last``) memory layout. A network
            that only runs in NCHW is trained so, with a warning. Its mode is kept, and ``model.pfs_input_shape`` is set to the images' (C, H, W), which `export` uses. Outputs: logits
            [N, classes], or a tuple or mapping with them first; auxiliary logits of GoogLeNet (weight 0.3 each) and Inception
            (0.4) join the loss. Parameters that need no gradient stay as they are.
        loader: Yields (images [N, C, ...] floating point, labels [N] integers or [N, classes] probabilities); is iterated
            once per epoch. Its order and augmentation are its own; ``set_epoch(epoch)`` of the loader or its sampler is
            called where it exists, so that the same seeds give the same run.
        val_loader: Evaluated after every ``config.eval_every`` epochs; held-out images, since the best state is chosen by them.
            Without it no best state is kept.
        config: The recipe; None for ``TrainConfig()``.
        device: Where to train; None for where the model is.
        progress: Show a progress bar.

    Returns:
        Accuracies, history, and the best and last states.

    Raises:
        LoaderError: An empty loader, one that can be read once only, or batches of a wrong form, dtype or label range.
        ConfigError: ``restore="best"`` without a ``val_loader``.
        NonFiniteLossError: The loss became NaN or infinite. Checked at each step on the CPU; elsewhere every 50 steps, since
            reading the loss waits for the device. Weights and statistics are checked after each epoch.
        ModelError: No parameter to train, tensors made in inference mode, parameters on several devices, or outputs that are no
            logits.
        BusyError: Another thread of the process is in a search or a training.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
        >>> images, labels = torch.randn(8, 3, 2, 2), torch.arange(8) % 2
        >>> train(net, [(images, labels)], config=TrainConfig(epochs=2), progress=False).epochs
        2
    """
    require_module("train", unwrap(model))
    config = TrainConfig() if config is None else config
    if not isinstance(config, TrainConfig):
        raise ConfigError(
            f"train: config must be a TrainConfig, got {type(config).__name__}; write TrainConfig(epochs=2, ...)"
        )
    if not isinstance(progress, bool):
        raise ConfigError(f"train: progress must be True or False, got {progress!r}")
    check_reiterable(loader, config.total_epochs, "train")
    if val_loader is not None:
        check_reiterable(val_loader, config.total_epochs, "train", "val_loader")
    elif config.restore == "best":
        raise ConfigError(
            "train: val_loader must be given with restore='best', got None; pass one or use restore='last'"
        )
    plain = unwrap(model)
    device = device_of(plain, device, "train")
    if not any(parameter.requires_grad for parameter in plain.parameters()):
        raise ModelError(
            "train: model must have parameters that need a gradient, got none; call model.requires_grad_(True)"
        )
    made = next(
        (n for n, t in (*plain.named_parameters(), *plain.named_buffers()) if t.is_inference()),
        None,
    )
    if made is not None:
        raise ModelError(
            f"train: model must have tensors that can be trained, got '{made}' made in torch.inference_mode(); pass "
            "copy.deepcopy(model), made outside of it"
        )
    given = Placement(plain)
    modes = {module: module.training for module in model.modules()}
    with (
        random_numbers(config.seed, [device]),
        cuda_settings(device, float32_products(config.amp)),
    ):
        run = None
        try:
            plain.to(device)
            layout = _layout(plain, device, config)
            if layout is not None:
                lay_out(plain, layout)
            run = _Run(model, plain, device, config, layout)
            return run.fit(loader, val_loader, progress)
        except BaseException:
            # A failed device cannot be written to; the first error is the one to see.
            with contextlib.suppress(RuntimeError):
                if run is not None:
                    run.good.restore()
                given.restore()
            raise
        finally:
            plain.zero_grad(set_to_none=True)
            for module, training in modes.items():
                module.training = training


def _layout(
    plain: nn.Module, device: torch.device, config: TrainConfig
) -> torch.memory_format | None:
    """Of weights and images; None: as they come. NCHW, and a warning, where channels_last would corrupt memory."""
    unsafe = unsafe_weight_gradients(plain) if device.type == "cpu" else []
    if not unsafe:
        return torch.channels_last if config.channels_last else None
    if config.channels_last:
        warnings.warn(
            f"train: config.channels_last must be False on a CPU for '{unsafe[0]}' ({len(unsafe)} such layers: 1x1, stride above "
            f"1, few input channels), whose weight gradient would write past its memory ({ISSUE}); the network is trained in "
            "NCHW, which gives the same up to rounding",
            UserWarning,
            stacklevel=4,  # of the caller of `train`
        )
    return torch.contiguous_format


class _Run:
    """One training run: the optimiser and all that changes from step to step."""

    def __init__(
        self,
        model: nn.Module,
        plain: nn.Module,
        device: torch.device,
        config: TrainConfig,
        layout: torch.memory_format | None,
    ) -> None:
        self.model, self.plain, self.config = model, plain, config
        dtype = autocast_dtype(config.amp, device)
        self.forward = Forward(plain, device, dtype, layout, self._to_nchw)
        self.optimizer = torch.optim.SGD(
            parameter_groups(plain, config.weight_decay, config.decay_bn_bias),
            lr=config.lr,
            momentum=config.momentum,
            nesterov=config.nesterov,
            fused=device.type in ("cpu", "cuda"),
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.average = None if config.ema is None else Average(plain, config.ema)
        self.good = Snapshot(plain)
        self.finite = finite_buffers(plain)
        self.best: Snapshot | None = None
        self.best_accuracy: float | None = None
        self.best_epoch: int | None = None
        self.step = 0
        self.input_shape: tuple[int, ...] = ()  # of the first image
        self.history: list[dict[str, Any]] = []

    def fit(self, loader: Loader, val_loader: Loader | None, progress: bool) -> TrainResult:
        start = time.perf_counter()
        epochs = self.config.total_epochs
        batches = num_batches(loader)
        steps = None if batches is None else batches * epochs
        accuracy: Accuracy | None = None
        with Progress(steps, "train", progress) as bar:
            for epoch in range(epochs):
                began = time.perf_counter()
                row = self._epoch(loader, epoch, bar)
                due = (epoch + 1) % self.config.eval_every == 0 or epoch + 1 == epochs
                accuracy = self._finish_epoch(epoch, val_loader if due else None) or accuracy
                self.plain.pfs_input_shape = self.input_shape
                if due and accuracy is not None:
                    row |= {"val_loss": accuracy.loss, "val_accuracy": accuracy.top1}
                    bar.update(0, val_acc=accuracy.top1, best=self.best_accuracy)
                row["seconds"] = time.perf_counter() - began
                self.history.append(row)
        self.good.restore()
        last_state = self._state()
        best_state = None
        if self.best is not None:
            self.best.restore()
            best_state = self._state()
            if self.config.restore == "last":
                self.good.restore()
        return TrainResult(
            accuracy=None if accuracy is None else accuracy.top1,
            best_accuracy=self.best_accuracy,
            best_epoch=self.best_epoch,
            epochs=epochs,
            history=self.history,
            best_state=best_state,
            last_state=last_state,
            config=self.config,
            seconds=time.perf_counter() - start,
        )

    def _epoch(self, loader: Loader, epoch: int, bar: Progress) -> dict[str, Any]:
        rate = self.config.lr_at(epoch)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        _set_epoch(loader, epoch)
        self.model.train()
        log = _StepLog(self.forward, self.step)
        watch = LabelWatch(self.forward.device, "train", enabled=epoch == 0)
        bar.update(0, epoch=f"{epoch + 1}/{self.config.total_epochs}", lr=rate)
        metrics = {"loss": log.loss, "acc": log.accuracy}
        for images, labels in checked_batches(loader, "train", epoch=epoch):
            self._step(images, labels, log, watch)
            self.input_shape = self.input_shape or tuple(images.shape[1:])
            bar.update(1, **metrics)
            if log.pending == READ_EVERY or self.step == 1:
                watch.read()
                log.read()
        watch.read()
        log.read()
        return {"epoch": epoch + 1, "lr": rate, "loss": log.loss(), "accuracy": log.accuracy()}

    def _step(self, images: Tensor, labels: Tensor, log: _StepLog, watch: LabelWatch) -> None:
        logits, auxiliary, labels = self.forward(
            self.model, images, labels, watch, first=self.step == 0
        )
        self.forward.to_nchw = None  # the start is past
        require_gradient(logits, "train")
        entropy = partial(
            F.cross_entropy, target=labels, label_smoothing=self.config.label_smoothing
        )
        loss = entropy(logits)
        for other in auxiliary:
            loss = loss + _AUXILIARY_WEIGHT.get(len(auxiliary), 0.3) * entropy(
                other.to(logits.dtype)
            )
        self.step += 1
        if loss.device.type == "cpu" and not math.isfinite(loss.item()):
            raise _non_finite(self.step, loss.item())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update()
        log.add(loss.detach(), correct(logits.detach(), labels), len(images))

    def _to_nchw(self) -> None:
        """Back to the start, in NCHW; before the first step."""
        self.good.restore()
        lay_out(self.plain, torch.contiguous_format)
        if self.config.ema is not None:
            self.average = Average(self.plain, self.config.ema)

    def _finish_epoch(self, epoch: int, val_loader: Loader | None) -> Accuracy | None:
        """Evaluates what will be kept (the average, where there is one) and keeps it."""
        # The last step's gradient, and statistics that only the eval mode uses, which no later loss would show.
        bad = not_finite(self.plain, self.finite)
        if bad is not None:
            name, value = bad
            raise _non_finite(self.step, value, name if name in self.finite else "weights")
        if self.average is not None:
            self.average.swap()
        try:
            accuracy = None
            if val_loader is not None:
                batches = checked_batches(val_loader, "train", epoch=epoch, name="val_loader")
                self.model.eval()
                accuracy = evaluate_with(self.forward, self.model, batches, "train")
            self.good.take()
            if accuracy is not None and (
                self.best_accuracy is None or accuracy.top1 > self.best_accuracy
            ):
                self.best = Snapshot(self.plain) if self.best is None else self.best.take()
                self.best_accuracy, self.best_epoch = accuracy.top1, epoch + 1
            return accuracy
        finally:
            if self.average is not None:
                self.average.swap()

    def _state(self) -> dict[str, Any]:
        return {
            name: value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value
            for name, value in self.plain.state_dict().items()
        }


class _StepLog:
    """Losses and hits of one epoch, left on the device until somebody reads them."""

    def __init__(self, forward: Forward, first_step: int) -> None:
        self.pending = 0
        self._values = torch.zeros(2, READ_EVERY, device=forward.device, dtype=forward.sum_dtype)
        self._sizes: list[int] = []
        self._sums = [0.0, 0.0]
        self._images = 0
        self._step = first_step

    def add(self, loss: Tensor, hits: Tensor, num_images: int) -> None:
        """Notes the mean loss and the number of right answers of a step."""
        self._values[0, self.pending] = loss
        self._values[1, self.pending] = hits
        self._sizes.append(num_images)
        self.pending += 1

    def read(self) -> None:
        """Waits for the device and raises at the first loss that is not finite."""
        losses, hits = self._values[:, : self.pending].tolist()
        self.pending = 0
        for loss, hit, size in zip(losses, hits, self._sizes, strict=True):
            self._step += 1
            if not math.isfinite(loss):
                raise _non_finite(self._step, loss)
            self._sums[0] += loss * size
            self._sums[1] += hit
            self._images += size
        self._sizes.clear()

    def loss(self) -> float:
        """Mean loss per image of the epoch so far."""
        self.read()
        return self._sums[0] / max(self._images, 1)

    def accuracy(self) -> float:
        """Share of right answers of the epoch so far."""
        self.read()
        return self._sums[1] / max(self._images, 1)


def _non_finite(step: int, value: float, what: str = "loss") -> NonFiniteLossError:
    return NonFiniteLossError(
        f"train: {what} must stay finite, got {value} at step {step}; the model is back at its last complete epoch. Try a lower "
        "lr, amp='off' or 'bf16' in place of 'fp16', normalise the images, and look for NaN in them"
    )


def _set_epoch(loader: Loader, epoch: int) -> None:
    for part in (loader, getattr(loader, "sampler", None), getattr(loader, "batch_sampler", None)):
        if hasattr(part, "set_epoch"):
            with callers_settings():
                part.set_epoch(epoch)
