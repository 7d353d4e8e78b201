"""MACs and parameters of any module, counted by running it on fake tensors."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from .._ambient import own_settings, turn
from .._modules import copied, require_plain
from .._tensors import require_dense
from ..errors import ModelError


@dataclass(frozen=True)
class LayerCost:
    """What one module costs itself, without its children.

    Attributes:
        name: Qualified module name ("" for the model itself).
        kind: Class name of the module.
        macs: Multiply-accumulates spent in its own forward, over all calls.
        params: Parameters it owns directly; a shared parameter counts at its first owner only.
        output_shape: Shape of its last output if that is one tensor, else None.
    """

    name: str
    kind: str
    macs: int
    params: int
    output_shape: tuple[int, ...] | None


@dataclass(frozen=True)
class Cost:
    """Cost of a model for one example input. ``print(cost)`` shows a table.

    Attributes:
        macs: Multiply-accumulates of the whole example input.
        params: Parameters, shared ones once.
        layers: Every module that has MACs or parameters of its own, in the order of ``model.named_modules()``.
    """

    macs: int
    params: int
    layers: tuple[LayerCost, ...] = field(repr=False)

    def __str__(self) -> str:
        rows = [("layer", "kind", "output", "MACs", "params")]
        for layer in self.layers:
            shape = "-" if layer.output_shape is None else "x".join(map(str, layer.output_shape))
            rows.append(
                (layer.name or "(model)", layer.kind, shape, f"{layer.macs:,}", f"{layer.params:,}")
            )
        rows.append(("total", "", "", f"{self.macs:,}", f"{self.params:,}"))
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = []
        for row in rows:
            left = (cell.ljust(width) for cell, width in zip(row[:3], widths[:3], strict=True))
            right = (cell.rjust(width) for cell, width in zip(row[3:], widths[3:], strict=True))
            lines.append("  ".join([*left, *right]).rstrip())
        return "\n".join(lines)


@own_settings()
@turn()
def count(model: nn.Module, example_input: torch.Tensor | tuple[Any, ...]) -> Cost:
    """Count the MACs and parameters of a model, per module and in total.

    MACs are half of what ``torch.utils.flop_counter`` counts (it counts two operations for each multiply-accumulate):
    convolutions, linear layers and the matrix products of attention; batch norms, activations and pools count 0.
    The model runs in eval mode on fake tensors: nothing is computed, no weight memory is needed and the model is
    never touched.

    Args:
        model: Any module that runs on fake tensors.
        example_input: The input tensor, or a tuple of positional arguments. All of it is counted: pass a batch of
            one image ([1, C, H, W]) for the cost of one image.

    Returns:
        Cost: Totals and one record for each module with MACs or parameters of its own.

    Raises:
        ModelError: For a model without parameters, a wrapped or compiled model, or an input that the model rejects.

    Example:
        >>> count(nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.zeros(1, 3, 4, 4)).macs
        3456
    """
    require_plain("count", model)
    if next(model.parameters(), None) is None:
        raise ModelError("count: model must have parameters, got none; pass the network itself")
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(isinstance(value, torch.Tensor) for value in inputs):
        raise ModelError(
            f"count: example_input must be a tensor or a tuple with tensors, got {type(example_input).__name__}; "
            "pass e.g. torch.zeros(1, 3, 224, 224)"
        )
    for value in inputs:
        if isinstance(value, torch.Tensor) and not value.is_meta:
            require_dense(ModelError, "count: example_input", value)
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(
                f"count: model must consist of Python modules, got a {type(module).__name__} as layer '{name}'; pass the module "
                "before torch.jit.script or torch.jit.trace"
            )
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    memo = {id(t): fake.from_tensor(t) for t in (*model.parameters(), *model.buffers())}
    # Outside of the mode, under which a plain tensor on the model (a cache of a forward) could not be copied.
    shadow = copied("count", model, memo)
    with fake:
        inputs = tuple(fake.from_tensor(v) if isinstance(v, torch.Tensor) else v for v in inputs)
        recorder = _Recorder(shadow.eval())
        try:
            recorder.run(inputs)
        except (
            Exception
        ) as error:  # any code of the model may have failed; its own message is the useful one
            shapes = ", ".join(str(tuple(v.shape)) for v in inputs if isinstance(v, torch.Tensor))
            device = next(model.parameters()).device
            raise ModelError(
                f"count: example_input must be accepted by the model, got shape {shapes} (model on {device}); "
                f"{type(error).__name__}: {error}"
            ) from error
    return recorder.cost()


class _Recorder:
    """Runs a module under the FLOP counter and attributes every operation to the innermost running module."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.flops = dict.fromkeys(self.names, 0)
        self.shapes: dict[nn.Module, tuple[int, ...] | None] = dict.fromkeys(self.names)
        self.total = 0

    def run(self, inputs: tuple[Any, ...]) -> None:
        counter = FlopCounterMode(display=False)
        running: list[
            list[int]
        ] = []  # per module on the stack: counter at entry, operations of its children

        def enter(module: nn.Module, _args: Any) -> None:
            running.append([counter.get_total_flops(), 0])

        def leave(module: nn.Module, _args: Any, output: Any) -> None:
            at_entry, of_children = running.pop()
            inclusive = counter.get_total_flops() - at_entry
            self.flops[module] += inclusive - of_children
            if running:
                running[-1][1] += inclusive
            self.shapes[module] = tuple(output.shape) if isinstance(output, torch.Tensor) else None

        for module in self.names:
            # Outermost of the hooks, so that operations in the user's own hooks are attributed too.
            module.register_forward_pre_hook(enter, prepend=True)
            module.register_forward_hook(leave)
        # The fused attention kernels have no FLOP formula on every device; the matrix products they stand for have.
        fast_path = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), quiet_fake_tensors(), counter:
                self.model(*inputs)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)
        self.total = counter.get_total_flops()

    def cost(self) -> Cost:
        layers, counted = [], set()
        for module, name in self.names.items():
            own = {
                id(p): p.numel() for p in module.parameters(recurse=False) if id(p) not in counted
            }
            counted.update(own)
            layer = LayerCost(
                name,
                type(module).__name__,
                self.flops[module] // 2,
                sum(own.values()),
                self.shapes[module],
            )
            if layer.macs or layer.params:
                layers.append(layer)
        return Cost(self.total // 2, sum(layer.params for layer in layers), tuple(layers))


@contextmanager
def quiet_fake_tensors() -> Iterator[None]:
    """Keep PyTorch from logging the traceback of an error that the caller gets anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled
