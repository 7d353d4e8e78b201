"""Times one whole step of the gate search (forward, backward, gate update) against plain PyTorch.

Run: ``python -m benchmarks.bench_search_step --device cpu --threads 2 --out results.csv``.

Variants: ``naive`` and ``folded`` of :mod:`benchmarks.baselines`; ``fused``: the step of ``pfs_fast.search`` at full width, before
any channel was left out.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import pfs_fast as pfs
from benchmarks import common
from benchmarks.baselines import PlainSearch
from pfs_fast.config import PRECISIONS, compute_dtype
from pfs_fast.plan import prepare

NETWORKS = {
    "vgg16": (10, 32),
    "resnet20": (10, 32),
    "resnet56": (10, 32),
    "mobilenet_v2": (1000, 224),
    "resnet50": (1000, 224),
}


def steps(
    name: str, batch: int, precision: str, device: torch.device
) -> dict[str, tuple[Callable[[Tensor, Tensor], None], Tensor, Tensor]]:
    """The step of each variant with its images and labels, as they lie on the device."""
    classes, size = NETWORKS[name]
    torch.manual_seed(0)
    model = pfs.models.get(name, num_classes=classes)
    images = torch.randn(batch, 3, size, size, device=device)
    labels = torch.randint(classes, (batch,), device=device)
    dtype = compute_dtype(precision, device)
    config = pfs.SearchConfig(precision=precision, compact=False)
    loop = prepare(model, images, pfs.Budget(0.5), config, device=device).loop
    norms = loop.bank.layers
    variants: dict[str, tuple[Callable[[Tensor, Tensor], None], Tensor, Tensor]] = {}
    for variant, folded in (("naive", False), ("folded", True)):
        own = dtype if folded else torch.float32
        plain = PlainSearch(model, norms, folded=folded, dtype=own, device=device)
        variants[variant] = plain.step, plain.place(images), labels
    placed = images.to(dtype, memory_format=torch.channels_last)
    variants["fused"] = loop.step, placed, labels
    return variants


def measure(
    name: str, batch: int, precision: str, device: torch.device, repeats: int
) -> tuple[list[dict], dict]:
    """CSV rows of one network, and its line of the table."""
    variants = steps(name, batch, precision, device)

    def timed(variant: str) -> common.Variant:
        step, images, labels = variants[variant]

        def run(clock: common.Clock) -> None:
            step(images, labels)
            clock.lap("step")

        return run

    timings = common.time_variants({v: timed(v) for v in variants}, device=device, repeats=repeats)
    saved = {
        v: common.saved_bytes(lambda v=v: variants[v][0](*variants[v][1:]), min_bytes=2**14)
        for v in variants
    }
    peak = {
        v: common.peak_bytes(lambda v=v: variants[v][0](*variants[v][1:]), device) for v in variants
    }
    dtype = next(p for p, d in PRECISIONS.items() if d == compute_dtype(precision, device))
    case = {"network": name, "batch": batch, "precision": dtype}
    rows = common.timing_rows(
        case, timings, baseline_of="fused", saved_bytes=saved, peak_bytes=peak
    )
    line = dict(case)
    for variant in variants:
        line[f"{variant} ms"] = timings.time(variant)
    for variant in ("naive", "folded"):
        line[f"{variant} / fused"] = timings.ratio(variant, "fused")
    for variant in variants:
        line[f"saved MiB {variant}"] = f"{saved[variant] / 2**20:.0f}"
    return rows, line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="rounds per network")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument(
        "--network", nargs="+", default=["vgg16", "resnet20", "resnet56"], choices=NETWORKS
    )
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    machine = common.Machine.here(device)
    print(f"{machine}\n", flush=True)
    lines = []
    for name in arguments.network:
        rows, line = measure(name, arguments.batch, arguments.precision, device, arguments.repeats)
        lines.append(line)
        if arguments.out is not None:
            common.append_csv(arguments.out, rows, machine)
    print(common.markdown_table(lines))


if __name__ == "__main__":
    main()
