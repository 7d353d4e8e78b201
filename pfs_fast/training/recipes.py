"""Training recipes of the paper's networks: what a run is, before anything runs."""

from __future__ import annotations

import math
import numbers
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import ConfigError

SCHEDULES = ("multistep", "cosine", "constant")
AMP_MODES = ("off", "tf32", "bf16", "fp16", "auto")


def scratch_b_epochs(epochs: int, share: float) -> int:
    """Epochs of Scratch-B: the slim network gets the full network's total computation.

    Liu et al., "Rethinking the Value of Network Pruning" (2019): ``floor(epochs / share)``.

    Args:
        epochs: Epochs of the full network.
        share: MACs of the slim network divided by those of the full one, in (0, 1].

    Example:
        >>> scratch_b_epochs(160, 0.5)
        320
    """
    _check_integer("epochs", epochs, 1, "scratch_b_epochs")
    _check_share("share", share, epochs, "scratch_b_epochs")
    return math.floor(epochs / share + 1e-9)  # 150 / 0.3 shall not lose an epoch to rounding


@dataclass(frozen=True)
class TrainConfig:
    """How to train. The defaults are the paper's CIFAR recipe (official code, ``train_pruned.py``), Scratch-E.

    SGD with momentum, batch size as the loader gives it (paper: 128), learning rate x0.1 at 50 % and 75 % of the epochs.
    """

    epochs: int = 160
    """Epochs of the full network's recipe."""
    lr: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False
    weight_decay: float = 1e-4
    decay_bn_bias: bool = True
    """False: no weight decay on batch norm, biases and depthwise convolutions (the ImageNet recipes)."""
    schedule: str = "multistep"
    """"multistep", "cosine" (to 0) or "constant"; the rate changes between epochs only."""
    milestones: tuple[float, ...] = (0.5, 0.75)
    """Shares of all epochs after which "multistep" multiplies the rate by ``lr_decay``."""
    lr_decay: float = 0.1
    label_smoothing: float = 0.0
    ema: float | None = None
    """Decay per step of an exponential moving average of weights and statistics, such as 0.9999; the average is what is
    evaluated, kept and left in the model. It starts faster: ``min(ema, (1 + step) / (10 + step))``."""
    amp: str = "off"
    """Autocast: "off", "bf16", "fp16" (with loss scaling), or "auto": bf16 where the device computes it natively, else
    fp16 on CUDA and off on the CPU. "tf32": no autocast, and float32 products of ten bits, on CUDA alone; with "off" they
    are those of float32, whatever PyTorch's settings say."""
    channels_last: bool = True
    """Memory layout of 4-d weights and images; the result is the same up to rounding."""
    budget_training: float | None = None
    """Share of the MACs that the slim network keeps: trains ``floor(epochs / share)`` epochs (Scratch-B)."""
    max_epochs: int | None = None
    """Upper bound of the epochs, after Scratch-B; the schedule is spread over what remains."""
    eval_every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    restore: str = "last"
    """"last" or "best": the state that the model has at the end (the paper uses the last)."""
    seed: int | None = 0
    """Seed of everything that draws from PyTorch's global generator during training (dropout, a DataLoader's shuffling); the
    caller's generator state is put back afterwards. None: use the generator as it is."""

    def __post_init__(self) -> None:
        _check_integer("epochs", self.epochs, 1)
        _check_integer("eval_every", self.eval_every, 1)
        if self.max_epochs is not None:
            _check_integer("max_epochs", self.max_epochs, 1)
        _check_range("lr", self.lr, 0, math.inf)
        _check_range("momentum", self.momentum, 0, 1)
        _check_range("weight_decay", self.weight_decay, 0, math.inf)
        _check_range("lr_decay", self.lr_decay, 0, math.inf)
        _check_range("label_smoothing", self.label_smoothing, 0, 1)
        if not isinstance(self.milestones, tuple | list):
            raise ConfigError(
                f"TrainConfig: milestones must be a tuple of shares of the epochs, got {self.milestones!r}; write e.g. (0.5, 0.75)"
            )
        for share in self.milestones:
            _check_range("milestones", share, 0, 1)
        if self.ema is not None:
            _check_range("ema", self.ema, 0, 1)
        for name in ("nesterov", "decay_bn_bias", "channels_last"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"TrainConfig: {name} must be True or False, got {getattr(self, name)!r}"
                )
        if self.seed is not None:
            whole = isinstance(self.seed, int) and not isinstance(self.seed, bool)
            if not whole or not 0 <= self.seed < 2**64:
                got = "another number" if whole else repr(self.seed)
                raise ConfigError(
                    f"TrainConfig: seed must be None or a whole number from 0 to 2**64 - 1, got {got}"
                )
        if self.nesterov and self.momentum == 0:
            raise ConfigError("TrainConfig: nesterov must come with a momentum above 0, got 0")
        _check_choice("schedule", self.schedule, SCHEDULES)
        _check_choice("amp", self.amp, AMP_MODES)
        _check_choice("restore", self.restore, ("last", "best"))
        if self.budget_training is not None:
            _check_share("budget_training as a share", self.budget_training, self.epochs)

    @property
    def total_epochs(self) -> int:
        """Epochs that a run takes, after Scratch-B and ``max_epochs``."""
        epochs = self.epochs
        if self.budget_training is not None:
            epochs = scratch_b_epochs(epochs, self.budget_training)
        return epochs if self.max_epochs is None else min(epochs, self.max_epochs)

    def lr_at(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0."""
        total = self.total_epochs
        if self.schedule == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * epoch / total))
        if self.schedule == "multistep":
            # A run of few epochs starts at the full rate, too.
            ends = (max(int(total * share + 1e-9), share > 0) for share in self.milestones)
            passed = sum(epoch >= end for end in ends)
            return self.lr * self.lr_decay**passed
        return self.lr

    @classmethod
    def cifar(cls, **changes: Any) -> TrainConfig:
        """The paper's CIFAR recipe (batch 128); the same as the defaults."""
        return cls(**changes)

    @classmethod
    def imagenet_resnet50(
        cls, batch: int = 256, *, scratch_b: bool = False, **changes: Any
    ) -> TrainConfig:
        """ResNet-50 on ImageNet as the official code trains it: 150 epochs, x0.1 at 30, 60 and 90 %.

        Args:
            batch: Images per step over all processes; the rate is 0.05 * batch / 256.
            scratch_b: 200 epochs, the official code's fixed length of budget training, whatever the share.
            changes: Any other field.
        """
        recipe = {"schedule": "multistep", "milestones": (0.3, 0.6, 0.9)}
        return cls._imagenet(batch, 200 if scratch_b else 150, recipe | changes)

    @classmethod
    def imagenet_mobilenet(
        cls, batch: int = 256, *, scratch_b: bool = False, **changes: Any
    ) -> TrainConfig:
        """MobileNet V1 and V2 on ImageNet as the official code trains them: 150 epochs, cosine.

        Args:
            batch: Images per step over all processes; the rate is 0.05 * batch / 256.
            scratch_b: 300 epochs, the official code's fixed length of budget training, whatever the share.
            changes: Any other field.
        """
        return cls._imagenet(batch, 300 if scratch_b else 150, {"schedule": "cosine"} | changes)

    @classmethod
    def _imagenet(cls, batch: int, epochs: int, changes: dict[str, Any]) -> TrainConfig:
        _check_integer("batch", batch, 1)
        recipe: dict[str, Any] = {
            "epochs": epochs,
            "lr": 0.05 * batch / 256,
            "nesterov": True,
            "weight_decay": 4e-5,
            "decay_bn_bias": False,
        }
        return cls(**(recipe | changes))


def autocast_dtype(amp: str, device: torch.device, caller: str = "train") -> torch.dtype | None:
    """The dtype that ``amp`` means on a device, None for no autocast.

    Raises:
        ConfigError: ``"tf32"`` on another device than CUDA.
    """
    if amp == "tf32" and device.type != "cuda":
        raise ConfigError(f"{caller}: amp 'tf32' needs a CUDA device, got {device.type}; use 'off'")
    if amp == "auto":
        if device.type == "cuda":
            native = torch.cuda.get_device_capability(device) >= (8, 0)
            return torch.bfloat16 if native else torch.float16
        native = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
        return torch.bfloat16 if native else None
    return {"off": None, "tf32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[amp]


def float32_products(amp: str) -> str | None:
    """What ``amp`` means for `cuda_settings`: the caller's own settings where autocast decides."""
    return {"off": "ieee", "tf32": "tf32"}.get(amp)


def _check_integer(name: str, value: Any, least: int, caller: str = "TrainConfig") -> None:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if not whole or not least <= value < 2**63:
        got = "more than 2**63" if whole and value > least else repr(value)
        raise ConfigError(f"{caller}: {name} must be an integer of at least {least}, got {got}")


def _check_share(name: str, share: Any, epochs: int, caller: str = "TrainConfig") -> None:
    real = isinstance(share, numbers.Real) and not isinstance(share, bool)
    if not real or not 0 < share <= 1 or not epochs / share < 2**63:
        raise ConfigError(
            f"{caller}: {name} must be in (0, 1] and large enough for 2**63 epochs, got {share!r}"
        )


def _check_range(name: str, value: Any, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not low <= value <= min(high, sys.float_info.max):
        got = "a number beyond float64" if number and value > sys.float_info.max else repr(value)
        raise ConfigError(
            f"TrainConfig: {name} must be a finite number in [{low}, {high}], got {got}"
        )


def _check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"TrainConfig: {name} must be one of {', '.join(choices)}, got {value!r}")
