"""A network with a layer of every kind that can get narrower, and a cut of it."""

from __future__ import annotations

import torch
from torch import nn

from pfs_fast.budgets.structure import Structure


def structure(layers: dict, inputs: dict, widths: dict) -> Structure:
    """A structure by its layers alone; costs do not matter here."""
    return Structure({}, {}, layers, inputs, widths, 1, 1, 2, 2)


class Net(nn.Module):
    """Convolution, batch norm, grouped and depthwise convolutions, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.fc = nn.Linear(24 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(torch.relu(self.bn(self.conv(x))))
        return self.fc(torch.relu(self.depthwise(x)).flatten(1))


CONV = (1, 3, 4, 6)  # two of each group of `grouped`
GROUPED = (0, 2, 5, 6, 9, 10)
DEPTHWISE = tuple(2 * c + i for c in GROUPED for i in range(2))
FC = tuple(4 * c + i for c in DEPTHWISE for i in range(4))
NET = structure(
    {"conv": CONV, "bn": CONV, "grouped": GROUPED, "depthwise": DEPTHWISE},
    {"grouped": CONV, "depthwise": GROUPED, "fc": FC},
    {"conv": (3, 8), "bn": (8, 8), "grouped": (8, 12), "depthwise": (12, 24), "fc": (96, 5)},
)


def broken(**changes: dict) -> Structure:
    tables = {"layers": NET.layers, "inputs": NET.inputs, "widths": NET.widths}
    return structure(**{key: {**table, **changes.get(key, {})} for key, table in tables.items()})
