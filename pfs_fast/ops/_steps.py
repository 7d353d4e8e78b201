"""The step of the gates."""

from __future__ import annotations

import torch
from torch import Tensor

from pfs_fast._library import require_ops


def gate_step_(
    gates: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    died_at: Tensor,
    *,
    lr: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    gamma: float,
    target: float,
    num_gates: int | None = None,
) -> None:
    """One optimiser step on all gates at once, in place.

    In this order: ``step += 1``; add the gradient of the regulariser ``gamma * (m - target)^2``
    with ``m = sum |gates| / num_gates``, which is ``2 * gamma * (m - target) / num_gates *
    sign(gates)``; one step of Adam as ``torch.optim.Adam`` does it, without decay; clamp to [0, 1];
    note in ``died_at`` the step at which a gate became 0. A NaN gradient makes a NaN gate, so that
    the caller sees it. On CUDA nothing waits for the device.

    Args:
        gates: Gates, changed in place. [G], float32 or float64, contiguous.
        grad: Gradient of the classification loss alone. [G], dtype of gates.
        exp_avg: Adam's first moment, changed in place. [G], dtype of gates, contiguous.
        exp_avg_sq: Adam's second moment, changed in place. [G], dtype of gates, contiguous.
        step: Steps taken so far, changed in place. [1], int64, on the device of gates.
        died_at: Step at which each gate became 0, -1 where it is above 0; changed in place. [G],
            int32, contiguous.
        lr: Learning rate.
        betas: Adam's decay rates, in [0, 1).
        eps: Adam's term in the denominator.
        gamma: Weight of the regulariser.
        target: Wanted mean of the gates (r in the paper).
        num_gates: Gates over which the regulariser takes its mean; default G. Larger where gates at
            0 were removed.

    Raises:
        ValueError: A shape, device or option does not fit.
        TypeError: A dtype does not fit.
        BackendError: The compiled operators are missing.
    """
    require_ops()
    if num_gates is None:
        num_gates = gates.numel()
    torch.ops.pfs_fast.gate_step_(
        gates, grad, exp_avg, exp_avg_sq, step, died_at, lr, *betas, eps, gamma, target, num_gates
    )
