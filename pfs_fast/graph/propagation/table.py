"""Which rule follows which operation: layers by class, everything else by plain name.

A new operation is one name in a table of ``rules``, or a function from ``Call`` to a ``Value`` entered here. What has no
entry holds the channels that reach it whole.
"""

from __future__ import annotations

from torch import nn

from .. import rules
from ..narrow import CONVOLUTIONS, NORMS
from . import joins, layers, movement, pieces, pointwise, rearrange
from .call import Rule

LAYERS: tuple[tuple[type[nn.Module], Rule], ...] = (
    *((kind, layers.convolution) for kind in CONVOLUTIONS),
    (nn.Linear, layers.linear),
    (nn.GroupNorm, layers.group_norm),
    *((kind, layers.channelwise) for kind in NORMS),
    (nn.PReLU, layers.prelu),
)

OPERATIONS: dict[str, Rule] = {
    **dict.fromkeys(rules.ZERO_PRESERVING, pointwise.zero_preserving),
    **dict.fromkeys(rules.ELEMENTWISE, pointwise.elementwise),
    **dict.fromkeys(rules.BOUNDED, pointwise.bounded),
    **dict.fromkeys(rules.SPATIAL, pointwise.spatial),
    **dict.fromkeys(rules.REDUCTION, pointwise.reduction),
    **dict.fromkeys(rules.SOFTMAX, pointwise.softmax),
    **dict.fromkeys(rules.FACTORY, pointwise.factory),
    **dict.fromkeys(rules.NORMALISING, pointwise.normalising),
    **dict.fromkeys(rules.JOINS, joins.binary),
    **dict.fromkeys(rules.CONCATENATION, joins.concatenation),
    **dict.fromkeys(rules.MOVEMENT, movement.movement),
    **dict.fromkeys(rules.PIECES, pieces.pieces),
    "prelu": pointwise.prelu,
    "pad": pointwise.pad,
    "stack": joins.stack,
    "expand_as": joins.expand_as,
    "index_select": pieces.index_select,
    "glu": rearrange.glu,
    **dict.fromkeys(("pixelshuffle", "pixel_shuffle"), rearrange.pixel_shuffle),
    **dict.fromkeys(("pixelunshuffle", "pixel_unshuffle"), rearrange.pixel_unshuffle),
    **dict.fromkeys(rules.CHANNEL_SHUFFLE, rearrange.channel_shuffle),
}


def layer_rule(module: nn.Module | None) -> Rule | None:
    return next((rule for kind, rule in LAYERS if isinstance(module, kind)), None)
