"""A whole search, end to end, with live compaction, with and without early stop, against plain PyTorch.

The time of ours is that of ``pfs_fast.search``: analysis of the model, all steps with their data, compaction. Those of the baselines are
extrapolated: the median of timed steps, data included, times the number of steps. Their steps are timed in blocks before, between
and after the searches.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch

import pfs_fast as pfs
from benchmarks.images import endless, searchable, training_loader
from benchmarks.parts import part
from benchmarks.roofline import Work, step_floor
from benchmarks.settings import NETWORKS, Settings
from benchmarks.steps import Step, all_steps, gate_places
from benchmarks.tables import Case
from benchmarks.timing import Clock, Effort, Spread, Variant, synchronize, time_variants
from pfs_fast.searching.config import PRECISIONS

WHOLE, ALONG = "Whole search", "Along the search"
EXPANSION = 1.25
BUDGET = 0.5  # of the network before widening
EPOCHS = 10
TOLERANCE = 0.1  # share of the structure that may still change at an early stop
BASELINES = ("naive", "folded")
ENTRIES = 20  # of the history


def early_stop_reason() -> str | None:
    """Why there is no search with early stop; None where there is one."""
    wanted = {"patience", "tolerance"}
    missing = wanted - {field.name for field in fields(pfs.SearchConfig)}
    return f"SearchConfig has no {' and no '.join(sorted(missing))}" if missing else None


def search_config(
    settings: Settings, steps: int | None, **options: Any
) -> tuple[pfs.SearchConfig, int]:
    """A search of ``steps`` steps or ten epochs, and its number of steps."""
    per_epoch = len(training_loader(settings, dtype=torch.float32))
    total = steps or per_epoch * EPOCHS
    epochs = math.ceil(total / per_epoch)
    every = max(total // ENTRIES, 1)
    config = pfs.SearchConfig(epochs=epochs, max_steps=total, log_every=every, **options)
    return config, total


def run(settings: Settings) -> Iterator[Case]:
    for name in settings.chosen(settings.profile.search_networks):
        if searchable(name):
            yield measure(name, settings)
        else:
            line = {"network": name, "variant": "all", "s": "not run: the images are 32x32"}
            yield Case([], {WHOLE: [line]})


def measure(name: str, settings: Settings) -> Case:
    profile = settings.profile
    stops = (False, True) if early_stop_reason() is None else (False,)
    kinds = list(itertools.product(profile.targets, stops))
    block = math.ceil(profile.baseline_steps / (len(kinds) + 1))
    total = search_config(settings, profile.search_steps)[1]
    shared = {"network": name, "batch": profile.search_batch}
    times: dict[str, list[float]] = {variant: [] for variant in BASELINES}

    def time_block(number: int) -> dict[str, Any]:
        key, label = {**shared, "steps": block}, f"search-{name}-baselines-{number}"
        found = part(settings, label, key, lambda: baseline_times(name, block, settings))
        for variant in BASELINES:
            times[variant] += found[variant]
        return found

    found = [time_block(0)]
    searches = {}
    for number, (target, stop) in enumerate(kinds, start=1):
        patience = profile.patience if stop else None
        key = {**shared, "steps": total, "target": target, "patience": patience}
        label = f"search-{name}-r{target:g}{'-early' if stop else ''}"
        searches[target, stop] = part(
            settings,
            label,
            key,
            lambda target=target, patience=patience: one_search(name, target, patience, settings),
        )
        found.append(time_block(number))
    dates = {
        "measured_commit": found[0]["measured_commit"],
        "measured_date": found[0]["measured_date"],
    }
    return _case(name, settings, total, searches, times, dates)


def baseline_times(name: str, count: int, settings: Settings) -> dict[str, list[float]]:
    """Milliseconds of ``count`` steps of each baseline, batches included."""
    torch.manual_seed(0)
    model = NETWORKS[name].build(EXPANSION)
    images = next(iter(training_loader(settings, dtype=torch.float32)))[0]
    steps = all_steps(model, images, replace(settings, compiled=False)).steps

    def timed(step: Step) -> Variant:
        batches = endless(
            training_loader(
                settings, dtype=PRECISIONS[step.precision], channels_last=step.channels_last
            )
        )

        def run(clock: Clock) -> None:
            step.take(*next(batches))
            clock.lap("step")

        return run

    variants = {variant: timed(steps[variant]) for variant in BASELINES}
    effort = Effort(seconds=0.0, least=count, most=count, warmup=1)
    timings = time_variants(variants, device=settings.device, effort=effort)
    return {variant: timings.rounds[variant]["step"] for variant in BASELINES}


def one_search(
    name: str, target: float, patience: int | None, settings: Settings
) -> dict[str, Any]:
    """Seconds, history and kept channels of one search of ours."""
    torch.manual_seed(0)
    network = NETWORKS[name]
    model, base = network.build(EXPANSION), network.build()
    early = {} if patience is None else {"patience": patience, "tolerance": TOLERANCE}
    steps = settings.profile.search_steps
    config, _ = search_config(settings, steps, target=target, **early)
    loader = training_loader(settings, dtype=PRECISIONS[settings.native])
    options = {"config": config, "reference": base, "device": settings.device, "progress": False}
    synchronize(settings.device)
    start = time.perf_counter()
    result = pfs.search(model, loader, BUDGET, **options)
    synchronize(settings.device)
    seconds = time.perf_counter() - start
    keys = ("step", "seconds", "channels", "alive")
    return {
        "seconds": seconds,
        "steps": result.history[-1]["step"],
        "ended": result.history[-1].get("ended", "steps"),
        "history": [{key: entry[key] for key in keys} for entry in result.history],
        "num_gates": len(result.flat_gates),
        "widths": {group: len(kept) for group, kept in result.structure.kept.items()},
    }


def along(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Step time between entries of the history, and the share of the channels still computed."""
    points, before = [], {"step": 0, "seconds": 0.0}
    for entry in found["history"]:
        steps = entry["step"] - before["step"]
        if steps > 0:
            ms = (entry["seconds"] - before["seconds"]) / steps * 1e3
            channels = entry["channels"] / found["num_gates"]
            point = {"step": entry["step"], "ms_per_step": ms}
            points.append({**point, "computed": channels, "alive": entry["alive"]})
        before = entry
    return points


