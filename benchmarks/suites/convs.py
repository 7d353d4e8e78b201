"""Convolutions of the paper's CIFAR networks on the CPU: channels_last, 3x3, stride 1, padding 1; float32, and bfloat16
where a search would take that.

- direct: ``F.conv2d``, and ``at::convolution`` of the output's gradient, as ``pfs_fast.ops.frozen_conv`` calls them;
- winograd2, winograd4: ``pfs_fast.ops.winograd_conv`` with tile 2 and 4.

Forward, and the gradient for the input alone. ``chosen`` is the tile that a search uses (``pfs_fast.gating.winograd``; 0: direct). The
relative error against float64 is that of the output, for the first 8 images.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.settings import Settings
from benchmarks.tables import Case, timing_rows
from benchmarks.timing import Clock, Variant, time_variants
from pfs_fast import ops
from pfs_fast.gating import winograd
from pfs_fast.searching.config import PRECISIONS

TITLE = "`winograd_conv` against PyTorch's convolution"
# C_in, C_out, height = width
LAYERS = {
    "resnet20": ((3, 16, 32), (16, 16, 32), (32, 32, 16), (64, 64, 8)),
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
}
TILES = (2, 4)
ONE = [1, 1]


def run(settings: Settings) -> Iterator[Case]:
    if settings.device.type != "cpu":
        line = {"not run": "these kernels are the CPU's; on CUDA cuDNN convolves"}
        yield Case([], {TITLE: [line]})
        return
    for network in settings.chosen(tuple(LAYERS)):
        for layer in LAYERS.get(network, ()):
            for precision in dict.fromkeys(("fp32", settings.native)):
                yield measure(layer, precision, settings)


@torch.inference_mode()
def measure(layer: tuple[int, int, int], precision: str, settings: Settings) -> Case:
    """Rows and line of one layer."""
    c_in, c_out, size = layer
    dtype = PRECISIONS[precision]
    batch = settings.profile.batch
    generator = torch.Generator().manual_seed(0)

    def values(*shape: int) -> Tensor:
        dense = torch.randn(shape, generator=generator).to(dtype)
        return dense.contiguous(memory_format=torch.channels_last)

    x, grad_y = values(batch, c_in, size, size), values(batch, c_out, size, size)
    weight = values(c_out, c_in, 3, 3)

    def direct(clock: Clock) -> None:
        F.conv2d(x, weight, None, 1, 1)
        clock.lap("forward")
        torch.ops.aten.convolution(grad_y, weight, None, ONE, ONE, ONE, True, [0, 0], 1)
        clock.lap("backward")

    def by_tiles(tile: int) -> Variant:
        def timed(clock: Clock) -> None:
            ops.winograd_conv(x, weight, None, 1, tile=tile)
            clock.lap("forward")
            torch.ops.pfs_fast._winograd_conv_backward(grad_y, weight, ONE, tile)
            clock.lap("backward")

        return timed

    variants = {"direct": direct} | {f"winograd{m}": by_tiles(m) for m in TILES}
    timings = time_variants(variants, device=x.device, effort=settings.profile.effort)
    few = x[:8]
    exact = F.conv2d(few.double(), weight.double(), None, 1, 1)
    outputs = {"direct": F.conv2d(few, weight, None, 1, 1)} | {
        f"winograd{m}": ops.winograd_conv(few, weight, None, 1, tile=m) for m in TILES
    }
    errors = {v: ((y - exact).norm() / exact.norm()).item() for v, y in outputs.items()}
    conv = torch.nn.Conv2d(c_in, c_out, 3, padding=1, dtype=dtype)
    case = {
        "layer": f"{c_in}->{c_out} {size}x{size}",
        "precision": precision,
        "batch": batch,
        "chosen": winograd.tile_of(conv, x),
    }
    rows = timing_rows(case, timings, baseline_of="direct", error=errors)
    line: dict[str, object] = {**case, "direct ms": timings.time("direct")}
    flops = 2 * 9 * c_in * c_out * size * size * batch
    line["direct GFLOP/s"] = f"{flops / timings.time('direct', 'forward').median / 1e6:.0f}"
    for m in TILES:
        line[f"direct / tile {m} forward"] = timings.ratio("direct", f"winograd{m}", "forward")
        line[f"direct / tile {m} backward"] = timings.ratio("direct", f"winograd{m}", "backward")
    line["error direct, 2, 4"] = ", ".join(f"{error:.1e}" for error in errors.values())
    return Case(rows, {TITLE: [line]})
