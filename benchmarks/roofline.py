"""What the machine can do, measured, and what a step must do, counted: the least time that a step could take.

A pass is one read or write of all values of a tensor. Passes over the outputs of a normalised layer, forward + backward:

- naive: batch norm 3 + 5, gate 2 + 6, activation 2 + 3, residual sum 3 + 3;
- folded, compiled: the same without the gate. A compiler fuses some of these passes, so it may come below the model;
- ours: 3 + 5 for batch norm, gate and activation together; 1 + 2 for the residual, and its mask of one bit written once and
  read twice.

Convolutions take the longer of their arithmetic and their traffic, one by one: forward and input gradient (the first has none),
for ``naive`` the weight gradient too. Pools, the loss and the optimiser are not counted. Where tensors stay in a cache, a step can be
faster than the model, whose traffic is all charged at copy bandwidth.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.timing import synchronize
from pfs_fast.searching.config import PRECISIONS


@dataclass(frozen=True)
class Ceilings:
    """Measured limits of the machine.

    Attributes:
        copy_gbs: Copy bandwidth in GB/s; bytes read plus bytes written.
        gemm_gflops: Peak of a large matrix product in GFLOP/s, by precision.
    """

    copy_gbs: float
    gemm_gflops: dict[str, float]

    @classmethod
    def measure(cls, device: torch.device, precisions: Iterable[str]) -> Ceilings:
        """The best of several repeats each."""
        cuda = device.type == "cuda"
        count = 2**28 if cuda else 2**26
        source, target = torch.ones(2, count, device=device)
        bandwidth = 8 * count / _best_seconds(lambda: target.copy_(source), device) / 1e9
        size, peaks = 8192 if cuda else 2048, {}
        for precision in precisions:
            a, b = torch.randn(2, size, size, device=device).to(PRECISIONS[precision])
            peaks[precision] = 2 * size**3 / _best_seconds(lambda a=a, b=b: a @ b, device) / 1e9
        return cls(bandwidth, peaks)

    def ms(self, flops: float, nbytes: float, precision: str) -> float:
        """The longer of arithmetic and traffic."""
        arithmetic = flops / self.gemm_gflops[precision] if flops else 0.0
        return max(arithmetic, nbytes / self.copy_gbs) / 1e6

    def __str__(self) -> str:
        peaks = ", ".join(f"{name} {peak:.0f} GFLOP/s" for name, peak in self.gemm_gflops.items())
        return f"copy {self.copy_gbs:.1f} GB/s, matrix product {peaks}"


def _best_seconds(run: Callable[[], object], device: torch.device, repeats: int = 7) -> float:
    # TensorFloat-32, as PyTorch's convolutions use it by default.
    allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, True
    times = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        times.append(time.perf_counter() - start)
    torch.backends.cuda.matmul.allow_tf32 = allowed
    return min(times[1:])


@dataclass(frozen=True)
class Conv:
    """Counts of one convolution or linear layer, for one image; weights for all."""

    macs: int
    inputs: int
    outputs: int
    weights: int


@dataclass(frozen=True)
class Work:
    """Counts of one network, for one image: convolutions, and values that pass through each kind of operation."""

    convs: tuple[Conv, ...]
    norm: int
    gated: int
    act: int
    add: int

    @classmethod
    def of(cls, model: nn.Module, norms: Iterable[str], size: int) -> Work:
        """Of a plain model on images [3, size, size], counted while it runs on no data."""
        model = copy.deepcopy(model).to("meta").train()
        convs: list[Conv] = []
        values = {"norm": 0, "gated": 0}
        gated = set(norms)

        def layer(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
            weight, batch = module.weight, len(y)
            macs = y.numel() * weight[0].numel()
            sizes = (macs // batch, inputs[0].numel() // batch, y.numel() // batch)
            convs.append(Conv(*sizes, weight.numel()))

        def norm(name: str) -> Callable[..., None]:
            def count(module: nn.Module, inputs: tuple[Tensor, ...], y: Tensor) -> None:
                values["norm"] += y[0].numel()
                values["gated"] += y[0].numel() if name in gated else 0

            return count

        for name, module in model.named_modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.register_forward_hook(layer)
            elif isinstance(module, nn.BatchNorm2d):
                module.register_forward_hook(norm(name))
        with torch.no_grad(), _Elementwise() as seen:
            model(torch.empty(2, 3, size, size, device="meta"))
        return cls(tuple(convs), act=seen.act, add=seen.add, **values)

    def traffic(self, variant: str, itemsize: int) -> float:
        """Bytes of everything but convolutions, for one image."""
        if variant == "ours":
            return (8 * self.norm + 3 * self.add) * itemsize + 3 * self.add / 8
        passes = 8 * self.norm + 5 * self.act + 6 * self.add
        return (passes + (8 * self.gated if variant == "naive" else 0)) * itemsize

    def conv_work(self, variant: str, itemsize: int, batch: int) -> list[tuple[float, float]]:
        """FLOPs and bytes of every pass of every convolution."""
        passes = []
        for index, conv in enumerate(self.convs):
            nbytes = (batch * (conv.inputs + conv.outputs) + conv.weights) * itemsize
            runs = 1 + (index > 0) + (variant == "naive")
            passes += [(2.0 * conv.macs * batch, float(nbytes))] * runs
        return passes


class _Elementwise(TorchDispatchMode):
    """Counts the values of one image that pass through activations and through sums of maps."""

    def __init__(self) -> None:
        super().__init__()
        self.act = self.add = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__.rstrip("_")
        if isinstance(out, Tensor) and out.dim() == 4:
            if name in ("relu", "hardtanh"):
                self.act += out[0].numel()
            elif name == "add":
                self.add += out[0].numel()
        return out


def step_floor(
    work: Work, variant: str, precision: str, batch: int, ceilings: Ceilings
) -> dict[str, float]:
    """GFLOPs, GB and least ms of one step of a variant; columns of a row."""
    itemsize = PRECISIONS[precision].itemsize
    convs = work.conv_work(variant, itemsize, batch)
    elementwise = batch * work.traffic(variant, itemsize)
    ms = sum(ceilings.ms(flops, nbytes, precision) for flops, nbytes in convs)
    return {
        "gflop": sum(flops for flops, _ in convs) / 1e9,
        "gbyte": (sum(nbytes for _, nbytes in convs) + elementwise) / 1e9,
        "floor_ms": ms + elementwise / ceilings.copy_gbs / 1e6,
    }