def correlation(first: dict[str, int], second: dict[str, int]) -> float | None:
    """Of the kept channels of each group; None where one of the two is constant."""
    a, b = (np.array([widths[group] for group in first], dtype=float) for widths in (first, second))
    if len(a) < 2 or a.std() == 0 or b.std() == 0:
        return None
    return float(np.corrcoef(a, b)[0, 1])


def _floor_ms(name: str, settings: Settings) -> float:
    torch.manual_seed(0)
    model = NETWORKS[name].build(EXPANSION)
    norms = [site.layer for site in gate_places(model, 32)[1]]
    work, batch = Work.of(model, norms, 32), settings.profile.search_batch
    return step_floor(work, "ours", settings.native, batch, settings.ceilings)["floor_ms"]


def _case(
    name: str,
    settings: Settings,
    total: int,
    searches: dict[tuple[float, bool], dict[str, Any]],
    times: dict[str, list[float]],
    dates: dict[str, str],
) -> Case:
    shared = {"network": name, "data": settings.data[0], "batch": settings.profile.search_batch}
    floor = _floor_ms(name, settings)
    rows: list[dict[str, Any]] = []
    whole, points = [], []
    baselines = {v: Spread.of(times[v]).times(total / 1e3) for v in BASELINES}
    for variant, seconds in baselines.items():
        rows.append(_row(shared, variant, seconds, total, dates, extrapolated=True))
        line = {**shared, "variant": variant, "steps": total, "s": seconds}
        line["how"] = f"extrapolated from {seconds.n} timed steps, {Spread.of(times[variant])} ms"
        whole.append(line)
    for (target, stop), found in searches.items():
        case = {**shared, "target": target, "early_stop": stop}
        seconds = Spread(found["seconds"], found["seconds"], found["seconds"], 1)
        row = _row(case, "ours", seconds, found["steps"], found, extrapolated=False)
        line = {**shared, "variant": f"ours, r {target:g}" + (", early stop" if stop else "")}
        line |= {"steps": found["steps"], "s": found["seconds"], "how": "one whole search"}
        if stop:
            line["how"] += ", ended stable" if found["ended"] == "stable" else ", never stable"
        for variant in BASELINES:
            ratio = baselines[variant].times(1 / found["seconds"])
            row[f"{variant}_ratio"] = ratio.median
            line[f"{variant} / ours"] = ratio
        row["same_as_full"] = None
        if stop:
            row["same_as_full"] = correlation(found["widths"], searches[target, False]["widths"])
            line["correlation with the full answer"] = row["same_as_full"]
        line |= {"floor of a full step ms": floor}
        whole.append(line)
        rows.append(row)
        for point in along(found):
            empty = dict.fromkeys(row)
            rows.append({**empty, **case, "variant": "ours", "phase": "along", **point, "note": ""})
        points.append(_along_line(case, along(found)))
    if reason := early_stop_reason():
        row = dict.fromkeys(rows[0]) | shared | {"variant": "ours", "early_stop": True}
        rows.append(row | {"phase": "whole", "note": f"not available: {reason}"})
        whole.append({**shared, "variant": "ours, early stop", "how": f"not available: {reason}"})
    return Case([_order(row) for row in rows], {WHOLE: whole, ALONG: points})


COLUMNS = (
    "network data batch target early_stop variant phase steps seconds seconds_p25 seconds_p75 n extrapolated naive_ratio folded_ratio "
    "same_as_full step ms_per_step computed alive measured_commit measured_date note"
).split()


def _order(row: dict[str, Any]) -> dict[str, Any]:
    return {column: row.get(column) for column in COLUMNS}


def _row(
    case: dict[str, Any],
    variant: str,
    seconds: Spread,
    steps: int,
    dates: dict[str, Any],
    *,
    extrapolated: bool,
) -> dict[str, Any]:
    row = {**case, "variant": variant, "phase": "whole", "steps": steps, "n": seconds.n}
    row |= {"seconds": seconds.median, "seconds_p25": seconds.low, "seconds_p75": seconds.high}
    row |= {name: dates[name] for name in ("measured_commit", "measured_date")}
    return row | {"extrapolated": extrapolated, "note": ""}


def _along_line(case: dict[str, Any], points: list[dict[str, Any]]) -> dict[str, str]:
    """At most eight points of one search in a line."""
    line = {"network": case["network"], "r": f"{case['target']:g}"}
    line["early stop"] = "yes" if case["early_stop"] else "no"
    chosen = points[:: max(math.ceil(len(points) / 8), 1)]
    chosen += points[-1:] if chosen[-1] is not points[-1] else []
    for key, title in (("step", "step"), ("ms_per_step", "ms a step")):
        line[title] = ", ".join(f"{point[key]:.0f}" for point in chosen)
    for key, title in (("computed", "channels computed %"), ("alive", "alive %")):
        line[title] = ", ".join(f"{100 * point[key]:.0f}" for point in chosen)
    return line
