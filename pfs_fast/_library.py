"""Loads the compiled library once, keeps the reason when it cannot, and tells what is there."""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType

import torch

from pfs_fast.errors import BackendError

_ADVICE = (
    "Install a C++ compiler and run `pip install .` in the source tree (or "
    "`python setup.py build_ext --inplace` to use the tree itself), "
    'or choose the slow plain-PyTorch operators with backend="reference"'
)
_REPORT = Path(__file__).with_name("_build_report.json")


def _load() -> tuple[ModuleType | None, Exception | None]:
    try:
        return importlib.import_module("pfs_fast._C"), None
    except (ImportError, OSError) as error:
        return None, error


_C, _load_error = _load()


def _build_report() -> dict[str, str]:
    """What setup.py wrote when it built or skipped something; empty where it never ran."""
    try:
        report = json.loads(_REPORT.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {str(key): str(value) for key, value in report.items() if value}


def _why_not_loaded() -> str:
    if isinstance(_load_error, ModuleNotFoundError) and _load_error.name == "pfs_fast._C":
        return _build_report().get("cpp_reason", "the compiled library pfs_fast._C was not built")
    built_with = _build_report().get("torch")
    reason = f"the compiled library does not load: {_load_error}"
    if built_with is not None and built_with != torch.__version__:
        reason += f" (built with torch {built_with}, this is torch {torch.__version__}: rebuild)"
    return reason


def is_loaded() -> bool:
    """Whether the compiled operators are there."""
    return _C is not None


def require_ops() -> None:
    """Does nothing where the compiled operators are loaded.

    Raises:
        BackendError: They are not; says why, and how to get them. The original error is the cause.
    """
    if _C is None:
        raise BackendError(f"pfs_fast.ops: {_why_not_loaded()}. {_ADVICE}") from _load_error


@dataclass(frozen=True)
class Backends(Mapping[str, object]):
    """What the compiled library can do in this process; prints as a table, reads as a mapping.

    Attributes:
        cpu: Whether the CPU operators are compiled and loaded.
        cpu_isa: Instruction set that they use here: "avx512", "avx2", "baseline", or "".
        cpu_reason: Why ``cpu`` is False, or "".
        cuda: Whether the CUDA operators are compiled, loaded and have a device to run on.
        cuda_compiled: Whether the CUDA operators are compiled and loaded.
        cuda_archs: Architectures they are compiled for, as in TORCH_CUDA_ARCH_LIST, or "".
        cuda_device: Name of the current CUDA device, or "".
        cuda_reason: Why ``cuda`` is False, or "".
        torch: Version of PyTorch.
    """

    cpu: bool
    cpu_isa: str
    cpu_reason: str
    cuda: bool
    cuda_compiled: bool
    cuda_archs: str
    cuda_device: str
    cuda_reason: str
    torch: str

    def __getitem__(self, key: str) -> object:
        return asdict(self)[key]

    def __iter__(self) -> Iterator[str]:
        return iter(asdict(self))

    def __len__(self) -> int:
        return len(asdict(self))

    def __str__(self) -> str:
        cpu = f"yes ({self.cpu_isa})" if self.cpu else f"no: {self.cpu_reason}"
        cuda = f"yes ({self.cuda_device}; built for {self.cuda_archs})"
        if not self.cuda:
            compiled = f" (compiled for {self.cuda_archs})" if self.cuda_compiled else ""
            cuda = f"no{compiled}: {self.cuda_reason}"
        return f"torch      {self.torch}\ncpu ops    {cpu}\ncuda ops   {cuda}"


def backends() -> Backends:
    """Tells which compiled operators there are, and why what is missing is missing.

    Example:
        >>> import pfs_fast
        >>> print(pfs_fast.backends())  # doctest: +SKIP
        torch      2.14.1+cu130
        cpu ops    yes (avx2)
        cuda ops   no: CUDA was switched off by PFS_FAST_CUDA=0 when the library was built
    """
    info = {} if _C is None else _C.build_info()
    cpu_isa, cpu_reason = "", ""
    if _C is None:
        cpu_reason = _why_not_loaded()
    else:
        try:
            cpu_isa = _C.cpu_isa()
        except (RuntimeError, ValueError) as error:
            forced = os.environ.get("PFS_FAST_CPU_ISA", "")
            cpu_reason = f"PFS_FAST_CPU_ISA={forced}: {str(error).splitlines()[0]}"
    cuda_compiled = bool(info.get("cuda", False))
    has_device = torch.cuda.is_available()
    if _C is None:
        cuda_reason = cpu_reason
    elif not cuda_compiled:
        default = "the library was built without CUDA"
        cuda_reason = _build_report().get("cuda_reason", default)
    else:
        cuda_reason = "" if has_device else "PyTorch finds no CUDA device"
    return Backends(
        cpu=_C is not None and not cpu_reason,
        cpu_isa=cpu_isa,
        cpu_reason=cpu_reason,
        cuda=cuda_compiled and has_device,
        cuda_compiled=cuda_compiled,
        cuda_archs=str(info.get("cuda_archs", "")),
        cuda_device=torch.cuda.get_device_name() if has_device else "",
        cuda_reason=cuda_reason,
        torch=str(torch.__version__),
    )
