"""The layers of a traced network as tasks that can be timed alone, at any width."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from ..graph import rules
from ..graph.forward_record import ForwardRecord, storage_of, tensors_of
from ..graph.groups import FIXED
from .timing import Task

# Shares of the whole width at which a layer is timed.
_GRID = (0.125, 0.25, 0.5, 0.75, 1.0)
_ROUND_TO = 8  # channels: in between, kernels pad and take as long as at the next multiple


@dataclass(frozen=True)
class Operation:
    """One operation of the forward pass that takes time.

    Attributes:
        signature: What decides its time besides its widths; equal for operations that share their measurements.
        out_units: Unit of each output channel; empty where the output never changes its width.
        in_units: Unit of each input channel of a convolution or linear layer; else empty.
        step: Its widths are multiples of this (convolution groups).
        build: A call of it at ``(in, out)`` channels; ``in`` is 0 where only ``out`` counts.
    """

    signature: str
    out_units: np.ndarray
    in_units: np.ndarray
    step: int
    build: Callable[[int, int], Callable[[], object]]

    def grid(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Widths at which it is timed, (in, out); ``(0,)`` for what does not matter."""
        return _widths(self.in_units, self.step), _widths(self.out_units, self.step)

    def tasks(self) -> list[Task]:
        """A task for every pair of widths of the grid."""
        return [
            Task(self.signature, pair, self.build(*pair))
            for pair in itertools.product(*self.grid())
        ]


def operations(
    graph_module: fx.GraphModule,
    inputs: tuple[torch.Tensor, ...],
    unit_of_label: np.ndarray,
    device: torch.device,
    dtype: torch.dtype,
    channels_last: bool,
) -> list[Operation]:
    """Every operation of a traced network that computes something, in the order of execution.

    Views and operations that return their input are free. What cannot be run alone at another width is timed at its own.

    Args:
        graph_module: Traced eval forward, with labels in ``node.meta["labelled"]``.
        inputs: A batch as large as it will be; only shape and dtype are used.
        unit_of_label: Unit of each label. [num_labels], int64.
        device: Where the operations will run.
        dtype: Of their tensors.
        channels_last: Layout of images and weights.
    """
    return _Finder(graph_module, inputs, unit_of_label, device, dtype, channels_last).find()


