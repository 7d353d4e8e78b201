"""The gates: one flat vector that the optimiser steps, seen by the network as one vector per site."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..graph.groups import ChannelGroups
from .scope import Site


@dataclass
class GateState:
    """Everything that a step changes. All tensors are [G] on one device, G the number of gates.

    Attributes:
        values: Gates in [0, 1]; float32, or float64 for ``precision="fp64"``.
        exp_avg: Adam's first moment, dtype of ``values``.
        exp_avg_sq: Adam's second moment.
        step: Steps taken. [1], int64.
        died_at: Step at which a gate reached 0 for good, -1 while it is above 0. int32.
    """

    values: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    died_at: Tensor

    @classmethod
    def create(
        cls, num_gates: int, init: float, dtype: torch.dtype, device: torch.device
    ) -> GateState:
        return cls(
            values=torch.full((num_gates,), init, dtype=dtype, device=device),
            exp_avg=torch.zeros(num_gates, dtype=dtype, device=device),
            exp_avg_sq=torch.zeros(num_gates, dtype=dtype, device=device),
            step=torch.zeros(1, dtype=torch.int64, device=device),
            died_at=torch.full((num_gates,), -1, dtype=torch.int32, device=device),
        )

    def tensors(self) -> dict[str, Tensor]:
        return dict(vars(self))


class GateBank:
    """Leaves of the autograd graph over slices of ``state.values``, one for each group.

    The leaves share the storage of the flat vector and their gradients that of ``grad``: the backward pass adds straight
    into the flat gradient, and one fused step updates everything.
    """

    def __init__(self, groups: ChannelGroups, sites: tuple[Site, ...], state: GateState) -> None:
        self.state = state
        self._one = torch.ones(1, dtype=state.values.dtype, device=state.values.device)
        self.rebuild(groups, sites)

    def rebuild(self, groups: ChannelGroups, sites: tuple[Site, ...]) -> None:
        """New leaves over ``state`` for these groups; the sites are the same layers, perhaps narrower."""
        state = self.state
        self.grad = torch.zeros_like(state.values)
        self._leaves = []
        for group in groups.groups:
            span = slice(group.start, group.start + group.size)
            leaf = state.values[span].detach().requires_grad_()
            leaf.grad = self.grad[span]
            self._leaves.append(leaf)
        self._sites = {site.layer: self._recipe(groups, site) for site in sites}

    def _recipe(self, groups: ChannelGroups, site: Site) -> tuple[list[int], int, Tensor | None]:
        """Groups that a site reads, copies of each value, and the index into the copies of their concatenation (and a final 1).

        One copy for each channel that reads the value: its gradient is then a plain sum over the copies. Were one value read
        several times, a GPU would add its gradients in any order. None in place of the index: a whole group.
        """
        used = [
            i
            for i, g in enumerate(groups.groups)
            if ((site.units >= g.start) & (site.units < g.start + g.size)).any()
        ]
        spans = [
            np.arange(groups.groups[i].start, groups.groups[i].start + groups.groups[i].size)
            for i in used
        ]
        units = np.concatenate(spans)
        if len(units) == len(site.units) and np.array_equal(units, site.units) and len(used) == 1:
            return used, 1, None
        position = np.full(
            groups.num_units + 1, len(units), dtype=np.int64
        )  # FIXED = -1 reads the final 1
        position[units] = np.arange(len(units))
        read = position[site.units]
        by_value = np.argsort(read, kind="stable")
        sorted_read = read[by_value]
        copy = np.empty_like(read)
        copy[by_value] = np.arange(len(read)) - np.searchsorted(sorted_read, sorted_read)
        copy[read == len(units)] = 0  # the final 1 gets no gradient
        copies = int(copy.max(initial=0)) + 1
        return used, copies, torch.from_numpy(read * copies + copy).to(self.state.values.device)

    def vector(self, layer: str) -> Tensor:
        """Gates of a site's channels. [channels]."""
        used, copies, index = self._sites[layer]
        if index is None:
            return self._leaves[used[0]]
        values = torch.cat([*(self._leaves[i] for i in used), self._one])
        if copies > 1:
            values = values.unsqueeze(1).expand(-1, copies).reshape(-1)
        return values.index_select(0, index)

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(self._sites)

    def tensors(self) -> Iterator[Tensor]:
        """All that `rebuild` makes or leaves, the state included."""
        yield from self.state.tensors().values()
        yield from (self.grad, self._one)
        yield from (index for *_, index in self._sites.values() if index is not None)

    def zero_grad(self) -> None:
        self.grad.zero_()


def split_gates(groups: ChannelGroups, flat: Tensor) -> dict[str, Tensor]:
    """A flat vector as one tensor per group, by group name. Copies."""
    return {g.name: flat[g.start : g.start + g.size].clone() for g in groups.groups}
