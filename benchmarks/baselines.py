"""The gate search as plain PyTorch does it: what the library's own step is measured against.

- naive: the published way: batch norm, multiply by the gate, float32, contiguous, every weight with a gradient that nobody uses;
- folded: the best eager PyTorch: weights frozen, the gate folded into the affine of batch norm, channels_last, convolutions in the
  dtype that the device computes natively, all gates in one tensor that one fused Adam steps;
- compiled: forward and backward of ``folded`` under ``torch.compile(mode="max-autotune")``, with its CUDA graphs;
- cudnn: ``folded`` over cuDNN's fused norm, add and ReLU. Not written: ``cudnn_reason`` says what is missing here.

All train the gates by ``torch.optim.Adam`` on cross-entropy plus the paper's penalty, and clamp after every step.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedNorm(nn.Module):
    """A batch norm with batch statistics and a gate per channel, either way of writing it."""

    def __init__(self, bn: nn.BatchNorm2d, gate: nn.Parameter, folded: bool) -> None:
        super().__init__()
        self.bn, self.gate, self.folded = bn, gate, folded

    def forward(self, x: Tensor) -> Tensor:
        bn = self.bn
        if self.folded:
            weight, bias = self.gate * bn.weight, self.gate * bn.bias
            return F.batch_norm(x, None, None, weight, bias, training=True, eps=bn.eps)
        return bn(x) * self.gate.view(1, -1, 1, 1).to(x.dtype)


class PlainSearch:
    """One model with gates after the named batch norms, and its step.

    Args:
        model: Copied, not changed.
        norms: Qualified names of the batch norms that are gated.
        folded: Gates folded into batch norm; else multiplied.
        frozen: Weights without gradients.
        channels_last: Layout of images and weights.
        dtype: Of convolutions and activations.
        device: Where to run.
        gamma: Weight of the penalty.
        target: Mean gate aimed at.

    Attributes:
        network: The gated copy.
        flat: All gates, in the order of ``norms``. Steps write into it.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: Iterable[str],
        *,
        folded: bool,
        frozen: bool,
        channels_last: bool,
        dtype: torch.dtype,
        device: torch.device,
        gamma: float = 0.5,
        target: float = 0.5,
    ) -> None:
        self.network = copy.deepcopy(model).to(device).train()
        self.dtype, self.gamma, self.target = dtype, gamma, target
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.network.to(memory_format=self.layout)
        for module in self.network.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)) or dtype == torch.float64:
                module.to(dtype)
            if folded and isinstance(module, nn.BatchNorm2d):
                # Running statistics are of no use to a search.
                module.running_mean = module.running_var = module.num_batches_tracked = None
        if frozen:
            self.network.requires_grad_(False)
        bns = {name: self.network.get_submodule(name) for name in norms}
        sizes = [bn.num_features for bn in bns.values()]
        accumulate = torch.float64 if dtype == torch.float64 else torch.float32
        self.flat = torch.ones(sum(sizes), dtype=accumulate, device=device)
        self.flat.grad = torch.zeros_like(self.flat)
        self.gates = [nn.Parameter(piece) for piece in self.flat.split(sizes)]
        for gate, grad in zip(self.gates, self.flat.grad.split(sizes), strict=True):
            gate.grad = grad
        for (name, bn), gate in zip(bns.items(), self.gates, strict=True):
            parent = self.network.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], GatedNorm(bn, gate, folded))
        self.adam: torch.optim.Optimizer
        if folded:
            self.adam = torch.optim.Adam([self.flat], lr=0.01, fused=True)
        else:
            self.adam = torch.optim.Adam(self.gates, lr=0.01)
        self._stepped = [self.flat] if folded else self.gates
        self.loss = self._loss

    @classmethod
    def naive(cls, model: nn.Module, norms: Iterable[str], **options: object) -> PlainSearch:
        """The published way; ``options``: device, gamma, target."""
        settings = {"folded": False, "frozen": False, "channels_last": False}
        return cls(model, norms, **{**settings, "dtype": torch.float32, **options})

    @classmethod
    def best(cls, model: nn.Module, norms: Iterable[str], **options: object) -> PlainSearch:
        """The best eager PyTorch; ``options``: dtype, device, gamma, target."""
        return cls(model, norms, folded=True, frozen=True, channels_last=True, **options)

    def compile(self) -> None:
        """Compiles forward and backward."""
        self.loss = torch.compile(self._loss, mode="max-autotune", dynamic=False)

    def place(self, images: Tensor) -> Tensor:
        """Images as the step wants them."""
        return images.to(self.dtype, memory_format=self.layout)

    def _loss(self, images: Tensor, labels: Tensor) -> Tensor:
        logits = self.network(images)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        mean_gate = torch.cat([gate.abs() for gate in self.gates]).mean()
        return F.cross_entropy(logits, labels) + self.gamma * (mean_gate - self.target) ** 2

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One whole step."""
        self.flat.grad.zero_()
        self.loss(images, labels).backward()
        self.adam.step()
        with torch.no_grad():
            for gates in self._stepped:
                gates.clamp_(0, 1)


def cudnn_reason(device: torch.device) -> str:
    """Why the baseline over cuDNN's fused NormAddRelu does not run."""
    if device.type != "cuda":
        return "cuDNN's fused norm needs a CUDA device"
    if importlib.util.find_spec("cudnn") is None:
        return "the package nvidia-cudnn-frontend is not installed"
    return "supported here, but the baseline has not been written: it could not be tried yet"


def compiled_reason(device: torch.device, wanted: bool) -> str | None:
    """Why the compiled baseline does not run; None where it does."""
    if wanted:
        return None
    if device.type == "cuda":
        return "switched off with --compile no"
    return "slower than eager on the CPU, and minutes to compile; --compile yes runs it"
