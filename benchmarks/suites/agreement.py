"""Whether the fast search finds what the plain one finds: kept channels of every group, ours against a plain float32 search.

Rounding alone makes two searches drift apart, so the yardstick is a second plain search that only rounds differently: the same
weights, images and order, computed channels_last instead of contiguous. Every finished search is a part of its own, and one that was
broken off goes on (plain ones every ``SAVE_EVERY`` steps, ours after an epoch).
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pfs_fast as pfs
from benchmarks.baselines import PlainSearch
from benchmarks.images import searchable, training_loader
from benchmarks.parts import part, write_whole
from benchmarks.settings import NETWORKS, Settings
from benchmarks.steps import gate_places
from benchmarks.suites.search import BUDGET, EXPANSION, correlation, search_config
from benchmarks.tables import Case
from pfs_fast.config import PRECISIONS

TITLE = "Agreement of structures"
SAVE_EVERY = 100
KINDS = ("ours", "plain", "plain channels_last")
PAIRS = (("ours", "plain"), ("plain channels_last", "plain"))


def run(settings: Settings) -> Iterator[Case]:
    for name in settings.chosen(settings.profile.agreement_networks):
        if searchable(name):
            yield measure(name, settings)
        else:
            line = {"network": name, "pair": "all", "correlation": "not run: the images are 32x32"}
            yield Case([], {TITLE: [line]})


def measure(name: str, settings: Settings) -> Case:
    profile = settings.profile
    target = profile.targets[0]
    total = search_config(settings, profile.agreement_steps)[1]
    shared = {"network": name, "batch": profile.search_batch, "target": target, "steps": total}
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in range(profile.seeds):
        for kind in KINDS:
            label = f"agreement-{name}-r{target:g}-{kind.replace(' ', '-')}-{seed}"
            unfinished = settings.parts / f"{label}-{total}.unfinished"
            found[kind, seed] = part(
                settings,
                label,
                {**shared, "seed": seed},
                _computation(name, kind, seed, target, settings, unfinished),
            )
            unfinished.unlink(missing_ok=True)
    rows, lines = [], []
    for first, second in PAIRS:
        line = {**shared, "pair": f"{first} : {second}", "seeds": profile.seeds}
        columns: dict[str, list[float | None]] = {}
        for seed in range(profile.seeds):
            a, b = found[first, seed], found[second, seed]
            compared = _compare(a, b)
            row = {**shared, "data": settings.data[0], "first": first, "second": second}
            row |= {"seed": seed, "precision": a["precision"], **compared}
            rows.append(row | {n: a[n] for n in ("measured_commit", "measured_date")})
            for key, value in compared.items():
                columns.setdefault(key.replace("_", " "), []).append(value)
        line |= {key: ", ".join(_short(v) for v in values) for key, values in columns.items()}
        lines.append(line)
    return Case(rows, {TITLE: lines})


def _short(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _compare(a: dict[str, Any], b: dict[str, Any]) -> dict[str, float | None]:
    """Correlations over the groups, and the mean difference of a group in channels."""
    sizes = a["sizes"]
    shares = [{g: found["widths"][g] / sizes[g] for g in sizes} for found in (a, b)]
    apart = [abs(a["widths"][g] - b["widths"][g]) for g in sizes]
    return {
        "correlation": correlation(a["widths"], b["widths"]),
        "correlation_of_shares": correlation(*shares),
        "mean_difference": float(np.mean(apart)),
    }


def _computation(
    name: str, kind: str, seed: int, target: float, settings: Settings, unfinished: Path
) -> Callable[[], dict[str, Any]]:
    def compute() -> dict[str, Any]:
        torch.manual_seed(seed)
        model, base = NETWORKS[name].build(EXPANSION), NETWORKS[name].build()
        steps = settings.profile.agreement_steps
        config, total = search_config(settings, steps, target=target, seed=seed)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        if kind == "ours":
            loader = training_loader(settings, seed=seed, dtype=PRECISIONS[settings.native])
            result = pfs.search(
                model,
                loader,
                BUDGET,
                config=config,
                reference=base,
                device=settings.device,
                checkpoint=unfinished,
                progress=False,
            )
        else:
            layout = kind == "plain channels_last"
            search = _Plain(model, seed, target, layout, settings)
            search.run(total, unfinished)
            result = search.result(base, config)
        return {
            "widths": {group: len(kept) for group, kept in result.structure.kept.items()},
            "sizes": {group.name: group.size for group in result.groups.groups},
            "precision": result.config.precision if kind == "ours" else "fp32",
        }

    return compute


class _Plain:
    """The plain search of the baselines over many steps, with the time at which each gate died."""

    def __init__(
        self,
        model: torch.nn.Module,
        seed: int,
        target: float,
        channels_last: bool,
        settings: Settings,
    ) -> None:
        self.model = model
        self.groups, self.sites = gate_places(model, 32)
        # Weight gradients change nothing that is looked at here.
        self.plain = PlainSearch(
            model,
            [site.layer for site in self.sites],
            folded=False,
            frozen=True,
            channels_last=channels_last,
            dtype=torch.float32,
            device=settings.device,
            target=target,
        )
        if self.plain.flat.numel() != self.groups.num_units:
            raise ValueError(
                f"_Plain: every gate must sit at one layer, got {self.plain.flat.numel()} at "
                f"{self.groups.num_units} units"
            )
        self.loader = training_loader(
            settings, seed=seed, dtype=torch.float32, channels_last=channels_last
        )
        self.died_at = torch.full_like(self.plain.flat, -1, dtype=torch.int32)
        self.step = 0

    def run(self, total: int, unfinished: Path) -> None:
        if unfinished.exists():
            self._restore(unfinished)
        while self.step < total:
            for images, labels in self.loader:
                self.plain.step(images, labels)
                self.step += 1
                dead = self.plain.flat == 0
                self.died_at[dead & (self.died_at < 0)] = self.step
                self.died_at[~dead] = -1
                if self.step % SAVE_EVERY == 0:
                    self._save(unfinished)
                if self.step == total:
                    break

    def result(self, base: torch.nn.Module, config: pfs.SearchConfig) -> pfs.SearchResult:
        units = torch.cat([torch.from_numpy(site.units) for site in self.sites])
        gates, died_at = torch.empty(len(units)), torch.empty(len(units), dtype=torch.int32)
        gates[units], died_at[units] = self.plain.flat.cpu(), self.died_at.cpu()
        cost = pfs.count(base, torch.zeros(1, 3, 32, 32))
        reference, budget = (cost.macs, cost.params), pfs.Budget(BUDGET)
        return pfs.SearchResult(
            self.groups, gates, died_at, budget, reference, config, [], self.model
        )

    def _save(self, path: Path) -> None:
        file = io.BytesIO()
        state = {"flat": self.plain.flat, "died_at": self.died_at, "step": self.step}
        state |= {"adam": self.plain.adam.state_dict(), "loader": self.loader.state_dict()}
        torch.save(state, file)
        write_whole(path, file.getvalue())

    def _restore(self, path: Path) -> None:
        state = torch.load(path, weights_only=True, map_location=self.plain.flat.device)
        self.plain.flat.copy_(state["flat"])
        self.died_at.copy_(state["died_at"])
        self.plain.adam.load_state_dict(state["adam"])
        self.loader.load_state_dict(state["loader"])
        self.step = state["step"]
