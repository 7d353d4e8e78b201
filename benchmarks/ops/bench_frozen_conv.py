"""Times ``winograd_conv`` against PyTorch's own convolution on the layers of the paper's CIFAR networks.

Run: ``python -m benchmarks.ops.bench_frozen_conv --threads 2 --out results.csv``.

Float32 on the CPU, channels_last, 3x3, stride 1, padding 1; forward, and the gradient for the input alone. Variants:

- direct: ``F.conv2d``, and ``at::convolution`` of the output's gradient, as ``pfs_fast.ops.frozen_conv`` calls them;
- winograd2, winograd4: ``pfs_fast.ops.winograd_conv`` with tile 2 and 4.

The column ``chosen`` is the tile that a search uses (``pfs_fast.winograd``, 0: direct); the relative errors, of the output
against float64, are those of the first 8 images.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from pfs_fast import ops, winograd

# C_in, C_out, height = width
LAYERS = {
    "resnet": ((3, 16, 32), (16, 16, 32), (32, 32, 16), (64, 64, 8)),
    "vgg16": (
        (3, 64, 32),
        (64, 64, 32),
        (64, 128, 16),
        (128, 128, 16),
        (128, 256, 8),
        (256, 256, 8),
        (256, 512, 4),
        (512, 512, 4),
        (512, 512, 2),
    ),
    "narrow": ((8, 8, 32), (12, 20, 16), (40, 40, 8), (80, 80, 8)),
}
TILES = (2, 4)
ONE = [1, 1]


def direct(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, None, 1, 1)


def direct_backward(grad_y: Tensor, weight: Tensor) -> Tensor:
    return torch.ops.aten.convolution(grad_y, weight, None, ONE, ONE, ONE, True, [0, 0], 1)


def measure(layer: tuple[int, int, int], batch: int, repeats: int) -> tuple[list[dict], dict]:
    """CSV rows of one layer, and its line of the table."""
    c_in, c_out, size = layer
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        dense = torch.randn(shape, generator=generator)
        return dense.contiguous(memory_format=torch.channels_last)

    x, grad_y = values(batch, c_in, size, size), values(batch, c_out, size, size)
    weight = values(c_out, c_in, 3, 3)

    def run_direct(clock: common.Clock) -> None:
        direct(x, weight)
        clock.lap("forward")
        direct_backward(grad_y, weight)
        clock.lap("backward")

    def run_winograd(tile: int) -> common.Variant:
        def run(clock: common.Clock) -> None:
            ops.winograd_conv(x, weight, None, 1, tile=tile)
            clock.lap("forward")
            torch.ops.pfs_fast._winograd_conv_backward(grad_y, weight, ONE, tile)
            clock.lap("backward")

        return run

    variants = {"direct": run_direct} | {f"winograd{m}": run_winograd(m) for m in TILES}
    timings = common.time_variants(variants, device=x.device, repeats=repeats)
    few = x[:8]
    exact = direct(few.double(), weight.double())
    outputs = {"direct": direct(few, weight)} | {
        f"winograd{m}": ops.winograd_conv(few, weight, None, 1, tile=m) for m in TILES
    }
    errors = {v: ((y - exact).norm() / exact.norm()).item() for v, y in outputs.items()}
    chosen = winograd.tile_for(batch, c_in, c_out, size, size)
    case = {"layer": f"{c_in}->{c_out} {size}x{size}", "batch": batch, "chosen": chosen}
    rows = common.timing_rows(case, timings, baseline_of="direct", error=errors)
    line: dict[str, object] = {**case, "direct ms": timings.time("direct")}
    flops = 2 * 9 * c_in * c_out * size * size * batch
    line["direct GFLOP/s"] = f"{flops / timings.time('direct', 'forward').median / 1e6:.0f}"
    for m in TILES:
        line[f"direct / tile {m} forward"] = timings.ratio("direct", f"winograd{m}", "forward")
        line[f"direct / tile {m} backward"] = timings.ratio("direct", f"winograd{m}", "backward")
    line["error direct, 2, 4"] = ", ".join(f"{error:.1e}" for error in errors.values())
    return rows, line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="rounds per layer")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--network", nargs="+", default=list(LAYERS), choices=LAYERS)
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    return parser.parse_args()


@torch.inference_mode()
def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    machine = common.Machine.here(torch.device("cpu"))
    print(f"{machine}\n", flush=True)
    lines = []
    for network in arguments.network:
        for layer in LAYERS[network]:
            rows, line = measure(layer, arguments.batch, arguments.repeats)
            lines.append(line)
            if arguments.out is not None:
                common.append_csv(arguments.out, rows, machine)
    print(common.markdown_table(lines))


if __name__ == "__main__":
    main()
