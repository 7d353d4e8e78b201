"""Follow every channel through a traced graph.

Each output channel of a convolution or linear layer gets a *label*, an integer; operations move labels, couple them
(a residual sum: both operands' channels live and die together) or stop them (a layer that mixes channels, an operation
that is not understood). Label 0 stands for "no channel of ours". Coupling is collected here and resolved in ``analysis``.

``table`` says which rule follows which operation; the rules are in ``layers``, ``pointwise``, ``joins`` and ``movement``.
"""

from __future__ import annotations

from .constraints import Constraints, LayerUse
from .values import NONE, Value
from .walk import Propagation

__all__ = ["NONE", "Constraints", "LayerUse", "Propagation", "Value"]
