"""Models to other runtimes: torch.export (.pt2) and ONNX, each proved against the model before the file appears."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._ambient import own_settings, turn
from .._modules import copied, require_plain
from .._tensors import require_dense
from ..errors import BackendError, ConfigError, ModelError
from .files import atomic_write

CHECKED_BATCHES = (1, 3)
"""Batch sizes at which the reloaded file is compared with the model; neither is the one that is traced."""

_TRACED_BATCH = 2  # a batch of 1 would be baked in: torch.export treats sizes 0 and 1 as constants
_TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
}  # runtimes fold BN into convolutions and reorder sums
_HALF_TOLERANCE = 3e-2

Runner = Callable[[Tensor], Sequence[Tensor]]


@dataclass(frozen=True)
class ExportReport:
    """What `export` wrote and how close it is to the model."""

    path: Path
    runtime: str
    """Runtime that computed the compared outputs."""
    batches: tuple[int, ...]
    """Batch sizes that were compared."""
    max_error: float
    """Largest difference of any output, relative to the largest magnitude of that output."""
    bytes: int

    def __str__(self) -> str:
        return (
            f"{self.path} ({self.bytes / 2**20:.2f} MiB): {self.runtime} equals the model within "
            f"{self.max_error:.1e} at batch sizes {', '.join(map(str, self.batches))}"
        )


@own_settings()
@turn("export")
def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_input: Tensor | None = None,
) -> ExportReport:
    """Exports a model for inference, with a free batch dimension, and compares the file with the model.

    A copy of the model in eval mode on the CPU is exported; the file only appears when its outputs agree.

    Args:
        model: The module; not modified.
        path: Target; ``.pt2`` (torch.export) or ``.onnx`` (needs the packages onnx and onnxscript; compared by onnxruntime
            where that is installed, else by ONNX's own slow reference).
        example_input: [N, C, ...], of the dtype that the model takes; only its shape without N matters. None: the shape of
            the images that the model was searched or trained on (attribute ``pfs_input_shape``), in the model's dtype.

    Returns:
        What was written and the largest error.

    Raises:
        ConfigError: Unknown suffix, or no example input.
        BackendError: A package is missing.
        ModelError: A DataParallel or compiled wrapper, a model that cannot be exported, or the exported one computes something else.
        FileWriteError: The file cannot be written.
        BusyError: Another thread of the process is in a search or a training.
    """
    suffix = Path(path).suffix if isinstance(path, str | os.PathLike) else None
    if suffix not in (".pt2", ".onnx"):
        raise ConfigError(
            f"export: path must end in .pt2 or .onnx, got {path!r}; write e.g. 'model.pt2'"
        )
    if suffix == ".onnx":
        _require("onnx", "onnxscript")
    require_plain("export", model)
    plain = copied("export", model).eval().cpu().requires_grad_(False)
    _return_plain(plain)
    image = _example(plain, example_input)
    example = image.expand(_TRACED_BATCH, *image.shape[1:]).contiguous()
    reports: list[ExportReport] = []

    def write(temporary: Path) -> None:
        program = _trace(plain, example)
        if suffix == ".pt2":
            # Into memory first: PyTorch's own writer ends the process where the disk is full.
            content = io.BytesIO()
            torch.export.save(program, content)
            temporary.write_bytes(content.getbuffer())
            runtime, open_runner = "torch.export", _pt2_runner
        else:
            _write_onnx(program, temporary)
            has_runtime = importlib.util.find_spec("onnxruntime") is not None
            runtime = "onnxruntime" if has_runtime else "onnx.reference"
            open_runner = _onnxruntime_runner if has_runtime else _reference_runner
        with _runs_in(runtime, example.dtype):
            run = open_runner(temporary)
        error = _compare(plain, run, example, runtime)
        size = temporary.stat().st_size
        reports.append(ExportReport(Path(path), runtime, CHECKED_BATCHES, error, size))

    atomic_write(path, write, "export")
    return reports[0]


def _return_plain(model: nn.Module) -> None:
    """Make named tuples of outputs tuples, and dataclasses dictionaries: a file knows no classes of the model's code."""
    run = model.forward

    @functools.wraps(run)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return plain(run(*args, **kwargs))

    def plain(value: Any) -> Any:
        if is_dataclass(value) and not isinstance(value, dict):
            value = {f.name: getattr(value, f.name) for f in fields(value)}
        if hasattr(value, "_fields"):
            value = tuple(value)
        if type(value) in (tuple, list):
            return type(value)(map(plain, value))
        return {k: plain(v) for k, v in value.items()} if type(value) is dict else value

    model.forward = forward


def _example(model: nn.Module, example_input: Tensor | None) -> Tensor:
    """One image [1, C, ...]."""
    if example_input is None:
        shape = getattr(model, "pfs_input_shape", None)
        if shape is None:
            raise ConfigError(
                "export: example_input must be a tensor [N, C, ...] for a model that was neither searched nor trained here, "
                "got None; pass e.g. torch.zeros(1, 3, 224, 224)"
            )
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return torch.zeros(1, *shape, dtype=dtype)
    if isinstance(example_input, Tensor):
        require_dense(ConfigError, "export: example_input", example_input)
    if not isinstance(example_input, Tensor) or example_input.dim() < 2 or not len(example_input):
        got = (
            list(example_input.shape)
            if isinstance(example_input, Tensor)
            else type(example_input).__name__
        )
        raise ConfigError(f"export: example_input must be a tensor [N, C, ...], got {got}")
    return example_input[:1].detach().cpu()


def _trace(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1)
    try:
        with torch.no_grad():
            return torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except Exception as error:  # torch.export has no common base class for what it cannot trace
        text = str(error).strip() or type(error).__name__
        raise ModelError(
            f"export: model must be traceable by torch.export with a free batch size, got: {text.splitlines()[0]}"
        ) from error


def _write_onnx(program: torch.export.ExportedProgram, path: Path) -> None:
    try:
        result = torch.onnx.export(
            program,
            input_names=["input"],
            dynamo=True,
            verbose=False,
            external_data=False,
        )
        assert result is not None
        result.save(path, external_data=False)
    except torch.onnx.OnnxExporterError as error:
        raise ModelError(
            f"export: model must consist of operators that ONNX has, got: {str(error).splitlines()[0]}"
        ) from error


def _pt2_runner(path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda images: _leaves(module(images))


def _onnxruntime_runner(path: Path) -> Runner:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return lambda images: _tensors(session.run(None, {"input": images.numpy()}))


def _reference_runner(path: Path) -> Runner:
    import onnx.reference

    evaluator = onnx.reference.ReferenceEvaluator(str(path))
    return lambda images: _tensors(evaluator.run(None, {"input": images.numpy()}))


def _tensors(arrays: Sequence[Any]) -> list[Tensor]:
    return [torch.as_tensor(array) for array in arrays]


@contextlib.contextmanager
def _runs_in(runtime: str, dtype: torch.dtype) -> Iterator[None]:
    """Each runtime has its own error classes, and often none for a dtype that it does not know."""
    try:
        yield
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        raise ModelError(
            f"export: model must run in {runtime} with {dtype} images, got: {text.splitlines()[0]}; export model.float()"
        ) from error


@torch.no_grad()
def _compare(model: nn.Module, run: Runner, example: Tensor, runtime: str) -> float:
    """Largest relative error over the checked batch sizes; raises if any is above the tolerance."""
    tolerance = _TOLERANCE.get(example.dtype, _HALF_TOLERANCE)
    generator = torch.Generator().manual_seed(0)
    worst = 0.0
    for batch in CHECKED_BATCHES:
        shape = (batch, *example.shape[1:])
        images = torch.randn(shape, generator=generator, dtype=torch.float64).to(example.dtype)
        expected = _leaves(model(images))
        with _runs_in(runtime, example.dtype):
            outputs = run(images)
        shapes = [list(tensor.shape) for tensor in expected]
        got_shapes = [list(tensor.shape) for tensor in outputs]
        if shapes != got_shapes:
            raise ModelError(
                f"export: the file's outputs must have the shapes {shapes}, got {got_shapes} in {runtime}"
            )
        for want, got in zip(expected, outputs, strict=True):
            difference = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
            scale = want.double().abs().max().item() if want.numel() else 1.0
            error = difference / scale if scale > 0 else difference
            if not error <= tolerance:
                raise ModelError(
                    f"export: the file's outputs must equal the model's within {tolerance:g}, got {error:.2e} at batch "
                    f"size {batch} in {runtime}; nothing was written"
                )
            worst = max(worst, error)
    return worst


def _leaves(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendError(
            f"export: path must end in .pt2 where {' and '.join(missing)} is not installed, got .onnx; "
            f"run: pip install {' '.join(packages)}"
        )
