"""A whole search step at full width, before any channel is left out: time, memory and roofline of every variant."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.roofline import Work, step_floor
from benchmarks.settings import NETWORKS, Settings
from benchmarks.steps import EAGER, Steps, all_steps
from benchmarks.tables import Case, mib, timing_rows
from benchmarks.timing import time_variants

TITLE = "One search step at full width"


def random_batch(name: str, settings: Settings) -> tuple[Tensor, Tensor]:
    """Images [N, 3, H, W] and labels [N] on the device."""
    network, batch = NETWORKS[name], settings.batch(name)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, network.size, network.size, generator=generator)
    labels = torch.randint(network.classes, (batch,), generator=generator)
    return images.to(settings.device), labels.to(settings.device)


def build(name: str, settings: Settings) -> tuple[Steps, Work, Tensor, Tensor]:
    """The variants of a network, what a step of it must do, and a batch."""
    torch.manual_seed(0)
    model = NETWORKS[name].build()
    images, labels = random_batch(name, settings)
    steps = all_steps(model, images, settings)
    return steps, Work.of(model, steps.norms, NETWORKS[name].size), images, labels


def run(settings: Settings) -> Iterator[Case]:
    for name in settings.chosen():
        yield measure(name, settings)


def measure(name: str, settings: Settings) -> Case:
    built, work, images, labels = build(name, settings)
    steps, batch = built.steps, len(images)
    variants = {v: step.timed(images, labels) for v, step in steps.items()}
    timings = time_variants(variants, device=settings.device, effort=settings.profile.effort)
    memory = {v: step.footprint(images, labels) for v, step in steps.items()}
    floors = {
        v: step_floor(work, v.removesuffix(EAGER), step.precision, batch, settings.ceilings)
        for v, step in steps.items()
    }
    shares = {v: floors[v]["floor_ms"] / timings.time(v).median for v in steps}
    case = {"network": name, "batch": batch}
    rows = timing_rows(
        case,
        timings,
        baseline_of="ours",
        skipped=built.skipped,
        precision={v: step.precision for v, step in steps.items()},
        saved_bytes={v: saved for v, (saved, _) in memory.items()},
        peak_bytes={v: peak for v, (_, peak) in memory.items()},
        **{key: {v: floors[v][key] for v in steps} for key in ("gflop", "gbyte", "floor_ms")},
        floor_share=shares,
    )
    # Every step is one phase, so the total repeats it.
    rows = [row for row in rows if row["phase"] == "total"]
    lines = []
    for variant, step in steps.items():
        saved, peak = memory[variant]
        line = {**case, "variant": variant, "precision": step.precision}
        line |= {"ms": timings.time(variant), "x ours": timings.ratio(variant, "ours")}
        line |= {"saved MiB": mib(saved), "peak MiB": mib(peak)}
        line |= {"floor ms": floors[variant]["floor_ms"], "of the floor": f"{shares[variant]:.0%}"}
        lines.append(line)
    lines += [
        {**case, "variant": variant, "ms": f"not run: {reason}"}
        for variant, reason in built.skipped.items()
    ]
    return Case(rows, {TITLE: lines})
