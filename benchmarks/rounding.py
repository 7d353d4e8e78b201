"""Ways of computing the same search over the same weights, images and order, which differ in rounding alone."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.baselines import PlainSearch
from benchmarks.images import training_loader
from benchmarks.parts import write_whole
from benchmarks.settings import Settings
from benchmarks.steps import gate_places
from pfs_fast.searching.config import PRECISIONS

SAVE_EVERY = 100  # steps of a plain search that may be broken off


@dataclass(frozen=True)
class Kind:
    """A way of computing the same search.

    Attributes:
        ours: By ``pfs_fast.search``; else by the plain loop of the baselines.
        precision: Of convolutions and activations.
        channels_last: Layout of images and weights.
        folded: Gates of the plain loop folded into batch norm; else multiplied.
    """

    ours: bool
    precision: str
    channels_last: bool = True
    folded: bool = False


def kinds(native: str) -> dict[str, Kind]:
    """Every search of a comparison by its name; ``native``: the precision that a search takes by itself."""
    found = {
        "ours": Kind(True, native),
        "plain": Kind(False, "fp32", channels_last=False),
        "plain channels_last": Kind(False, "fp32"),
    }
    if native != "fp32":
        found["ours fp32"] = Kind(True, "fp32")
        found[f"plain {native}"] = Kind(False, native, folded=True)
    return found


class PlainRun:
    """The plain search of the baselines over many steps, with the time at which each gate died.

    Attributes:
        groups: Gated groups.
        steps: Steps taken.
    """

    def __init__(
        self, model: nn.Module, seed: int, target: float, kind: Kind, settings: Settings
    ) -> None:
        self.groups, sites = gate_places(model, 32)
        dtype = PRECISIONS[kind.precision]
        # Weight gradients change nothing that is looked at here.
        self._plain = PlainSearch(
            model,
            [site.layer for site in sites],
            folded=kind.folded,
            frozen=True,
            channels_last=kind.channels_last,
            dtype=dtype,
            device=settings.device,
            target=target,
        )
        self._units = torch.cat([torch.from_numpy(site.units) for site in sites])
        if len(self._units) != self.groups.num_units:
            raise ValueError(
                f"PlainRun: every gate must sit at one layer, got {len(self._units)} at "
                f"{self.groups.num_units} units"
            )
        self._loader = training_loader(
            settings, seed=seed, dtype=dtype, channels_last=kind.channels_last
        )
        self._died_at = torch.full_like(self._plain.flat, -1, dtype=torch.int32)
        self.steps = 0

    def run(
        self,
        total: int,
        unfinished: Path | None = None,
        look: Callable[[int], None] = lambda step: None,
    ) -> None:
        """Goes on to step ``total``.

        Args:
            unfinished: A file that a search which is broken off goes on from.
            look: Called after every step with its number.
        """
        if unfinished is not None and unfinished.exists():
            self._restore(unfinished)
        while self.steps < total:
            for images, labels in self._loader:
                self._take(images, labels)
                look(self.steps)
                if unfinished is not None and self.steps % SAVE_EVERY == 0:
                    self._save(unfinished)
                if self.steps == total:
                    break

    def gates(self) -> tuple[Tensor, Tensor]:
        """``(gates, step of death or -1)`` in the order of the units."""
        flat, died_at = self._plain.flat.cpu(), self._died_at.cpu()
        gates, deaths = torch.empty_like(flat), torch.empty_like(died_at)
        gates[self._units], deaths[self._units] = flat, died_at
        return gates, deaths

    def _take(self, images: Tensor, labels: Tensor) -> None:
        self._plain.step(images, labels)
        self.steps += 1
        dead = self._plain.flat == 0
        self._died_at[dead & (self._died_at < 0)] = self.steps
        self._died_at[~dead] = -1

    def _save(self, path: Path) -> None:
        file = io.BytesIO()
        state = {"flat": self._plain.flat, "died_at": self._died_at, "step": self.steps}
        state |= {"adam": self._plain.adam.state_dict(), "loader": self._loader.state_dict()}
        torch.save(state, file)
        write_whole(path, file.getvalue())

    def _restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self._plain.flat.device)
        self._plain.flat.copy_(state["flat"])
        self._died_at.copy_(state["died_at"])
        self._plain.adam.load_state_dict(state["adam"])
        self._loader.load_state_dict(state["loader"])
        self.steps = state["step"]
