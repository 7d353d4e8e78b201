"""The gate search as plain PyTorch does it: what the library's own step is measured against.

- naive: the published way: batch norm, multiply by the gate, float32, contiguous, every weight with a gradient that nobody uses;
- folded: the best eager PyTorch: weights frozen, the gate folded into the affine of batch norm, channels_last, and the
  convolutions in the dtype that the device computes natively.

Both train the gates by ``torch.optim.Adam`` on cross-entropy plus the paper's penalty, and clamp after every step.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GatedNorm(nn.Module):
    """A batch norm with batch statistics and a gate per channel, either way of writing it."""

    def __init__(self, bn: nn.BatchNorm2d, folded: bool) -> None:
        super().__init__()
        self.bn, self.folded = bn, folded
        self.gate = nn.Parameter(torch.ones(bn.num_features, device=bn.weight.device))

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
        folded: The folded variant instead of the naive one.
        dtype: Of convolutions and activations.
        device: Where to run.
        gamma: Weight of the penalty.
        target: Mean gate aimed at.
    """

    def __init__(
        self,
        model: nn.Module,
        norms: Iterable[str],
        *,
        folded: bool,
        dtype: torch.dtype,
        device: torch.device,
        gamma: float = 0.5,
        target: float = 0.5,
    ) -> None:
        self.network = copy.deepcopy(model).to(device).train()
        self.dtype, self.gamma, self.target = dtype, gamma, target
        self.layout = torch.channels_last if folded else torch.contiguous_format
        if folded:
            self.network.requires_grad_(False).to(memory_format=torch.channels_last)
            for module in self.network.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(dtype)
        for name in norms:
            parent = self.network.get_submodule(name.rpartition(".")[0])
            bn = getattr(parent, name.rpartition(".")[2])
            setattr(parent, name.rpartition(".")[2], GatedNorm(bn, folded))
        self.gates = [m.gate for m in self.network.modules() if isinstance(m, GatedNorm)]
        self.count = sum(gate.numel() for gate in self.gates)
        self.adam = torch.optim.Adam(self.gates, lr=0.01)

    def place(self, images: Tensor) -> Tensor:
        """Images as the step wants them."""
        return images.to(self.dtype, memory_format=self.layout)

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        logits = self.network(images).float()
        penalty = (sum(gate.abs().sum() for gate in self.gates) / self.count - self.target) ** 2
        return F.cross_entropy(logits, labels) + self.gamma * penalty

    @torch.no_grad()
    def update(self) -> None:
        """Optimiser step and projection."""
        self.adam.step()
        for gate in self.gates:
            gate.clamp_(0, 1)

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One whole step."""
        self.adam.zero_grad()
        self.forward(images, labels).backward()
        self.update()
