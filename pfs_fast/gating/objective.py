"""The paper's objective: cross-entropy plus a pull of the mean gate towards a target share.

    CE(f(x; gates), y) + gamma * (sum_j |gate_j| / num_gates - r)^2

One global term over all gates of the network, two-sided: below ``r`` it pushes gates up ("Pruning from Scratch",
arXiv 1909.12579).
"""

from __future__ import annotations

import torch
from torch import Tensor


def sparsity_penalty(
    gates: Tensor, gamma: float, target: float, num_gates: int | None = None
) -> Tensor:
    """``gamma * (mean |gate| - target)^2``.

    Args:
        gates: All gates. [G], floating point.
        gamma: Weight of the term.
        target: r, the share that the mean gate is pulled to, in (0, 1].
        num_gates: Number that the mean divides by; more than G where gates at 0 have been left out. Default G.

    Returns:
        Scalar, dtype of ``gates``. Its gradient is what ``ops.gate_step_`` adds to that of the cross-entropy.
    """
    return gamma * (gates.abs().sum() / (num_gates or gates.numel()) - target).square()


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy in at least float32. ``logits`` [N, K]; ``labels`` [N] int64 or [N, K] probabilities."""
    return torch.nn.functional.cross_entropy(
        logits if logits.dtype == torch.float64 else logits.float(), labels
    )