class _Finder:
    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: tuple[torch.Tensor, ...],
        unit_of_label: np.ndarray,
        device: torch.device,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        self.graph = graph_module.graph
        self.modules = dict(graph_module.named_modules())
        self.values = ForwardRecord(graph_module, inputs).values
        self.unit_of_label = unit_of_label
        self.device, self.dtype, self.channels_last = device, dtype, channels_last
        self._tried: dict[str, bool] = {}

    def find(self) -> list[Operation]:
        found = []
        for node in self.graph.nodes:
            if not node.op.startswith("call") or not self._computes(node):
                continue
            module = self.modules[node.target] if node.op == "call_module" else None
            is_layer = isinstance(module, (_ConvNd, nn.Linear))
            if is_layer and not isinstance(module, _ConvTransposeNd):
                found.append(self._layer(node, module))
            else:
                found.append(self._plain(node, module))
        return found

    def _computes(self, node: fx.Node) -> bool:
        """Whether an operation allocates its result, or writes in place."""
        results = tensors_of(self.values[node])
        if not results:
            return False
        if node.meta["writes"]:
            return not self._returns_input_untouched(node)
        read = {
            storage_of(t)
            for source in node.all_input_nodes
            for t in tensors_of(self.values[source])
        }
        return not all(storage_of(t) in read for t in results)

    def _returns_input_untouched(self, node: fx.Node) -> bool:
        module = self.modules[node.target] if node.op == "call_module" else None
        return "dropout" in rules.plain_name(node, module)  # in eval mode

    def _units(self, node: fx.Node) -> np.ndarray:
        """Units along the labelled dimension; empty where no channel of it can be dropped."""
        value = node.meta.get("labelled")
        if getattr(value, "dim", None) is None:
            return np.zeros(0, dtype=np.int64)
        units = self.unit_of_label[value.labels]
        return units if (units != FIXED).any() else np.zeros(0, dtype=np.int64)

    def _empty(self, shape: tuple[int, ...], fill: float | None = None) -> torch.Tensor:
        """A tensor of the network's dtype and layout: random numbers, or one value."""
        tensor = torch.empty(shape, dtype=self.dtype, device=self.device)
        tensor = tensor.normal_() if fill is None else tensor.fill_(fill)
        if self.channels_last and tensor.dim() == 4:
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        return tensor

    # -- convolutions and linear layers ----------------------------------------------------------------------------

    def _layer(self, node: fx.Node, module: nn.Module) -> Operation:
        source = node.all_input_nodes[0]
        shape = tuple(self.values[source].shape)
        if isinstance(module, nn.Linear):
            dim, full_in, full_out, step = (
                len(shape) - 1,
                module.in_features,
                module.out_features,
                1,
            )
            kind: list[Any] = ["linear", module.bias is not None]
            depthwise = False
        else:
            dim = len(shape) - len(module.kernel_size) - 1
            full_in, full_out = module.in_channels, module.out_channels
            depthwise = module.groups == full_in > 1
            step = 1 if depthwise else module.groups
            kind = [
                "conv",
                module.kernel_size,
                module.stride,
                module.padding,
                module.dilation,
                module.padding_mode,
                f"depthwise x{full_out // full_in}" if depthwise else module.groups,
                module.bias is not None,
            ]
        rest = [size for i, size in enumerate(shape) if i != dim]
        in_units, out_units = self._units(source), self._units(node)

        def build(width_in: int, width_out: int) -> Callable[[], object]:
            outputs = width_out or full_out
            inputs = width_in or full_in
            if depthwise:
                inputs = outputs * full_in // full_out
            layer = _narrowed(module, inputs, outputs, self._empty)
            x = self._empty((*shape[:dim], inputs, *shape[dim + 1 :]))
            return lambda: layer(x)

        if depthwise:
            in_units, step = in_units[:0], full_out // full_in
        fixed_in = 0 if len(in_units) or depthwise else full_in
        fixed_out = 0 if len(out_units) else full_out
        signature = json.dumps([*kind, rest, fixed_in, fixed_out])
        return Operation(signature, out_units, in_units, step, build)

    # -- everything else -------------------------------------------------------------------------------------------

    def _plain(self, node: fx.Node, module: nn.Module | None) -> Operation:
        units = self._units(node)
        full = len(units)
        read = [n for n in node.all_input_nodes if isinstance(self.values[n], torch.Tensor)]
        shapes = [tuple(self.values[n].shape) for n in read]
        dims = [
            getattr(n.meta.get("labelled"), "dim", None) if len(self._units(n)) else None
            for n in read
        ]

        def build(_: int, width: int) -> Callable[[], object]:
            share = width / full if full else 1.0
            narrow = [
                shape
                if dim is None or not full
                else (*shape[:dim], max(1, round(shape[dim] * share)), *shape[dim + 1 :])
                for shape, dim in zip(shapes, dims, strict=True)
            ]
            tensors = {n: self._filled(n, shape) for n, shape in zip(read, narrow, strict=True)}
            return self._call(node, module, tensors, width if full else 0)

        none = units[:0]
        signature = self._signature(node, module, shapes, dims)
        if full and self._runs(signature, lambda: [build(0, w)() for w in _widths(units, 1)]):
            return Operation(signature, units, none, 1, build)
        # A shape written into the network, a module of fixed width: timed as it is.
        signature = self._signature(node, module, shapes, [None] * len(shapes))
        full = 0
        if self._runs(signature, lambda: build(0, 0)()):
            return Operation(signature, none, none, 1, build)
        # It needs more than its inputs. The whole network's time covers it.
        return Operation(f"not timed: {node.name}", none, none, 1, lambda *_: lambda: None)

    def _runs(self, signature: str, run: Callable[[], object]) -> bool:
        """Whether an operation can be run alone; tried once for each signature."""
        if signature not in self._tried:
            try:
                with torch.inference_mode():
                    run()
                self._tried[signature] = True
            except Exception:  # whatever the operation raises at a width that it was not made for
                self._tried[signature] = False
        return self._tried[signature]

    def _filled(self, node: fx.Node, shape: tuple[int, ...]) -> torch.Tensor:
        """Ones, which stay in range however often an operation in place is repeated."""
        value = self.values[node]
        if value.is_floating_point():
            return self._empty(shape, 1.0)
        return torch.ones(shape, dtype=value.dtype, device=self.device)

    def _call(
        self, node: fx.Node, module: nn.Module | None, tensors: dict[fx.Node, Any], width: int
    ) -> Callable[[], object]:
        def plain(source: fx.Node) -> Any:
            return tensors[source] if source in tensors else self.values[source]

        args, kwargs = fx.map_arg((node.args, node.kwargs), plain)
        if module is not None:
            if isinstance(module, _BatchNorm):
                module = _narrowed(module, 0, width or module.num_features, self._empty)
            else:
                module = copy.deepcopy(module).to(self.device, self.dtype).eval()
            return lambda: module(*args, **kwargs)
        if node.op == "call_method":
            method = getattr(args[0], node.target)
            return lambda: method(*args[1:], **kwargs)
        return lambda: node.target(*args, **kwargs)

    def _signature(
        self,
        node: fx.Node,
        module: nn.Module | None,
        shapes: list[tuple[int, ...]],
        dims: list[int | None],
    ) -> str:
        if isinstance(module, _BatchNorm):
            what = ["batch norm", module.affine, module.track_running_stats]
        elif module is not None:
            what = [type(module).__name__, str(module), sum(p.numel() for p in module.parameters())]
        else:
            args = fx.map_arg((node.args, node.kwargs), lambda n: _shown(self.values[n]))
            what = [rules.plain_name(node, None), bool(node.meta["writes"]), str(args)]
        whole = [
            # Inputs whose widths go along (a residual sum, a gate) count by their share of the first one.
            [0 if i == dim else size for i, size in enumerate(shape)]
            for shape, dim in zip(shapes, dims, strict=True)
        ]
        several = [s[d] for s, d in zip(shapes, dims, strict=True) if d is not None]
        return json.dumps([*what, whole, several if len(set(several)) > 1 else []])


