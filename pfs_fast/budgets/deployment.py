"""Where and how a slim network will run: what its latency, memory and preferred widths depend on."""

from __future__ import annotations

import numbers
import os
from dataclasses import dataclass

import torch

from ..errors import BudgetError

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
RUNTIMES = ("eager", "folded", "compile", "onnxruntime")

_THREADS_EACH = 8  # of a processor; far more than this cannot all be started

CPU_MULTIPLES = {"AVX512": 16, "DEFAULT": 8}
"""Channels of a block in which the convolutions of oneDNN and ONNX Runtime lay out their data, by vector length."""

TENSOR_CORE_MULTIPLE = 8
"""Channels that tensor cores take without padding, for 16-bit operands and TF32 alike."""


@dataclass(frozen=True)
class Deployment:
    """How a slim network will run.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``, with or without an index; None: the current CUDA device where there is one, else the
            CPU.
        batch: Images in one forward pass.
        precision: dtype of weights, images and activations: ``"fp32"``, ``"bf16"``, ``"fp16"`` or ``"fp64"``.
        threads: CPU threads; None: as many as PyTorch uses now. ``place_to_measure`` bounds them.
        runtime: One of `RUNTIMES` (``measuring.runtimes`` says what each is).

    Raises:
        BudgetError: For a value outside its range.
    """

    device: str | None = None
    batch: int = 1
    precision: str = "fp32"
    threads: int | None = None
    runtime: str = "eager"

    def __post_init__(self) -> None:
        if self.device is not None:
            object.__setattr__(self, "device", str(_parsed(self.device)))
        for name in ("batch", "threads"):
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise BudgetError(
                    f"Budget: {name} must be a whole number of at least 1, got {value!r}; pass e.g. 1"
                )
            if value >= 2**31:
                raise BudgetError(f"Budget: {name} must be at most 2**31 - 1, got more; lower it")
            object.__setattr__(self, name, int(value))
        if not isinstance(self.precision, str) or self.precision not in DTYPES:
            raise BudgetError(
                f"Budget: precision must be one of {', '.join(map(repr, DTYPES))}, got {self.precision!r}"
            )
        if self.runtime not in RUNTIMES:
            raise BudgetError(
                f"Budget: runtime must be one of {', '.join(map(repr, RUNTIMES))}, got {self.runtime!r}"
            )
        if self.runtime == "onnxruntime":
            on_cuda = self.device is not None and self.device.startswith("cuda")
            if on_cuda or self.precision != "fp32":
                raise BudgetError(
                    "Budget: runtime 'onnxruntime' must be measured on the CPU with precision 'fp32', got "
                    f"{self.device} with {self.precision!r}; leave device and precision out, or choose runtime 'eager'"
                )
            object.__setattr__(self, "device", "cpu")

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def place(self) -> torch.device:
        """The device, once it is certain that it is there.

        Raises:
            BudgetError: It is not.
        """
        if self.device is None:
            return (
                torch.device("cuda", torch.cuda.current_device())
                if torch.cuda.is_available()
                else torch.device("cpu")
            )
        device = torch.device(self.device)
        if device.type == "cpu":
            return device
        if not self._is_there():
            there = _num_cuda_devices()
            raise BudgetError(
                f"Budget: device must be there, got '{device}' of {there} CUDA devices; latency is measured, so set the "
                "budget where the network will run, or use device='cpu'"
            )
        index = device.index
        return torch.device("cuda", torch.cuda.current_device() if index is None else index)

    def _is_there(self) -> bool:
        """Whether the CUDA device that was asked for is in this machine."""
        assert self.device is not None
        return (torch.device(self.device).index or 0) < _num_cuda_devices()

    def place_to_measure(self) -> torch.device:
        """The device, once it is certain that a network can be timed on it with so many threads.

        A budget may be made or loaded on another machine than the one that measures, so it is here that threads are bounded.

        Raises:
            BudgetError: The device is not there, or this process may use too few processors.
        """
        device, processors = self.place(), _processors()
        most = _THREADS_EACH * processors
        if self.threads is not None and self.threads > most:
            raise BudgetError(
                f"Budget: threads must be at most {most}, {_THREADS_EACH} for each of the {processors} processors that this "
                f"process may use, got {self.threads}; pass at most {most}, or leave it out"
            )
        return device

    def preferred_multiple(self) -> int:
        """The multiple of channels that the target computes fast, by `CPU_MULTIPLES` and `TENSOR_CORE_MULTIPLE`.

        The CPU is this machine's. A CUDA device need not be there: then it is taken to have tensor cores for ``precision``.
        """
        asks_cuda = self.device is not None and torch.device(self.device).type == "cuda"
        if asks_cuda and not self._is_there():
            return TENSOR_CORE_MULTIPLE
        device = self.place()
        if device.type == "cpu":
            return cpu_multiple()
        capability = torch.cuda.get_device_capability(device)
        first = {"fp16": (7, 0), "bf16": (8, 0), "fp32": (8, 0), "fp64": (99, 0)}[self.precision]
        return TENSOR_CORE_MULTIPLE if capability >= first else 1


def cpu_multiple() -> int:
    """That of `CPU_MULTIPLES` for this machine's processor."""
    vectors = torch.backends.cpu.get_cpu_capability()
    return CPU_MULTIPLES.get(vectors, CPU_MULTIPLES["DEFAULT"])


def _num_cuda_devices() -> int:
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def _processors() -> int:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not everywhere
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _parsed(device: object) -> torch.device:
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise BudgetError(
            f"Budget: device must be 'cpu', 'cuda' or 'cuda:<index>', got {device!r}"
        ) from error
    if parsed.type not in ("cpu", "cuda"):
        raise BudgetError(f"Budget: device must be a CPU or CUDA device, got '{parsed}'; use 'cpu'")
    return parsed
