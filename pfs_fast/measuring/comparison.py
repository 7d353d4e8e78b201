"""A slim network beside the dense one: milliseconds in the runtimes that people deploy, MACs, parameters, bytes."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .._ambient import own_settings
from .._modules import require_plain
from ..budgets.cost import Cost, count
from ..budgets.deployment import Deployment
from ..budgets.structure import aligned
from ..errors import ConfigError
from .bars import Bars, silent
from .runtimes import installed, is_channels_last, task_of
from .timing import DeviceTimer, Timer, Timing

_TURNS = 15
_NOISY = 0.15  # half the distance between the quartiles, of the median


@dataclass(frozen=True)
class Speed:
    """Latency of two networks in one runtime, measured in turns.

    Attributes:
        runtime: One of ``budgets.deployment.RUNTIMES``.
        dense: Milliseconds of one forward pass of the dense network.
        slim: Milliseconds of the slim network.
    """

    runtime: str
    dense: Timing
    slim: Timing

    @property
    def ratio(self) -> float:
        """How many times as long the dense network takes: above 1, the slim one is faster."""
        return self.dense.median / self.slim.median

    @property
    def noise(self) -> float:
        """Relative spread of the noisier of the two times."""
        return max(t.spread / t.median for t in (self.dense, self.slim))


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`. ``str()`` of it is a table.

    Attributes:
        run: Device, batch, precision and threads of the measurement.
        speeds: One entry for each runtime.
        dense: MACs of one image and parameters of the dense network.
        slim: Those of the slim network.
    """

    run: Deployment
    speeds: tuple[Speed, ...]
    dense: Cost
    slim: Cost

    @property
    def slower(self) -> tuple[str, ...]:
        """Runtimes in which the slim network is slower than the dense one by more than the noise."""
        return tuple(s.runtime for s in self.speeds if s.ratio * (1 + s.noise) < 1)

    @property
    def advice(self) -> str:
        """What to do about runtimes in which the slim network is slower; empty where there is none."""
        if not self.slower:
            return ""
        first = next(s for s in self.speeds if s.runtime in self.slower)
        return (
            f"the slim network should be faster than the dense one, got {first.slim.median:.4g} ms against "
            f"{first.dense.median:.4g} ms in runtime '{first.runtime}'; let widths be multiples that the target runs fast "
            "(multiple_of='auto', the default), prune residual streams too (scope='all'), or limit the latency itself "
            f"(latency=0.5, runtime='{first.runtime}')"
        )

    def __str__(self) -> str:
        size = self.run.dtype.itemsize
        rows = [("", "dense", "slim", "dense / slim")]
        for speed in self.speeds:
            times = (f"{t.median:.4g} ± {t.spread:.2g}" for t in (speed.dense, speed.slim))
            rows.append((f"ms, {speed.runtime}", *times, f"{speed.ratio:.2f}"))
        for name, dense, slim in (
            ("multiply-accumulates", self.dense.macs, self.slim.macs),
            ("parameters", self.dense.params, self.slim.params),
            ("bytes of weights", size * self.dense.params, size * self.slim.params),
        ):
            rows.append((name, f"{dense:,}", f"{slim:,}", f"{dense / slim:.2f}" if slim else "-"))
        run = self.run
        threads = torch.get_num_threads() if run.threads is None else run.threads
        text = (
            f"{aligned(rows)}\nbatch {run.batch}, {run.precision}, {run.place()}, {threads} threads"
        )
        if any(speed.noise > _NOISY for speed in self.speeds):
            text += "; other work was running, so the times are rough"
        return f"{text}\n{self.advice}" if self.advice else text


@own_settings()
def compare(
    dense: nn.Module,
    slim: nn.Module,
    example_input: torch.Tensor | None = None,
    *,
    batch: int = 8,
    precision: str = "fp32",
    device: str | None = None,
    threads: int | None = None,
    runtimes: Sequence[str] | None = None,
    bars: Bars = silent,
    timer: Timer | None = None,
    warn: bool = True,
) -> Comparison:
    """Measure a slim network beside the dense one: forward passes in eval mode, both in turns.

    Args:
        dense: The network that was searched. Not modified.
        slim: The slim network. Not modified.
        example_input: Images [N, C, ...], of which only the shape of one counts. Default: the shape that the slim network of a
            search carries (``pfs_input_shape``).
        batch: Images in one forward pass.
        precision: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"fp64"``. ONNX Runtime is left out by default unless it is fp32.
        device: Where both run; None: the current CUDA device where there is one, else the CPU.
        threads: CPU threads; None: as many as PyTorch uses.
        runtimes: Any of ``"eager"``, ``"folded"``, ``"compile"``, ``"onnxruntime"``, as in ``Budget``. Default: all that are
            installed but ``"compile"``, which takes a minute.
        bars: Show how many runtimes are measured.
        timer: Measures; default: the device's clock.
        warn: Warn where the slim network is slower; its text says so in any case.

    Returns:
        Comparison: Times, MACs, parameters and bytes of both.

    Raises:
        BudgetError: A value outside its range, or a device that is not there.
        BackendError: A runtime that is not installed.
        ConfigError: No example input, for a network that no search made.

    Warns:
        UserWarning: The slim network is slower than the dense one; names the repair.
    """
    for network in (dense, slim):
        require_plain("compare", network)
    shape = _input_shape(example_input, slim)
    run = Deployment(device, batch, precision, threads)
    run.place_to_measure()
    if runtimes is None:
        plain = precision == "fp32" and run.place().type == "cpu"
        runtimes = [name for name in installed() if plain or name != "onnxruntime"]
    if timer is None:
        timer = DeviceTimer(run.place(), threads)
    speeds = []
    with bars(len(runtimes), "comparing latencies") as bar:
        for runtime in runtimes:
            own = replace(run, runtime=runtime)
            tasks = [
                task_of(network, shape, own, channels_last=is_channels_last(slim))
                for network in (dense, slim)
            ]
            speeds.append(Speed(runtime, *timer(tasks, _TURNS)))
            bar.update()
    costs = [count(network, _image(network, shape)) for network in (dense, slim)]
    found = Comparison(run, tuple(speeds), *costs)
    if warn and found.advice:
        warnings.warn(f"compare: {found.advice}", UserWarning, stacklevel=3)
    return found


def _input_shape(example_input: torch.Tensor | None, slim: nn.Module) -> tuple[int, ...]:
    if example_input is not None:
        return tuple(example_input.shape[1:])
    shape = getattr(slim, "pfs_input_shape", None)
    if shape is None:
        raise ConfigError(
            "compare: example_input must be given for a network that no search made, got None; pass e.g. "
            "torch.zeros(1, 3, 224, 224)"
        )
    return tuple(shape)


def _image(network: nn.Module, shape: tuple[int, ...]) -> torch.Tensor:
    like = next(network.parameters(), torch.empty(0))
    return torch.zeros(1, *shape, dtype=like.dtype, device=like.device)
