"""What the propagation collects: everything that decides units and groups."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

from .values import NONE


@dataclass
class LayerUse:
    """What the propagation saw of one layer."""

    out: np.ndarray
    inputs: np.ndarray
    positions: int = 0  # output positions of one image, summed over calls in eval mode
    depthwise: bool = False


@dataclass
class Constraints:
    """Everything that decides units and groups.

    Attributes:
        num_labels: Labels given out so far, ``NONE`` included.
        pairs: Labels that live and die together, entry by entry.
        ties: The same, between parts of one axis of which the same number must stay.
        fixed: Labels that are held whole, with the reason.
        residual: Labels that join a residual sum.
        layers: Every layer that is called.
        producers: Labels of the output channels of every convolution and linear layer.
        scales: Labels of every parameter that the forward itself multiplies channels by.
    """

    num_labels: int = 1
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    ties: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    residual: list[np.ndarray] = field(default_factory=list)
    layers: dict[str, LayerUse] = field(default_factory=dict)
    producers: dict[str, np.ndarray] = field(default_factory=dict)
    scales: dict[str, np.ndarray] = field(default_factory=dict)

    def couple(self, a: np.ndarray, b: np.ndarray) -> None:
        """The channels of both live and die together, entry by entry."""
        if a is not b:
            self.pairs.append((a, b))
        # A channel that is joined with a fixed one is fixed.
        for labels, other in ((a, b), (b, a)):
            stuck = labels[(other == NONE) & (labels != NONE)]
            if len(stuck):
                self.fix(stuck, "it is joined with channels that are not of a prunable layer")

    def tie(self, rows: Iterable[np.ndarray]) -> None:
        """The same positions must stay in every row."""
        first, *others = rows
        self.ties += [(first, row) for row in others]

    def fix(self, labels: np.ndarray, reason: str) -> None:
        self.fixed.append((labels[labels != NONE], reason))

    def new_labels(self, name: str, size: int) -> np.ndarray:
        """Labels of the output channels of a producer that is met for the first time."""
        self.producers[name] = labels = self._fresh(size)
        return labels

    def scale_labels(self, name: str, size: int) -> np.ndarray:
        """Labels of a parameter that scales channels, which are those of the channels that it meets."""
        if name not in self.scales:
            self.scales[name] = labels = self._fresh(size)
            self.layers[name] = LayerUse(labels, labels)
        return self.scales[name]

    def is_scale(self, labels: np.ndarray) -> bool:
        """Whether these are labels of a parameter."""
        return any(np.isin(labels, own).any() for own in self.scales.values())

    def _fresh(self, size: int) -> np.ndarray:
        labels = np.arange(self.num_labels, self.num_labels + size)
        self.num_labels += size
        return labels
