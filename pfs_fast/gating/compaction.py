"""Live compaction: leave channels whose gate has been absorbed at 0 out of the running search.

Narrowing is that of ``slim(..., weights="inherit")``, applied to the frozen layers of the search network; gates and optimiser
state are sliced alongside. The gates that remain take exactly the steps that they would have taken.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..budgets.cost import CostModel
from ..graph.groups import FIXED, ChannelGroups
from ..slimming.slim import narrow_layers
from .gated import GatedNetwork
from .gates import GateBank
from .scope import Site
from .widths import WidthRule

MIN_SAVING = 0.02  # share of the MACs below which narrowing is not worth it
# Steps that one narrowing must save: more than it takes, which is 0.4 of ResNet-20's at batch 128 on two cores, and more where
# steps are short. Counted, not timed, since the same seed must narrow at the same step: sums over other widths round differently.
MIN_STEPS_SAVED = 20.0


class Compaction:
    """Keeps track of which gates are still in the network, and takes out the dead ones.

    Args:
        network: The gated network.
        bank: Its gates.
        groups: Its gated groups.
        sites: Where the gates sit.
        absorbing: Names of the groups whose dead channels may go.
        widths: Rule of each group; a few dead channels stay to meet it.
    """

    def __init__(
        self,
        network: GatedNetwork,
        bank: GateBank,
        groups: ChannelGroups,
        sites: tuple[Site, ...],
        absorbing: frozenset[str],
        widths: Mapping[str, WidthRule],
    ) -> None:
        self._network, self._bank, self._groups, self._sites = network, bank, groups, sites
        self._absorbing, self._widths = absorbing, widths
        self._cost = CostModel(groups).base[0]
        self.num_gates = groups.num_units
        self.recapture_steps = 0.0  # what narrowing costs beyond the above, in steps
        self._placed: tuple[Tensor, Tensor] | None = None
        self.present = np.arange(
            groups.num_units
        )  # positions of the remaining gates in the full vector
        self._left_died_at = torch.full((groups.num_units,), -1, dtype=torch.int32)

    def candidates(self, alive: Tensor | None = None) -> tuple[np.ndarray, float]:
        """Units to keep, and the share of the present MACs that leaving out the others saves.

        Args:
            alive: Whether each present gate is above 0, as last read. [gates present], bool. None: read them now.
        """
        alive = (self._bank.state.values != 0 if alive is None else alive).cpu().numpy()
        keep = np.ones(self._groups.num_units, dtype=bool)
        for group in self._groups.groups:
            if group.name not in self._absorbing:
                continue
            span = slice(group.start, group.start + group.size)
            dead = np.flatnonzero(~alive[span])
            width = self._widths[group.name].width(group.size - len(dead), group)
            keep[group.start + dead[: group.size - width]] = False
        if keep.all():
            return keep, 0.0
        return keep, 1.0 - CostModel(self._groups.shrink(keep)).base[0] / self._cost

    def worthwhile(self, saving: float, steps_left: int) -> bool:
        """Whether the rest of the search gets shorter by more than narrowing takes."""
        return saving >= MIN_SAVING and saving * steps_left > MIN_STEPS_SAVED + self.recapture_steps

    @torch.no_grad()
    def leave_out(self, keep: np.ndarray) -> None:
        """Narrow network, gates and optimiser state to these units. ``keep``: [gates present], bool."""
        plan = {}
        for layer in self._groups.layers:
            kept_out, kept_in = _kept(layer.out_units, keep), _kept(layer.in_units, keep)
            if kept_out is not None or kept_in is not None:
                plan[layer.name] = (kept_in, kept_out)
        narrow_layers("search", self._network.root, plan)
        state = self._bank.state
        index = torch.from_numpy(np.flatnonzero(keep)).to(state.values.device)
        dropped = torch.from_numpy(self.present[~keep])
        self._left_died_at[dropped] = state.died_at.cpu()[torch.from_numpy(~keep)]
        for name in ("values", "exp_avg", "exp_avg_sq", "died_at"):
            setattr(state, name, getattr(state, name).index_select(0, index))
        sites = tuple(replace(site, units=_renumbered(site.units, keep)) for site in self._sites)
        self._groups, self._sites = self._groups.shrink(keep), sites
        self._cost = CostModel(self._groups).base[0]
        self.present = self.present[keep]
        self._placed = None
        self._bank.rebuild(self._groups, sites)

    def whole(self, values: Tensor, died_at: Tensor) -> tuple[Tensor, Tensor]:
        """Gates and times of death of the whole network: those that were left out come back as zeros. Copies."""
        if self._placed is None:  # copied once: a copy to a device may wait for it
            index = torch.from_numpy(self.present).to(values.device)
            self._placed = index, self._left_died_at.to(values.device)
        index, left_died_at = self._placed
        all_values = values.new_zeros(self.num_gates).index_copy_(0, index, values)
        return all_values, left_died_at.index_copy(0, index, died_at)

    def state(self) -> tuple[Tensor, Tensor]:
        """For a checkpoint: positions of the present gates, and times of death of those left out."""
        return torch.from_numpy(self.present), self._left_died_at.clone()

    def restore(self, present: Tensor, left_died_at: Tensor) -> None:
        """Narrow a network that is still whole to a saved state."""
        if len(present) < len(self.present):
            self.leave_out(np.isin(self.present, present.numpy()))
        self._left_died_at.copy_(left_died_at)
        self._placed = None


def _kept(units: np.ndarray, keep: np.ndarray) -> tuple[int, ...] | None:
    """Positions of a layer's channels that stay; None where all do."""
    stays = units == FIXED
    stays[~stays] = keep[units[~stays]]
    return None if stays.all() else tuple(np.flatnonzero(stays).tolist())


def _renumbered(units: np.ndarray, keep: np.ndarray) -> np.ndarray:
    new_unit = np.full(len(keep) + 1, FIXED, dtype=np.int64)
    new_unit[:-1][keep] = np.arange(np.count_nonzero(keep))
    stays = units == FIXED
    stays[~stays] = keep[units[~stays]]
    return new_unit[units[stays]]
