"""Which rule follows which operation: layers by class, everything else by plain name.

A new operation is one name in a table of ``rules``, or a function from ``Call`` to a ``Value`` entered here. What has no
entry holds the channels that reach it whole.
"""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import rules
from . import joins, layers, movement, pieces, pointwise
from .call import Rule

LAYERS: tuple[tuple[type[nn.Module], Rule], ...] = (
    (nn.Conv1d, layers.convolution),
    (nn.Conv2d, layers.convolution),
    (nn.Conv3d, layers.convolution),
    (nn.Linear, layers.linear),
    (_BatchNorm, layers.batch_norm),
)

OPERATIONS: dict[str, Rule] = {
    "prelu": pointwise.prelu,
    "pad": pointwise.pad,
    **dict.fromkeys(rules.ZERO_PRESERVING, pointwise.zero_preserving),
    **dict.fromkeys(rules.ELEMENTWISE, pointwise.elementwise),
    **dict.fromkeys(rules.BOUNDED, pointwise.bounded),
    **dict.fromkeys(rules.SPATIAL, pointwise.spatial),
    **dict.fromkeys(rules.REDUCTION, pointwise.reduction),
    **dict.fromkeys(rules.ADDITIVE | rules.MULTIPLICATIVE | rules.DIVISION, joins.binary),
    **dict.fromkeys(rules.CONCATENATION, joins.concatenation),
    **dict.fromkeys(rules.MOVEMENT, movement.movement),
    **dict.fromkeys(rules.PIECES, pieces.pieces),
    "index_select": pieces.index_select,
}


def layer_rule(module: nn.Module | None) -> Rule | None:
    return next((rule for kind, rule in LAYERS if isinstance(module, kind)), None)
