"""Times ``bn_gate_act`` against plain PyTorch: forward, backward, and what autograd keeps.

Run: ``python -m benchmarks.ops.bench_bn_gate_act --device cpu --threads 2 --out results.csv``.

Variants; x and gate get gradients, batch statistics, ReLU:

- naive: batch_norm, multiply by the gate, (add,) relu, as published implementations do;
- folded: the gate folded into the affine of batch_norm, the best that plain PyTorch has;
- reference: the twin in ``pfs_fast.ops.reference``;
- fused: ``pfs_fast.ops.bn_gate_act``.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import common
from pfs_fast import ops
from pfs_fast.ops import reference

SHAPES = ((128, 16, 32, 32), (128, 64, 32, 32), (16, 64, 56, 56), (128, 512, 4, 4))
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Layer:
    """Inputs of one gated layer."""

    x: Tensor  # [N, C, H, W]
    gate: Tensor  # [C]
    weight: Tensor  # [C]
    bias: Tensor  # [C]
    residual: Tensor | None  # as x
    grad_y: Tensor  # as x

    @classmethod
    def random(
        cls, shape: tuple[int, ...], dtype: str, layout: str, residual: bool, device: torch.device
    ) -> Layer:
        """Normal values; gates in [0, 1)."""
        generator = torch.Generator(device).manual_seed(0)

        def values() -> Tensor:
            dense = torch.randn(shape, generator=generator, device=device).to(DTYPES[dtype])
            return dense.to(memory_format=LAYOUTS[layout])

        def per_channel() -> Tensor:
            return torch.rand(shape[1], generator=generator, device=device)

        return cls(
            x=values().requires_grad_(),
            gate=per_channel().requires_grad_(),
            weight=per_channel() + 0.5,
            bias=per_channel() - 0.5,
            residual=values().requires_grad_() if residual else None,
            grad_y=values(),
        )

    @property
    def inputs(self) -> list[Tensor]:
        """What gets a gradient."""
        return [self.x, self.gate] + ([] if self.residual is None else [self.residual])


def naive(layer: Layer) -> Tensor:
    """Batch norm, gate, add, relu: one operator after the other."""
    y = F.batch_norm(layer.x, None, None, layer.weight, layer.bias, training=True)
    y = y * layer.gate.view(1, -1, 1, 1).to(y.dtype)
    return F.relu(y if layer.residual is None else y + layer.residual)


def folded(layer: Layer) -> Tensor:
    """The gate folded into the affine parameters."""
    weight, bias = layer.gate * layer.weight, layer.gate * layer.bias
    y = F.batch_norm(layer.x, None, None, weight, bias, training=True)
    return F.relu(y if layer.residual is None else y + layer.residual)


def twin(layer: Layer) -> Tensor:
    """The plain-PyTorch definition of the operator."""
    return reference.bn_gate_act(layer.x, layer.gate, layer.weight, layer.bias, layer.residual)


def fused(layer: Layer) -> Tensor:
    """The operator."""
    return ops.bn_gate_act(layer.x, layer.gate, layer.weight, layer.bias, layer.residual)


CHAINS: dict[str, Callable[[Layer], Tensor]] = {
    "naive": naive,
    "folded": folded,
    "reference": twin,
    "fused": fused,
}


def step(chain: Callable[[Layer], Tensor], layer: Layer) -> common.Variant:
    """Forward and backward, timed apart."""

    def run(clock: common.Clock) -> None:
        y = chain(layer)
        clock.lap("forward")
        torch.autograd.grad(y, layer.inputs, layer.grad_y)
        clock.lap("backward")

    return run


def measure(case: dict, device: torch.device, repeats: int) -> tuple[list[dict], dict]:
    """CSV rows of one case, and its line of the table."""
    layer = Layer.random(**case, device=device)
    variants = {name: step(chain, layer) for name, chain in CHAINS.items()}
    timings = common.time_variants(variants, device=device, repeats=repeats)
    size = layer.x.numel() * layer.x.element_size()
    saved = {
        # Vectors of length C are left out: a bitmask is 1/32 of a float32 tensor.
        name: common.saved_bytes(lambda chain=chain: chain(layer), min_bytes=size // 64)
        for name, chain in CHAINS.items()
    }
    peak = {
        name: common.peak_bytes(lambda v=variant: v(common.Clock(device)), device)
        for name, variant in variants.items()
    }
    named = {**case, "shape": "x".join(map(str, case["shape"]))}
    rows = common.timing_rows(
        named, timings, baseline_of="fused", saved_bytes=saved, peak_bytes=peak
    )
    line = dict(named)
    for phase in ("forward", "backward"):
        line[f"fused {phase} ms"] = timings.time("fused", phase)
    for name in CHAINS:
        if name != "fused":
            line[f"{name} / fused"] = timings.ratio(name, "fused")
    for name in ("naive", "folded", "fused"):
        line[f"saved MiB {name}"] = f"{saved[name] / 2**20:.2f}"
    return rows, line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--repeats", type=int, default=15, help="rounds per case")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=DTYPES)
    parser.add_argument("--layout", nargs="+", default=list(LAYOUTS), choices=LAYOUTS)
    parser.add_argument(
        "--shape",
        nargs="+",
        default=["x".join(map(str, shape)) for shape in SHAPES],
        metavar="NxCxHxW",
    )
    parser.add_argument("--residual", nargs="+", default=["no"], choices=("no", "yes"))
    parser.add_argument("--out", type=Path, help="CSV file to append to")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    machine = common.Machine.here(device)
    print(f"{machine}\n", flush=True)
    lines = []
    cases = itertools.product(
        arguments.layout, arguments.dtype, arguments.residual, arguments.shape
    )
    for layout, dtype, residual, shape in cases:
        case = {
            "shape": tuple(int(size) for size in shape.split("x")),
            "dtype": dtype,
            "layout": layout,
            "residual": residual == "yes",
        }
        rows, line = measure(case, device, arguments.repeats)
        lines.append(line)
        if arguments.out is not None:
            common.append_csv(arguments.out, rows, machine)
    print(common.markdown_table(lines))


if __name__ == "__main__":
    main()
