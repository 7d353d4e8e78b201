"""A network as it is deployed: one call of it in eager PyTorch, folded, compiled, or in ONNX Runtime."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from .._ambient import random_numbers, turn
from ..budgets.deployment import Deployment
from ..errors import BackendError
from ..graph.narrow import BATCH_NORMS
from ..slimming.fold import fold
from ..storage.exporters import export
from .timing import Task

Call = Callable[[], object]


def prepared(network: nn.Module, images: torch.Tensor, run: Deployment) -> Call:
    """One forward pass of a network in the runtime of ``run``.

    Args:
        network: In eval mode, in the dtype and on the device of ``run``; the call owns it.
        images: A batch. [N, C, ...].
        run: Names the runtime: ``"eager"``, as the network is; ``"folded"``, batch norms folded and channels last;
            ``"compile"``, folded and compiled by ``torch.compile``; ``"onnxruntime"``, exported to ONNX.

    Raises:
        BackendError: The runtime is not installed, or has no compiler.
    """
    if run.runtime == "eager":
        return lambda: network(images)
    if run.runtime == "onnxruntime":
        return _onnxruntime(network, images, run)
    folded = fold(network, images[:1])
    if images.dim() == 4:
        folded, images = _in_channels_last(folded), _laid_out(images)
    return _compiled(folded, images) if run.runtime == "compile" else lambda: folded(images)


def task_of(
    network: nn.Module,
    input_shape: tuple[int, ...],
    run: Deployment,
    *,
    channels_last: bool | None = None,
) -> Task:
    """A copy of a network, ready to be timed as it will run, on random images.

    Args:
        network: Plain module. Not modified.
        input_shape: Of one image, (C, ...).
        run: Device, batch, precision, threads, runtime.
        channels_last: Layout of images in eager PyTorch; None: that of the network's weights.
    """
    device = run.place_to_measure()
    if channels_last is None:
        channels_last = is_channels_last(network)
    with own_randomness(device), torch.no_grad():
        replica = copy.deepcopy(network).to(device).eval()
        dtype = next((p.dtype for p in replica.parameters()), torch.float32)
        images = torch.randn((run.batch, *input_shape), device=device, dtype=dtype)
        if channels_last and images.dim() == 4:
            replica, images = _in_channels_last(replica), _laid_out(images)
        _settle(replica, images)
        call = prepared(replica.to(run.dtype), images.to(run.dtype), run)
    return Task(run.runtime, (), call, network)


def _laid_out(images: torch.Tensor) -> torch.Tensor:
    return images.contiguous(memory_format=torch.channels_last)


def _in_channels_last(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        if parameter.dim() == 4:  # a module of 3-d convolutions cannot be moved as a whole
            parameter.data = _laid_out(parameter.data)
    return network


def _settle(network: nn.Module, images: torch.Tensor) -> None:
    """Give batch norms the statistics of their input.

    A fresh network whose statistics are not its own may let activations fade to subnormal numbers, which are slow.
    """

    def settle(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        if module.running_mean is not None:
            x = args[0].transpose(0, 1).flatten(1)  # [C, values]
            module.running_mean.copy_(x.mean(dim=1))
            module.running_var.copy_(x.var(dim=1, correction=0))

    handles = [
        m.register_forward_pre_hook(settle) for m in network.modules() if isinstance(m, BATCH_NORMS)
    ]
    network(images)
    for handle in handles:
        handle.remove()


@contextmanager
def own_randomness(device: torch.device) -> Iterator[None]:
    """The same random numbers every time; the caller's generators are put back."""
    with turn("structure_for"), random_numbers(0, [device]):
        yield


def is_channels_last(module: nn.Module) -> bool:
    """Whether the model keeps its convolutions channels last."""
    weights = [p for p in module.parameters() if p.dim() == 4 and p.size(1) > 1 and p.size(2) > 1]
    return bool(weights) and all(
        p.is_contiguous(memory_format=torch.channels_last) for p in weights
    )


def installed() -> tuple[str, ...]:
    """Runtimes that a comparison shows without being asked: those that need no compilation of each network."""
    has_onnx = all(importlib.util.find_spec(name) for name in _ONNX_PACKAGES)
    return ("eager", "folded", "onnxruntime") if has_onnx else ("eager", "folded")


_ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")


def _onnxruntime(network: nn.Module, images: torch.Tensor, run: Deployment) -> Call:
    if not all(importlib.util.find_spec(name) for name in _ONNX_PACKAGES):
        raise BackendError(
            f"latency: runtime 'onnxruntime' must be installed, got none; run: pip install {' '.join(_ONNX_PACKAGES)}"
        )
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads() if run.threads is None else run.threads
    # Threads of one session that spin would slow the network that it takes turns with.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export(network, path, images[:1])
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    feed = {session.get_inputs()[0].name: images.numpy()}
    return lambda: session.run(None, feed)


def _compiled(network: nn.Module, images: torch.Tensor) -> Call:
    compiled = torch.compile(network, dynamic=False)
    # Networks of one class count as recompilations of one forward, of which there is a limit by default.
    many = torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000)
    try:
        with many, torch.inference_mode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice of the compiler on precision
            compiled(images)
    except torch._dynamo.exc.TorchDynamoException as error:
        raise BackendError(
            f"latency: runtime 'compile' must be able to compile the network, got {str(error).strip().splitlines()[0]}; install "
            "a C++ compiler, or choose runtime 'folded'"
        ) from error
    return lambda: compiled(images)
