"""What a case is: a network, the groups it must have, the reasons for what must be held whole."""

from __future__ import annotations

from dataclasses import dataclass, field

from small_nets import conv, head

OUTPUT = "it is an output of the network"
UNCALLED = "the forward computes with its weight instead of calling it"
NOT_ZERO = "a dropped channel would not be 0 where layer"
A, AB = ("a",), ("a", "b")
two = dict(a=conv(3, 6), b=conv(3, 6), fc=head(6))


@dataclass
class Case:
    """A model, the expected ``{producers: size}`` of its groups, and ``{layer: reason}`` of what is held whole."""

    model: object
    groups: dict[tuple[str, ...], int]
    fixed: dict[str, str] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ((1, 3, 6, 6),)
    head: bool = True  # the last layer, "fc.2", is held as the output
    residual: tuple[tuple[str, ...], ...] = ()
    per_unit: dict[tuple[str, ...], int] = field(default_factory=dict)
