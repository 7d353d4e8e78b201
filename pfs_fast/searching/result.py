"""What a search gives: gates, and from them the structure for any budget."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .._ambient import own_settings
from ..budgets import solver
from ..budgets.budget import Budget
from ..budgets.cost import CostModel
from ..budgets.ranking import RANKINGS, Ranking
from ..budgets.structure import Structure
from ..errors import (
    BusyMachineError,
    ConfigError,
    FileFormatError,
    InfeasibleBudgetError,
    ModelError,
    StructureError,
)
from ..graph.groups import ChannelGroups, Layer
from ..measuring import comparison
from ..measuring.meters import Meters, needs_model
from ..slimming.slim import slim as make_slim
from ..storage.files import read_safetensors, write_safetensors
from ..training.progress import Progress
from .config import SearchConfig
from .saved_groups import read_counts, read_groups, read_history

FORMAT, VERSION = "pfs_fast.search", 3  # 1 knew fewer limits, 2 a single ranking


@dataclass(eq=False)  # tensors do not compare as a whole
class SearchResult:
    """Gates of one search. Any budget can be cut from them; nothing is trained again.

    Attributes:
        groups: The gated channel groups and the layers they pass through.
        flat_gates: All gates, group after group. [G], float32 (float64 for ``precision="fp64"``), CPU.
        died_at: Step at which each gate reached 0, -1 where it did not. [G], int32, CPU.
        budget: The budget of the search.
        reference: ``(macs, params)`` that shares of a budget refer to.
        config: Options of the search, with ``target``, ``precision`` and ``backend`` as they were resolved.
        history: One entry every ``config.log_every`` steps and at the end of each epoch: step, epoch, loss, accuracy,
            mean_gate, alive (share of non-zero gates), seconds; validation accuracy where a loader was given; with
            ``config.patience`` also structure_change and order_change as of the last look (``pfs_fast.searching.stability.Change``).
        model: The model that was searched, not a copy; None after ``load`` without one.
        input_shape: Of one image, (C, H, W); slim networks carry it, so that ``export`` knows their input.
        progress: Whether a progress line shows how far a measurement of latency is: as the search was asked, True after
            ``load``. May be set.
    """

    groups: ChannelGroups
    flat_gates: Tensor
    died_at: Tensor
    budget: Budget
    reference: tuple[int, int]
    config: SearchConfig
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)
    model: nn.Module | None = field(default=None, repr=False)
    input_shape: tuple[int, ...] | None = None
    progress: bool = field(default=True, repr=False)

    def __post_init__(self) -> None:
        self._cost_model = CostModel(self.groups)
        self._structure: Structure | None = None
        self._meters: Meters | None = None
        self._rankings: dict[str, Ranking] = {}

    @property
    def gates(self) -> dict[str, Tensor]:
        """Gates of every group in [0, 1], by the name of its first producer. ``{group: [size]}``."""
        return {g.name: self.flat_gates[g.start : g.start + g.size] for g in self.groups.groups}

    @property
    def ended(self) -> str:
        """How the search ended: ``"stable"`` (``config.patience``) or ``"steps"``."""
        return self.history[-1].get("ended", "steps") if self.history else "steps"

    @property
    def steps(self) -> int:
        """Steps of the search, up to the last entry of the history."""
        return int(self.history[-1]["step"]) if self.history else 0

    @property
    def structure(self) -> Structure:
        """The structure for the budget of the search."""
        if self._structure is None:
            self._structure = self.structure_for(self.budget)
        return self._structure

    @own_settings()
    def structure_for(
        self, budget: float | int | Budget, *, ranking: str | None = None
    ) -> Structure:
        """The largest structure within a budget, by the same gates.

        Args:
            budget: Share of the reference's MACs in (0, 1], number of MACs, or ``Budget``.
            ranking: ``"gates"``, ``"layerwise"`` or ``"uniform"``, as in ``SearchConfig``. Default: that of the search.

        Raises:
            ConfigError: Unknown ranking.
            BudgetError: Malformed, or for a device that is not there. InfeasibleBudgetError: Below the floor; prints the
                feasible range.
            BusyMachineError: Latency is limited, and its times scatter too widely to decide by.
            ModelError: A limit on activations or latency, of a result that was loaded without a model.
        """
        meters = self.meters
        limits = meters.limits(Budget.of(budget), self.reference)
        keep, measured = meters.choose(*self._scores(ranking), limits)
        solver.warn_of_dead_groups(self.groups, self.flat_gates.numpy(), keep)
        checks = meters.checks(keep, limits, measured)
        multiple = limits.multiple_of if limits.preferred else 1
        return Structure.from_keep(self.groups, keep, self._cost_model, checks, multiple)

    @property
    def meters(self) -> Meters:
        """What tells the costs of structures of this search; it keeps what it has measured."""
        if self._meters is None:
            self._meters = Meters(self.groups, self._cost_model, self.model, self.input_shape)
        self._meters.bars = partial(Progress, enabled=self.progress)
        return self._meters

    @own_settings()
    def measured(self, budget: float | int | Budget | None = None) -> Structure:
        """The structure for a budget, with every limit found anew on its slim network: counted, walked, timed.

        Args:
            budget: Default: the budget of the search.

        Raises:
            ModelError: The result was loaded from a file without a model.
        """
        budget = self.budget if budget is None else Budget.of(budget)
        structure = self.structure if budget == self.budget else self.structure_for(budget)
        if self.model is None:
            raise ModelError(
                "SearchResult.measured: the result must know its model, got a loaded one; use load(path, model)"
            )
        limits = self.meters.limits(budget, self.reference)
        found = self.meters.measure(make_slim(self.model, structure, seed=0), limits)
        checks = tuple(
            replace(check, measured=found[check.name].median, spread=found[check.name].spread)
            for check in structure.limits
        )
        return replace(structure, limits=checks)

    def pareto(
        self,
        shares: Sequence[float] | None = None,
        *,
        multiple_of: int | str = "auto",
        min_channels: int = 1,
    ) -> list[Structure]:
        """Structures along the whole range of budgets, smallest first.

        Args:
            shares: Shares of the reference's MACs in (0, 1]; default: the feasible ones of 0.05, 0.10, ... 1.
            multiple_of: As in ``Budget``.
            min_channels: As in ``Budget``.
        """
        points = solver.pareto(
            self.groups,
            *self._scores(),
            shares,
            reference=self.reference,
            multiple_of=multiple_of,
            min_channels=min_channels,
            cost_model=self._cost_model,
        )
        return [Structure.from_keep(self.groups, point.keep, self._cost_model) for point in points]

    @own_settings()
    def slim(
        self,
        budget: float | int | Budget | None = None,
        weights: str = "fresh",
        *,
        seed: int | None = None,
    ) -> nn.Module:
        """A slim network: plain module of the model's class with fewer channels.

        Args:
            budget: Default: the budget of the search.
            weights: ``"fresh"``: initialised as the class does. ``"inherit"``: the kept slices of the model's weights.
            seed: Of fresh weights; None: the global random state.

        Raises:
            ModelError: The result was loaded from a file without a model.
        """
        if self.model is None:
            raise ModelError(
                "SearchResult.slim: the result must know its model, got a loaded one; use load(path, model)"
            )
        structure = self.structure if budget is None else self.structure_for(budget)
        network = make_slim(self.model, structure, weights, seed=seed)
        if self.input_shape is not None:
            network.pfs_input_shape = self.input_shape
        return network

    def report(self, measure: bool = False) -> str:
        """The structure and its limits as tables; how an early stop ended; and every layer held whole with the reason.

        Args:
            measure: Find every limited cost anew on the slim network, as ``measured`` does, and measure it beside the dense
                network, as ``compare`` does.
        """
        lines = [str(self.measured() if measure else self.structure)]
        if measure:
            lines += ["", str(self.compare(warn=False))]
        if self.config.patience is not None:
            lines += ["", self.ending()]
        if self.groups.fixed:
            lines += [
                "",
                "held whole:",
                *(f"  {name}: {reason}" for name, reason in self.groups.fixed),
            ]
        return "\n".join(lines)

    def compare(
        self, budget: float | int | Budget | None = None, **options: Any
    ) -> comparison.Comparison:
        """Latency, MACs, parameters and bytes of a slim network beside those of the dense one.

        Args:
            budget: Default: the budget of the search.
            options: Those of `compare`: ``batch``, ``precision``, ``device``, ``threads``, ``runtimes``. Default: those of the
                budget of the search where it limits latency, else those of `compare`.

        Raises:
            ModelError: The result was loaded from a file without a model. Others as `compare`.
        """
        slim = self.slim(budget, seed=0)
        assert self.model is not None
        if self.budget.latency is not None or self.budget.latency_ms is not None:
            run = self.budget.run
            runtimes = tuple(dict.fromkeys([run.runtime, "eager", "folded"]))
            options = {"runtimes": runtimes, **asdict(run), **options}
            del options["runtime"]
        bars = partial(Progress, enabled=self.progress)
        return comparison.compare(self.model, slim, bars=bars, **options)

    def ending(self) -> str:
        """One line: after how many steps the search ended; with ``config.patience``, how far its answer was from stable."""
        line, patience = f"ended after {self.steps:,} steps", self.config.patience
        if patience is None:
            return line
        last = self.history[-1] if self.history else {}
        structure, order = last.get("structure_change"), last.get("order_change")
        line += ", stable: " if self.ended == "stable" else ", not yet stable: "
        if structure is None or order is None:
            return f"{line}shorter than the patience of {patience:,} steps"
        return (
            f"{line}over the last {patience:,} steps the structure changed by {structure:.2%} of its channels and the order of "
            f"the gates by {order:.2%} (tolerance {self.config.tolerance:.2%})"
        )

    def _scores(self, ranking: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """What the solver takes for gates and times of death. Both [G]."""
        ranking = self.config.ranks_by if ranking is None else ranking
        if ranking not in RANKINGS:
            raise ConfigError(
                f"SearchResult.structure_for: ranking must be one of {RANKINGS}, got {ranking!r}"
            )
        if ranking not in self._rankings:
            self._rankings[ranking] = Ranking(self._cost_model, ranking)
        return self._rankings[ranking].scores(self.flat_gates.numpy(), self.died_at.numpy())

    # -- files -----------------------------------------------------------------------------------------------------

    @own_settings()
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything but the model to one safetensors file, whole or not at all.

        Raises:
            FileWriteError: The place cannot be written; an old file there stays as it was.

        Warns:
            UserWarning: The latency limit could not be measured; the file holds no structure.
        """
        write_safetensors(path, *self.content(), caller="SearchResult.save")

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and metadata of the file of ``save``."""
        tensors = {"gates": self.flat_gates, "died_at": self.died_at}
        for i, layer in enumerate(self.groups.layers):
            tensors[f"layer.{i}.out_units"] = torch.from_numpy(layer.out_units)
            if layer.kind != "bn":
                tensors[f"layer.{i}.in_units"] = torch.from_numpy(layer.in_units)
        plain = [f.name for f in fields(Layer) if not f.name.endswith("_units")]
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "budget": asdict(self.budget),
            "reference": list(self.reference),
            "config": asdict(self.config),
            "history": self.history,
            "groups": [asdict(group) for group in self.groups.groups],
            "layers": [
                {name: getattr(layer, name) for name in plain} for layer in self.groups.layers
            ],
            "fixed": [list(pair) for pair in self.groups.fixed],
            "other": [self.groups.other_macs, self.groups.other_params],
            "input_shape": self.input_shape,
        }
        # Without the model, or on another processor, nobody could find it again.
        if needs_model(self.budget) or self.budget.multiple_of == "auto":
            try:
                metadata["structure"] = self.structure.to_json()
            except (BusyMachineError, InfeasibleBudgetError) as error:
                # The gates took the whole search; a latency that cannot be measured at this moment must not lose them.
                warnings.warn(
                    f"SearchResult: structure must be found to be written, got {type(error).__name__} ({error}); the gates "
                    "are written without it: load them with the model, and ask for the structure then",
                    UserWarning,
                    stacklevel=3,
                )
        return tensors, metadata

    @classmethod
    @own_settings()
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> SearchResult:
        """Read a file of ``save``.

        Args:
            path: The file.
            model: A model of the searched class and widths, for ``slim``; any weights.

        Raises:
            FileFormatError: Truncated, of another format or version, inconsistent, or made for another model.
        """
        tensors, meta = read_safetensors(path, FORMAT, VERSION, caller="SearchResult.load")
        return cls.from_content(path, tensors, meta, model)

    @classmethod
    def from_content(
        cls,
        path: str | os.PathLike[str],
        tensors: dict[str, Tensor],
        meta: dict[str, Any],
        model: nn.Module | None,
    ) -> SearchResult:
        """The result that ``content`` describes; ``path`` is where it was read, for errors, which are those of ``load``."""
        try:
            groups = read_groups(tensors, meta)
            _check_gates(tensors["gates"], tensors["died_at"], groups.num_units)
            reference = read_counts("reference", meta["reference"])
            shape = meta["input_shape"]
            result = cls(
                groups,
                tensors["gates"],
                tensors["died_at"],
                Budget(**meta["budget"]),
                (reference[0], reference[1]),
                # Before version 3 the gates were the only ranking.
                SearchConfig(**{"ranking": "gates", **meta["config"]}),
                read_history(meta["history"]),
                model,
                None if shape is None else read_counts("input_shape", shape, 1),
            )
        except (LookupError, TypeError, ValueError, OverflowError) as error:
            raise FileFormatError(
                f"SearchResult.load: path must hold a whole search result, got '{path}' with {type(error).__name__}: "
                f"{error}; save the result again"
            ) from error
        if "structure" in meta:
            result._structure = _read_structure(path, result, meta["structure"])
        if model is not None:
            _check_model(path, groups, model)
        return result


def _check_gates(gates: Tensor, died_at: Tensor, count: int) -> None:
    if gates.shape != (count,) or died_at.shape != (count,):
        raise ValueError(
            f"it must hold {count} gates, got {list(gates.shape)} and times of death {list(died_at.shape)}"
        )
    in_range = gates.dtype in (torch.float32, torch.float64) and ((gates >= 0) & (gates <= 1)).all()
    if not in_range or died_at.dtype != torch.int32 or (died_at < -1).any():
        raise ValueError(
            f"it must hold gates in [0, 1] and whole steps, got gates of {gates.dtype} and steps of {died_at.dtype}, or "
            "values outside"
        )


def _read_structure(path: str | os.PathLike[str], result: SearchResult, text: Any) -> Structure:
    structure, groups = Structure.from_json(text), result.groups
    same = structure.sizes == {group.name: group.size for group in groups.groups}
    if same:
        keep = np.zeros(groups.num_units, dtype=bool)
        for group in groups.groups:
            keep[group.start + np.array(structure.kept[group.name])] = True
        try:
            same = structure == Structure.from_keep(groups, keep, result._cost_model)
        except StructureError:
            same = False
    if not same:
        raise FileFormatError(
            f"SearchResult.load: path must hold a structure of its own groups, got another one in '{path}'; save the result again"
        )
    return structure


def _check_model(path: str | os.PathLike[str], groups: ChannelGroups, model: nn.Module) -> None:
    modules = dict(model.named_modules())
    for layer in groups.layers:
        weight = getattr(modules.get(layer.name), "weight", None)
        if weight is None and layer.kind == "bn":
            continue  # without affine parameters its width shows nowhere else
        if weight is None or weight.shape[0] != len(layer.out_units):
            got = "no such layer" if weight is None else f"{weight.shape[0]} channels"
            raise FileFormatError(
                f"SearchResult.load: model must be the one that was searched, got {got} at '{layer.name}' where "
                f"'{path}' has {len(layer.out_units)} channels; build the model with the same arguments"
            )
