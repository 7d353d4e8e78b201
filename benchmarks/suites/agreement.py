"""Whether the fast search finds what the plain one finds: kept channels of every group, ours against a plain float32 search.

Rounding alone makes two searches drift apart, so the yardsticks are plain searches that only round differently, over the same
weights, images and order: one channels_last instead of contiguous and, where a search computes in fewer bits, one in those, as
the best plain baseline does. Every finished search is a part of its own, and one that was broken off goes on (plain ones every
``rounding.SAVE_EVERY`` steps, ours after an epoch).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import pfs_fast as pfs
from benchmarks.images import searchable, training_loader
from benchmarks.parts import finished, part
from benchmarks.rounding import Kind, PlainRun, kinds
from benchmarks.settings import NETWORKS, Settings
from benchmarks.suites.search import BUDGET, EXPANSION, correlation, search_config
from benchmarks.tables import Case
from pfs_fast.searching.config import PRECISIONS

TITLE = "Agreement of structures"


def pairs(native: str) -> list[tuple[str, str]]:
    """What is compared: everything with the plain float32 search."""
    return [(name, "plain") for name in kinds(native) if name != "plain"]


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
    found: dict[tuple[str, int], dict[str, Any] | None] = {}
    for seed in settings.seeds:
        for title, kind in kinds(settings.native).items():
            label = f"agreement-{name}-r{target:g}-{title.replace(' ', '-')}-{seed}"
            key = {**shared, "seed": seed}
            if settings.finished_only:
                found[title, seed] = finished(settings, label, key)
                continue
            unfinished = settings.parts / f"{label}-{total}.unfinished"
            compute = _computation(name, kind, seed, target, settings, unfinished)
            found[title, seed] = part(settings, label, key, compute)
            unfinished.unlink(missing_ok=True)
    rows, lines = [], []
    for first, second in pairs(settings.native):
        seeds: list[int] = []
        columns: dict[str, list[float | None]] = {}
        for seed in settings.seeds:
            a, b = found[first, seed], found[second, seed]
            if a is None or b is None:
                continue
            seeds.append(seed)
            compared = _compare(a, b)
            row = {**shared, "data": settings.data[0], "first": first, "second": second}
            row |= {"seed": seed, "precision": a["precision"], **compared}
            rows.append(row | {n: a[n] for n in ("measured_commit", "measured_date")})
            for key, value in compared.items():
                columns.setdefault(key.replace("_", " "), []).append(value)
        line = {**shared, "pair": f"{first} : {second}", "seeds": ", ".join(map(str, seeds)) or "-"}
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
    name: str, kind: Kind, seed: int, target: float, settings: Settings, unfinished: Path
) -> Callable[[], dict[str, Any]]:
    def compute() -> dict[str, Any]:
        torch.manual_seed(seed)
        model, base = NETWORKS[name].build(EXPANSION), NETWORKS[name].build()
        steps = settings.profile.agreement_steps
        options = {"target": target, "seed": seed, "precision": kind.precision}
        config, total = search_config(settings, steps, **options)
        unfinished.parent.mkdir(parents=True, exist_ok=True)
        if kind.ours:
            loader = training_loader(settings, seed=seed, dtype=PRECISIONS[kind.precision])
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
            search = PlainRun(model, seed, target, kind, settings)
            search.run(total, unfinished)
            cost = pfs.count(base, torch.zeros(1, 3, 32, 32))
            reference, budget = (cost.macs, cost.params), pfs.Budget(BUDGET, multiple_of=1)
            result = pfs.SearchResult(
                search.groups, *search.gates(), budget, reference, config, [], model
            )
        return {
            "widths": {group: len(kept) for group, kept in result.structure.kept.items()},
            "sizes": {group.name: group.size for group in result.groups.groups},
            "precision": result.config.precision,
        }

    return compute
