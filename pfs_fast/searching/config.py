"""Options of a search, with the paper's defaults."""

from __future__ import annotations

import math
import numbers
import sys
from dataclasses import dataclass
from typing import Any

import torch

from ..budgets.ranking import RANKINGS
from ..errors import ConfigError

PRECISIONS = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


@dataclass(frozen=True)
class SearchConfig:
    """How the gates are trained. The defaults are the paper's for CIFAR-10.

    Attributes:
        epochs: Passes over the loader.
        max_steps: Stop after this many steps, also within an epoch; None: no such limit.
        patience: Stop, also within an epoch, once the answer has not changed for this many steps: neither the structure for
            the budget nor the order of all gates by more than ``tolerance``. None: go on to the end. A gate can cross [0, 1] in
            1 / ``lr`` steps; fewer than that say little.
        tolerance: Change that counts as none, in [0, 1]: share of channels that only one structure keeps; 1 - rank correlation
            of the gates (``pfs_fast.searching.stability.Change``). Adam's steps do not get smaller, so that gates around the threshold
            change places for good: below about 0.08 a search may never end early.
        lr: Adam's learning rate, constant; no decay of any kind.
        betas: Adam's decay rates.
        eps: Adam's epsilon.
        gamma: Weight of the term that pulls the mean gate to ``target`` (0.05 for ImageNet).
        target: r, the mean gate aimed at, in (0, 1]. None: the budget's share.
        gate_init: Value of every gate at the start, in (0, 1].
        scope: ``"paper"``: gates where the paper has them, residual streams whole. ``"all"``: every prunable group.
        ranking: In which order channels enter the structure. ``"gates"``: the largest gates of the whole network first, the
            paper's rule. ``"layerwise"``: every group a share of its channels by its place in the network and its cost, and
            within it the largest gates. ``"uniform"``: every group the same share. ``"auto"``: ``"layerwise"`` with
            ``scope="all"``, where it was measured (``docs/ranking.md``), else ``"gates"``.
        precision: Of convolutions and activations: ``"fp64"``, ``"fp32"``, ``"bf16"``, ``"fp16"``; ``"auto"``: bf16 where
            the device computes it natively, else fp32. ``"tf32"``: float32 whose products have ten bits, on CUDA alone;
            ``"fp32"`` never has, whatever PyTorch's settings say. Statistics and gates are float32 at least.
        backend: ``"fused"``: the compiled operators. ``"reference"``: plain PyTorch. ``"auto"``: fused; an error, not a
            fallback, where they are missing.
        compact: Allow channels whose gate is absorbed at 0 to be left out of the computation while searching. No value changes
            but by rounding, which is 3e-14 in fp64. In fp32 and bf16 it grows with the steps: 10 to 15 % of the kept channels
            differed with it in short searches (VGG-16 and ResNet-20, 180 steps, lr 0.1).
        select: ``"last"``: gates after the last step. ``"best"``: those of the epoch with the best validation accuracy
            among epochs with a share of non-zero gates of ``target`` at most, else the last (the official code's rule);
            needs ``val_loader``.
        cuda_graph: Capture the whole step in a CUDA graph and replay it; with a ``DeviceLoader`` several steps at once, the
            making of batches included. A step that cannot be captured is reported and taken without; networks that ``cpu_graph``
            never records are never captured. No effect on the CPU. Not run on a GPU yet.
        cpu_graph: Record the operators of a step once and replay them without Python and autograd. The gates are the same. A
            step that cannot be recorded is reported and taken without; networks with hooks, or with functions that were not
            traced, are never recorded, since their Python must run in every step. No effect on CUDA.
        channels_last: Lay out images and weights channels_last.
        winograd: Run 3x3 convolutions by Winograd's minimal filtering where that is faster: float32, and bf16 but on processors with AMX, on
            the CPU, channels_last, fused backend; without effect elsewhere. Same sums, rounded otherwise: relative error of a
            layer in float32 up to 3e-6 against 1e-6 of a direct convolution. ``False``: PyTorch's own convolutions.
        seed: Of everything random inside the search (dropout, a shuffling DataLoader).
        log_every: Steps between two entries of the history.
    """

    epochs: int = 10
    max_steps: int | None = None
    patience: int | None = None
    tolerance: float = 0.1
    lr: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    gamma: float = 0.5
    target: float | None = None
    gate_init: float = 1.0
    scope: str = "paper"
    ranking: str = "auto"
    precision: str = "auto"
    backend: str = "auto"
    compact: bool = True
    select: str = "last"
    cuda_graph: bool = True
    cpu_graph: bool = True
    channels_last: bool = True
    winograd: bool = True
    seed: int = 0
    log_every: int = 50

    def __post_init__(self) -> None:
        for name in ("epochs", "log_every"):
            _integer(name, getattr(self, name), 1)
        _integer("seed", self.seed, 0, bits=64)
        for name in ("max_steps", "patience"):
            _integer(name, getattr(self, name), 1, optional=True)
        _number("tolerance", self.tolerance, least=0, most=1)
        _number("lr", self.lr, above=0)
        _number("eps", self.eps, above=0)
        _number("gamma", self.gamma, least=0)
        _number("gate_init", self.gate_init, above=0, most=1)
        if self.target is not None:
            _number("target", self.target, above=0, most=1)
        if not isinstance(self.betas, tuple | list) or len(self.betas) != 2:
            raise ConfigError(
                f"SearchConfig: betas must be two numbers, got {self.betas!r}; Adam's default is (0.9, 0.999)"
            )
        for beta in self.betas:
            _number("betas", beta, least=0, below=1)
        object.__setattr__(self, "betas", tuple(self.betas))  # JSON gives a list back
        for name in ("compact", "cuda_graph", "cpu_graph", "channels_last", "winograd"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(
                    f"SearchConfig: {name} must be True or False, got {getattr(self, name)!r}"
                )
        _choice("scope", self.scope, ("paper", "all"))
        _choice("ranking", self.ranking, ("auto", *RANKINGS))
        _choice("precision", self.precision, ("auto", *PRECISIONS))
        _choice("backend", self.backend, ("auto", "fused", "reference"))
        _choice("select", self.select, ("last", "best"))

    @property
    def ranks_by(self) -> str:
        """``ranking`` with ``"auto"`` resolved."""
        if self.ranking != "auto":
            return self.ranking
        return "layerwise" if self.scope == "all" else "gates"

    @classmethod
    def imagenet(cls, **changes: Any) -> SearchConfig:
        """The paper's ImageNet defaults: one pass (batches of 100 images), gamma 0.05."""
        return cls(**{"epochs": 1, "gamma": 0.05, **changes})


def compute_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype that ``precision`` means on a device.

    Raises:
        ConfigError: ``"fp16"`` on the CPU, whose convolutions would be emulated, or ``"tf32"``, which it has not.
    """
    if precision != "auto":
        if precision == "fp16" and device.type == "cpu":
            raise ConfigError(
                "SearchConfig: precision 'fp16' needs a CUDA device, got cpu; use 'bf16' or 'fp32'"
            )
        if precision == "tf32" and device.type == "cpu":
            raise ConfigError(
                "SearchConfig: precision 'tf32' needs a CUDA device, got cpu; use 'fp32'"
            )
        return PRECISIONS[precision]
    if device.type == "cuda":
        native = torch.cuda.get_device_capability(device)[0] >= 8
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else torch.float32


def _integer(name: str, value: Any, low: int, optional: bool = False, bits: int = 63) -> None:
    if value is None and optional:
        return
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or value < low:
        raise ConfigError(
            f"SearchConfig: {name} must be a whole number of at least {low}, got {value!r}"
        )
    if value >= 2**bits:
        raise ConfigError(
            f"SearchConfig: {name} must be a whole number of at most 2**{bits} - 1, got more; lower it"
        )


def _number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    least: float | None = None,
    below: float | None = None,
    most: float | None = None,
) -> None:
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    try:
        good = real and math.isfinite(value)
    except OverflowError:  # an integer beyond them
        good = False
    rules = [
        (above, "above", ">"),
        (least, "at least", ">="),
        (below, "below", "<"),
        (most, "at most", "<="),
    ]
    compare = {">": float.__gt__, ">=": float.__ge__, "<": float.__lt__, "<=": float.__le__}
    for bound, _, sign in rules:
        good = good and (bound is None or compare[sign](float(value), float(bound)))
    if not good:
        rule = " and ".join(f"{word} {bound:g}" for bound, word, _ in rules if bound is not None)
        huge = isinstance(value, int) and abs(value) > sys.float_info.max
        got = "a number beyond float64" if huge else repr(value)
        raise ConfigError(f"SearchConfig: {name} must be a finite number {rule}, got {got}")


def _choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(
            f"SearchConfig: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )
