"""Single operators against plain PyTorch: forward, backward, and what autograd keeps.

``bn_gate_act``; x and gate get gradients, batch statistics, ReLU:

- naive: batch_norm, multiply by the gate, (add,) relu, as published implementations do;
- folded: the gate folded into the affine of batch_norm, the best that plain PyTorch has;
- ours: ``pfs_fast.ops.bn_gate_act``.

``frozen_conv``; x gets a gradient:

- naive: conv2d whose weight gets one too;
- folded: conv2d with a frozen weight;
- ours: ``pfs_fast.ops.frozen_conv``.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.footprint import peak_bytes, saved_bytes
from benchmarks.settings import Settings
from benchmarks.tables import Case, mib, timing_rows
from benchmarks.timing import TOTAL, Clock, Variant, time_variants
from pfs_fast import ops
from pfs_fast.searching.config import PRECISIONS

LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
CPU_MAPS = ((128, 16, 32, 32), (128, 64, 32, 32), (16, 64, 56, 56), (128, 512, 4, 4))
# The large layers of ResNet-50 at batch 256, then two of CIFAR networks.
CUDA_MAPS = (
    (256, 64, 112, 112),
    (256, 256, 56, 56),
    (256, 512, 28, 28),
    (128, 64, 32, 32),
    (128, 16, 32, 32),
)
# Maps, output channels, kernel.
CPU_CONVS = (((128, 16, 32, 32), 16, 3), ((32, 64, 32, 32), 64, 3), ((128, 512, 4, 4), 512, 3))
CUDA_CONVS = (((256, 64, 56, 56), 64, 3), ((256, 256, 56, 56), 64, 1), ((128, 64, 32, 32), 64, 3))
# Passes over the maps, forward and backward; a residual adds those of RESIDUAL_PASSES. See benchmarks/roofline.py, which counts the
# sum of gradients at a fork too: there is none here.
PASSES = {"naive": (7, 14), "folded": (5, 8), "ours": (3, 5)}
RESIDUAL_PASSES = {"naive": (3, 0), "folded": (3, 0), "ours": (1, 1)}


@dataclass(frozen=True)
class Chain:
    """One variant of an operator on fixed inputs, and the least that it has to do.

    Attributes:
        forward: Makes y.
        inputs: What gets a gradient.
        flops: Forward and backward.
        nbytes: Forward and backward.
    """

    forward: Callable[[], Tensor]
    inputs: list[Tensor]
    flops: tuple[float, float]
    nbytes: tuple[float, float]

    def timed(self, grad_y: Tensor) -> Variant:
        """Forward and backward, timed apart."""

        def run(clock: Clock) -> None:
            y = self.forward()
            clock.lap("forward")
            torch.autograd.grad(y, self.inputs, grad_y)
            clock.lap("backward")

        return run


def _values(shape: tuple[int, ...], case: dict, device: torch.device) -> Tensor:
    dense = torch.randn(shape, device=device).to(PRECISIONS[case["precision"]])
    return dense.contiguous(memory_format=LAYOUTS[case["layout"]])


def norm_chains(
    shape: tuple[int, ...], residual: bool, case: dict, device: torch.device
) -> tuple[dict[str, Chain], Tensor]:
    """The variants of ``bn_gate_act`` on inputs of one shape, and the gradient of y."""
    x, grad_y = _values(shape, case, device).requires_grad_(), _values(shape, case, device)
    gate, weight, bias = torch.rand(3, shape[1], device=device)
    gate, weight, bias = gate.clone().requires_grad_(), weight + 0.5, bias - 0.5
    other = _values(shape, case, device).requires_grad_() if residual else None

    def activate(y: Tensor) -> Tensor:
        return F.relu(y if other is None else y + other)

    def naive() -> Tensor:
        y = F.batch_norm(x, None, None, weight, bias, training=True)
        return activate(y * gate.view(1, -1, 1, 1).to(y.dtype))

    def folded() -> Tensor:
        return activate(F.batch_norm(x, None, None, gate * weight, gate * bias, training=True))

    def ours() -> Tensor:
        return ops.bn_gate_act(x, gate, weight, bias, other)

    size, mask = x.numel() * x.element_size(), x.numel() / 8
    chains = {}
    for name, forward in {"naive": naive, "folded": folded, "ours": ours}.items():
        nbytes = [size * p for p in PASSES[name]]
        if residual:
            nbytes = [n + size * p for n, p in zip(nbytes, RESIDUAL_PASSES[name], strict=True)]
        if residual and name == "ours":
            nbytes = [nbytes[0] + mask, nbytes[1] + 2 * mask]
        inputs = [x, gate] if other is None else [x, gate, other]
        chains[name] = Chain(forward, inputs, (0.0, 0.0), (nbytes[0], nbytes[1]))
    return chains, grad_y


def conv_chains(
    shape: tuple[int, ...], outputs: int, kernel: int, case: dict, device: torch.device
) -> tuple[dict[str, Chain], Tensor]:
    """The variants of ``frozen_conv``, stride 1, and the gradient of y."""
    x = _values(shape, case, device).requires_grad_()
    grad_y = _values((shape[0], outputs, *shape[2:]), case, device)
    frozen = _values((outputs, shape[1], kernel, kernel), case, device)
    trained, padding = frozen.clone().requires_grad_(), kernel // 2
    flops = 2.0 * grad_y.numel() * frozen[0].numel()
    nbytes = float(sum(t.numel() * t.element_size() for t in (x, grad_y, frozen)))
    one, two = ((flops, flops), (nbytes, nbytes)), ((flops, 2 * flops), (nbytes, 2 * nbytes))
    chains = {
        "naive": Chain(lambda: F.conv2d(x, trained, None, 1, padding), [x, trained], *two),
        "folded": Chain(lambda: F.conv2d(x, frozen, None, 1, padding), [x], *one),
        "ours": Chain(lambda: ops.frozen_conv(x, frozen, None, 1, padding), [x], *one),
    }
    return chains, grad_y


def run(settings: Settings) -> Iterator[Case]:
    cuda = settings.device.type == "cuda"
    native = tuple(dict.fromkeys(("fp32", settings.native)))
    precisions, layouts = native, ["channels_last"]
    if settings.profile.every_op_case:
        precisions, layouts = ("fp32", "bf16"), list(LAYOUTS)
    torch.manual_seed(0)
    maps, convs = (CUDA_MAPS, CUDA_CONVS) if cuda else (CPU_MAPS, CPU_CONVS)
    for precision, layout in itertools.product(precisions, layouts):
        case = {"precision": precision, "layout": layout}
        for shape, residual in [*((shape, False) for shape in maps), (maps[1], True)]:
            chains, grad_y = norm_chains(shape, residual, case, settings.device)
            name = "x".join(map(str, shape)) + (" + residual" if residual else "")
            yield measure({"op": "bn_gate_act", "shape": name, **case}, chains, grad_y, settings)
    for precision, (shape, outputs, kernel) in itertools.product(native, convs):
        case = {"precision": precision, "layout": "channels_last"}
        chains, grad_y = conv_chains(shape, outputs, kernel, case, settings.device)
        name = "x".join(map(str, shape)) + f" -> {outputs}, {kernel}x{kernel}"
        yield measure({"op": "frozen_conv", "shape": name, **case}, chains, grad_y, settings)


def measure(case: dict, chains: dict[str, Chain], grad_y: Tensor, settings: Settings) -> Case:
    """Rows and line of one case."""
    device, effort = settings.device, settings.profile.effort
    variants = {name: chain.timed(grad_y) for name, chain in chains.items()}
    timings = time_variants(variants, device=device, effort=effort)
    # A mask of one bit a value counts, vectors of one value a channel do not.
    least = max(grad_y.numel() // 16, 1)
    saved = {name: saved_bytes(c.forward, min_bytes=least) for name, c in chains.items()}
    peak = {
        name: peak_bytes(lambda v=variant: v(Clock(device)), device)
        for name, variant in variants.items()
    }
    floors = {name: _floors(chain, case["precision"], settings) for name, chain in chains.items()}
    shares = {
        name: {phase: ms / timings.time(name, phase).median for phase, ms in phases.items()}
        for name, phases in floors.items()
    }
    rows = timing_rows(
        case,
        timings,
        baseline_of="ours",
        saved_bytes=saved,
        peak_bytes=peak,
        floor_ms=floors,
        floor_share=shares,
    )
    line = {key: value for key, value in case.items() if key != "op"}
    for phase in ("forward", "backward"):
        line[f"ours {phase} ms"] = timings.time("ours", phase)
    line["floor ms"] = floors["ours"][TOTAL]
    line["of the floor"] = f"{shares['ours'][TOTAL]:.0%}"
    for name in ("naive", "folded"):
        line[f"{name} / ours"] = timings.ratio(name, "ours")
    line["saved MiB naive, folded, ours"] = ", ".join(str(mib(saved[name])) for name in chains)
    return Case(rows, {f"`{case['op']}`": [line]})


def _floors(chain: Chain, precision: str, settings: Settings) -> dict[str, float]:
    """Least ms by phase."""
    passes = zip(("forward", "backward"), chain.flops, chain.nbytes, strict=True)
    floors = {
        phase: settings.ceilings.ms(flops, nbytes, precision) for phase, flops, nbytes in passes
    }
    return floors | {TOTAL: sum(floors.values())}
