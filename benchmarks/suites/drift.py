"""How far rounding alone carries a search: the gates of every way of computing it, step by step, from those of a plain float64 search.

All start from the same gates, weights and images. Where ways that round in the last bit stay as far from the exact gates as ours,
what separates ours from the plain search is chance and no error of method; ours in float64 shows from which step on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import pfs_fast as pfs
from benchmarks.images import endless, searchable, training_loader
from benchmarks.parts import part
from benchmarks.rounding import Kind, PlainRun, kinds
from benchmarks.settings import NETWORKS, Settings
from benchmarks.suites.search import BUDGET, EXPANSION
from benchmarks.tables import Case
from pfs_fast.searching.config import PRECISIONS
from pfs_fast.searching.plan import prepare

TITLE = "Drift of gates: root mean square of the difference to a plain float64 search"
EXACT = "plain fp64"
LOOKS = 8  # at how many steps the gates are compared, besides the first


def run(settings: Settings) -> Iterator[Case]:
    for name in settings.chosen(settings.profile.agreement_networks):
        if searchable(name):
            yield measure(name, settings)
        else:
            line = {"network": name, "search": "all", "seed": "not run: the images are 32x32"}
            yield Case([], {TITLE: [line]})


def looks(total: int) -> list[int]:
    """The steps after which gates are compared."""
    return sorted({1, *(max(total * i // LOOKS, 1) for i in range(1, LOOKS + 1))})


def measure(name: str, settings: Settings) -> Case:
    profile = settings.profile
    target, total = profile.targets[0], profile.drift_steps
    shared = {"network": name, "batch": profile.search_batch, "target": target}
    exact = {
        EXACT: Kind(False, "fp64", channels_last=False),
        "ours fp64": Kind(True, "fp64"),
    }
    rows, lines = [], []
    for seed in settings.seeds:
        found = {}
        for title, kind in {**exact, **kinds(settings.native)}.items():
            found[title] = part(
                settings,
                f"drift-{name}-r{target:g}-{title.replace(' ', '-')}-{seed}",
                {**shared, "steps": total, "seed": seed},
                _computation(name, kind, seed, settings),
            )
        reference = found.pop(EXACT)["gates"]
        for title, result in found.items():
            apart = {step: _apart(result["gates"][step], reference[step]) for step in reference}
            row = {**shared, "seed": seed, "search": title, "data": settings.data[0]}
            stamp = {n: result[n] for n in ("measured_commit", "measured_date")}
            rows += [row | {"step": int(s), "rms_difference": d} | stamp for s, d in apart.items()]
            shown = {f"step {step}": f"{value:.1e}" for step, value in apart.items()}
            lines.append({"network": name, "seed": seed, "search": title} | shown)
    return Case(rows, {TITLE: lines})


def _apart(a: list[float], b: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(np.subtract(a, b)))))


def _computation(
    name: str, kind: Kind, seed: int, settings: Settings
) -> Callable[[], dict[str, Any]]:
    def compute() -> dict[str, Any]:
        torch.manual_seed(seed)
        model = NETWORKS[name].build(EXPANSION)
        found: dict[str, list[float]] = {}
        at = looks(settings.profile.drift_steps)
        target = settings.profile.targets[0]
        if kind.ours:
            _step_ours(model, kind, seed, target, settings, at, found)
        else:
            search = PlainRun(model, seed, target, kind, settings)

            def look(step: int) -> None:
                if step in at:
                    found[str(step)] = search.gates()[0].tolist()

            search.run(at[-1], look=look)
        return {"gates": found}

    return compute


def _step_ours(
    model: torch.nn.Module,
    kind: Kind,
    seed: int,
    target: float,
    settings: Settings,
    at: list[int],
    found: dict[str, list[float]],
) -> None:
    """The search's own loop, whose gates can be seen between steps."""
    loader = training_loader(settings, seed=seed, dtype=PRECISIONS[kind.precision])
    config = pfs.SearchConfig(target=target, seed=seed, precision=kind.precision, compact=False)
    first = next(iter(training_loader(settings, seed=seed, dtype=PRECISIONS[kind.precision])))[0]
    loop = prepare(
        model, first, pfs.Budget(BUDGET, multiple_of=1), config, device=settings.device
    ).loop
    for step, batch in enumerate(endless(loader), start=1):
        loop.step(*batch)
        if step in at:
            found[str(step)] = loop.gates()[0].tolist()
        if step == at[-1]:
            return