def _shown(value: Any) -> str:
    return "tensor" if tensors_of(value) else str(value)


def _widths(units: np.ndarray, step: int) -> tuple[int, ...]:
    """Grid of the widths of an axis: shares of the whole, rounded up to what kernels compute anyway."""
    full = len(units)
    if not full:
        return (0,)
    multiple = np.lcm(_ROUND_TO, step) if full >= 2 * _ROUND_TO * step else step
    widths = {min(full, int(-(-full * share // multiple) * multiple)) for share in _GRID}
    return tuple(sorted(widths))


def _narrowed(
    module: nn.Module, inputs: int, outputs: int, new: Callable[[tuple[int, ...]], torch.Tensor]
) -> nn.Module:
    """A module of the same kind with other widths and random weights. Hooks are left out."""
    if isinstance(module, nn.Linear):
        layer = nn.Linear(inputs, outputs, module.bias is not None, device="meta")
    elif isinstance(module, _BatchNorm):
        layer = type(module)(
            outputs, module.eps, module.momentum, module.affine, module.track_running_stats
        )
    else:
        base = next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))
        depthwise = module.groups == module.in_channels > 1
        layer = base(
            inputs,
            outputs,
            module.kernel_size,
            module.stride,
            module.padding,
            module.dilation,
            inputs if depthwise else module.groups,
            module.bias is not None,
            module.padding_mode,
            device="meta",
        )
    if isinstance(module, _BatchNorm):
        reference = new((1,))
        return layer.to(reference.device, reference.dtype).eval()
    for name, parameter in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(new(tuple(parameter.shape)), requires_grad=False))
    return layer.eval()
