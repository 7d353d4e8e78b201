"""The fused operators, usable alone: ``bn_gate_act``, ``frozen_conv``, ``frozen_conv_branch``,
``winograd_conv``, ``conv_bn_gate_act``, ``conv_bn_gate_act_branch``, ``recomputed_bn_gate_act``,
``recomputed_conv_bn_gate_act``, ``max_pool`` and ``gate_step_``.

Each has a twin of the same name and signature in :mod:`pfs_fast.ops.reference`, in plain PyTorch.
The functions here run the compiled kernels and nothing else: without them the first call raises
:class:`pfs_fast.errors.BackendError`. Importing this module never fails for want of a compiler.
"""

from __future__ import annotations

from pfs_fast.ops import _registration as _registration
from pfs_fast.ops._convs import frozen_conv, frozen_conv_branch, winograd_conv
from pfs_fast.ops._norms import (
    bn_gate_act,
    conv_bn_gate_act,
    conv_bn_gate_act_branch,
    recomputed_bn_gate_act,
    recomputed_conv_bn_gate_act,
)
from pfs_fast.ops._pools import max_pool
from pfs_fast.ops._steps import gate_step_

__all__ = [
    "bn_gate_act",
    "conv_bn_gate_act",
    "conv_bn_gate_act_branch",
    "frozen_conv",
    "frozen_conv_branch",
    "gate_step_",
    "max_pool",
    "recomputed_bn_gate_act",
    "recomputed_conv_bn_gate_act",
    "winograd_conv",
]
