"""Memory of one search step of every network: saved activations and the peak, against the naive variant.

- saved: bytes of all storages that autograd keeps between forward and backward, each once, the images included, weights, buffers
  and per-channel vectors left out;
- peak: most bytes allocated at once during the step, above what was there before it: saved activations, temporaries and gradients.
  The second step of a run is measured, after everything that is allocated once. See ``benchmarks/footprint.py``.
"""

from __future__ import annotations

from collections.abc import Iterator

from benchmarks.settings import Settings
from benchmarks.suites.step import build
from benchmarks.tables import Case, mib

TITLE = "Memory of one search step"
TARGET = 0.4  # of the naive variant's peak


def run(settings: Settings) -> Iterator[Case]:
    for name in settings.chosen():
        yield measure(name, settings)


def measure(name: str, settings: Settings) -> Case:
    built, _, images, labels = build(name, settings)
    found: dict[str, tuple[int, int]] = {}
    for variant, step in built.steps.items():
        if step.eager:
            with step.around():
                step.take(step.place(images), labels)
            found[variant] = step.footprint(images, labels)
    case = {"network": name, "batch": len(images)}
    naive_saved, naive_peak = found["naive"]
    rows, line = [], dict(case)
    for variant, (saved, peak) in found.items():
        row = {**case, "variant": variant, "precision": built.steps[variant].precision}
        row |= {"saved_bytes": saved, "peak_bytes": peak}
        row |= {"saved_share": saved / naive_saved, "peak_share": peak / naive_peak}
        rows.append(row)
        line[f"{variant} saved / peak MiB"] = f"{mib(saved)} / {mib(peak)}"
    saved, peak = found["ours"]
    line["ours / naive saved"] = f"{saved / naive_saved:.2f}"
    line["ours / naive peak"] = f"{peak / naive_peak:.2f}"
    line[f"peak <= {TARGET}"] = "yes" if peak <= TARGET * naive_peak else "no"
    return Case(rows, {TITLE: [line]})
