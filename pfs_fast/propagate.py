"""Follow every channel through a traced graph.

Each output channel of a convolution or linear layer gets a *label*, an integer; operations move labels, couple them
(a residual sum: both operands' channels live and die together) or stop them (a layer that mixes channels, an operation
that is not understood). Label 0 stands for "no channel of ours". Coupling is collected here and resolved in ``groups``.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from . import rules
from .trace import TracedModel

NONE = 0


@dataclass(frozen=True)
class Value:
    """A tensor of known shape whose labels vary along one dimension at most.

    Attributes:
        shape: Sizes.
        dim: The labelled dimension, or None: no label anywhere.
        labels: Labels along ``dim``. [shape[dim]], int64.
        zero: A dropped channel is exactly 0 here, if every layer's dropped output channels are.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    labels: np.ndarray | None = None
    zero: bool = True


@dataclass
class LayerUse:
    """What the propagation saw of one layer."""

    out: np.ndarray
    inputs: np.ndarray
    positions: int = 0  # output positions of one image, summed over calls in eval mode
    depthwise: bool = False


@dataclass
class Constraints:
    """Everything that decides units and groups."""

    num_labels: int = 1
    pairs: list[tuple[np.ndarray, np.ndarray]] = field(
        default_factory=list
    )  # live and die together
    ties: list[tuple[np.ndarray, np.ndarray]] = field(
        default_factory=list
    )  # the same number must stay
    fixed: list[tuple[np.ndarray, str]] = field(default_factory=list)
    residual: list[np.ndarray] = field(default_factory=list)
    layers: dict[str, LayerUse] = field(default_factory=dict)
    producers: dict[str, np.ndarray] = field(default_factory=dict)


class Propagation:
    """Runs both graphs of a traced model on labels."""

    def __init__(self, traced: TracedModel) -> None:
        self.constraints = Constraints()
        self.outputs: dict[
            tuple[int, str], Value
        ] = {}  # (graph index, node name) -> value that leaves a node
        self._modules = dict(traced.train.named_modules())
        self._shared = _shared_weights(traced.train)
        for index, graph_module in enumerate(traced.graphs):
            self._index = index
            self._count = graph_module is traced.eval
            self._run(index, graph_module.graph)

    # -- graph walk ------------------------------------------------------------------------------------------------

    def _run(self, index: int, graph: fx.Graph) -> None:
        env: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: env[n])
            result = self._node(node, args, kwargs)
            env[node] = result
            if isinstance(result, Value):
                self.outputs[index, node.name] = result
                if rules.writes_in_place(node, self._module(node)):
                    env[node.args[0]] = result  # later readers of the operand see the new values

    def _node(self, node: fx.Node, args: tuple, kwargs: dict) -> Any:
        if node.op in ("placeholder", "get_attr"):
            return _unlabelled(node.meta["val"])
        if node.op == "output":
            self._fix_all(args, "it is an output of the network")
            return None
        module = self._module(node)
        if isinstance(module, _ConvNd) and not isinstance(module, _ConvTransposeNd):
            return self._conv(node, module, _input(args, kwargs))
        if isinstance(module, nn.Linear):
            return self._linear(node, module, _input(args, kwargs))
        if isinstance(module, _BatchNorm):
            return self._batch_norm(node, module, _input(args, kwargs))
        values = [v for v in _flatten((args, kwargs)) if isinstance(v, Value)]
        if not values:  # arithmetic on sizes and other plain values
            return _unlabelled(node.meta["val"])
        return self._operation(node, rules.plain_name(node, module), args, kwargs, values)

    def _module(self, node: fx.Node) -> nn.Module | None:
        return self._modules[node.target] if node.op == "call_module" else None

    def _operation(
        self, node: fx.Node, name: str, args: tuple, kwargs: dict, values: list[Value]
    ) -> Any:
        meta = node.meta["val"]
        if name == "getitem" and not isinstance(args[0], Value):
            return args[0][args[1]]  # one of several results
        if isinstance(node.target, type) and issubclass(node.target, tuple):
            return values  # a named tuple of results
        if not isinstance(meta, torch.Tensor) and not _holds_tensors(meta):
            return _unlabelled(meta)  # x.shape, x.size(0), x.dim()
        if all(v.dim is None for v in values):
            return _unlabelled(meta)
        x = values[0]
        if name in rules.ZERO_PRESERVING and len(values) == 1:
            return x
        if name in rules.ELEMENTWISE and len(values) == 1:
            zero = x.zero and name in rules.BOUNDED and self._maps_zero_to_zero(node)
            return Value(x.shape, x.dim, x.labels, zero)
        if (
            name == "prelu"
            and node.op == "call_module"
            and self._modules[node.target].num_parameters == 1
        ):
            return x
        if name in rules.ADDITIVE | rules.MULTIPLICATIVE | rules.DIVISION:
            return self._binary(node, name, args, kwargs)
        if (
            name in rules.SPATIAL
            and x.dim == 1
            and isinstance(meta, torch.Tensor)
            and meta.shape[1] == x.shape[1]
            # Without a batch dimension the channels would be positions: max_pool2d of [N, C, L] mixes them.
            and (not name.endswith(("1d", "2d", "3d")) or len(x.shape) == int(name[-2]) + 2)
        ):
            return Value(tuple(meta.shape), 1, x.labels, x.zero)
        if name in rules.REDUCTION and len(values) == 1:
            return self._reduction(node, x, args, kwargs)
        if name in rules.CONCATENATION:
            return self._concatenation(node, args, kwargs)
        if name == "pad":
            return self._pad(node, x, args, kwargs)
        if name in rules.MOVEMENT and len(values) == 1:
            return self._movement(node, name, x, args, kwargs)
        return self._refuse(node, values, f"the operation '{name}' ({node.name}) is not understood")

    # -- layers ----------------------------------------------------------------------------------------------------

    def _conv(self, node: fx.Node, module: _ConvNd, x: Value) -> Value:
        shape = tuple(node.meta["val"].shape)
        dim = len(shape) - len(module.kernel_size) - 1
        depthwise = module.groups == module.in_channels and module.groups > 1
        positions = int(np.prod(shape[dim + 1 :]))
        if depthwise:
            # A depth multiplier gives every input channel several outputs, side by side.
            read = self._read(x, dim, module.in_channels, node.target)
            out = self._reuse(
                node.target,
                np.repeat(read, module.out_channels // module.in_channels),
                read,
                positions,
            )
            self.constraints.layers[node.target].depthwise = True
            return _value(shape, dim, out)
        read = self._mix(x, dim, module.in_channels, node.target)
        out = self._produce(node.target, module, module.out_channels)
        if module.groups > 1:
            for labels in (read, out):
                rows = labels.reshape(module.groups, -1)
                for row in rows[1:]:
                    self.constraints.ties.append((rows[0], row))
        return Value(shape, dim, self._reuse(node.target, out, read, positions))

    def _linear(self, node: fx.Node, module: nn.Linear, x: Value) -> Value:
        shape = tuple(node.meta["val"].shape)
        dim = len(shape) - 1
        read = self._mix(x, dim, module.in_features, node.target)
        out = self._produce(node.target, module, module.out_features)
        return Value(shape, dim, self._reuse(node.target, out, read, int(np.prod(shape[1:-1]))))

    def _batch_norm(self, node: fx.Node, module: _BatchNorm, x: Value) -> Value:
        read = self._read(x, 1, module.num_features, node.target)
        return _value(x.shape, 1, self._reuse(node.target, read, read, 0))

    def _read(self, x: Value, dim: int, size: int, name: str) -> np.ndarray:
        """Labels of a layer's input channels; labels in another dimension are held fixed."""
        if x.dim == dim:
            return x.labels
        if x.dim is not None:
            self._fix(x.labels, f"layer '{name}' reads it along another dimension")
        return np.zeros(size, dtype=np.int64)

    def _mix(self, x: Value, dim: int, size: int, name: str) -> np.ndarray:
        read = self._read(x, dim, size, name)
        if not x.zero:
            self._fix(read, f"a dropped channel would not be 0 where layer '{name}' reads it")
        return read

    def _produce(self, name: str, module: nn.Module, size: int) -> np.ndarray:
        c = self.constraints
        if name not in c.producers:
            c.producers[name] = np.arange(c.num_labels, c.num_labels + size)
            c.num_labels += size
            reason = self._unprunable(name, module)
            if reason:
                self._fix(c.producers[name], reason)
        return c.producers[name]

    def _unprunable(self, name: str, module: nn.Module) -> str | None:
        if name in self._shared:
            return f"layer '{name}' shares its weight with '{self._shared[name]}'"
        if hasattr(module, "parametrizations") or "weight" not in module._parameters:
            return f"the weight of layer '{name}' is computed (a parametrisation or weight norm)"
        return None

    def _reuse(self, name: str, out: np.ndarray, read: np.ndarray, positions: int) -> np.ndarray:
        """Record a call of a layer; a second call must see the same channels."""
        c = self.constraints
        use = c.layers.get(name)
        if use is None:
            use = c.layers[name] = LayerUse(out, read)
            reason = self._unprunable(name, self._modules[name])
            if reason:
                self._fix(read, reason)
        else:
            self._couple(use.inputs, read)
            self._couple(use.out, out)
        use.positions += positions * self._count
        return out

    # -- operations ------------------------------------------------------------------------------------------------

    def _maps_zero_to_zero(self, node: fx.Node) -> bool:
        """Runs an operation whose f(0) depends on its arguments (``clamp(min=0.1)``) on a zero."""

        def plain(n: fx.Node) -> Any:
            return torch.zeros(1) if isinstance(n.meta["val"], torch.Tensor) else n.meta["val"]

        args, kwargs = fx.map_arg((node.args, node.kwargs), plain)
        if node.op == "call_module":
            result = self._modules[node.target](*args, **kwargs)
        elif node.op == "call_method":
            result = getattr(args[0], node.target)(*args[1:], **kwargs)
        else:
            result = node.target(*args, **kwargs)
        return not bool(result.any())

    def _binary(self, node: fx.Node, name: str, args: tuple, kwargs: dict) -> Value:
        shape = tuple(node.meta["val"].shape)
        names = ("input", "other")[len(args) :]
        args = (*args[:2], *(kwargs[n] for n in names if n in kwargs))
        if len(args) < 2:
            return self._refuse(
                node, _flatten((args, kwargs)), f"the operands of '{node.name}' are not understood"
            )
        operands = [a for a in args if isinstance(a, Value)]
        aligned = [
            (v, None if v.dim is None else v.dim + len(shape) - len(v.shape)) for v in operands
        ]
        labelled = [(v, d) for v, d in aligned if d is not None]
        zero = all(v.zero and v.dim is not None for v in operands) and len(operands) == 2
        if name in rules.MULTIPLICATIVE:
            zero = any(v.zero for v, _ in labelled)
        elif name in rules.DIVISION:  # 0 / x, never x / 0
            zero = isinstance(args[0], Value) and args[0].dim is not None and args[0].zero
            if isinstance(args[1], Value) and args[1].dim is not None:
                return self._refuse(
                    node, operands, f"'{node.name}' divides by a channel that may be dropped"
                )
        if len(labelled) == 1:
            (x, dim), other = labelled[0], next((v for v in operands if v.dim is None), None)
            if other is not None and _size_at(other.shape, dim, len(shape)) > 1:
                return self._refuse(
                    node, [x], f"'{node.name}' combines it with a tensor of fixed size"
                )
            if shape[dim] != len(x.labels):
                return self._refuse(node, [x], f"'{node.name}' broadcasts a single channel")
            return Value(shape, dim, x.labels, zero)
        (a, dim_a), (b, dim_b) = labelled
        if dim_a != dim_b or len(a.labels) != len(b.labels):
            return self._refuse(
                node,
                operands,
                f"'{node.name}' combines channels of different dimensions or numbers",
            )
        self._couple(a.labels, b.labels)
        if name in rules.ADDITIVE:
            self.constraints.residual += [a.labels, b.labels]
        return Value(shape, dim_a, np.where(a.labels == NONE, b.labels, a.labels), zero)

    def _reduction(self, node: fx.Node, x: Value, args: tuple, kwargs: dict) -> Value:
        dims = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if dims is None:
            return self._refuse(node, [x], f"'{node.name}' reduces over channels")
        dims = {d % len(x.shape) for d in ([dims] if isinstance(dims, int) else dims)}
        if x.dim in dims:
            return self._refuse(node, [x], f"'{node.name}' reduces over channels")
        shape = tuple(node.meta["val"].shape)
        dim = x.dim if len(shape) == len(x.shape) else x.dim - sum(d < x.dim for d in dims)
        return Value(shape, dim, x.labels, x.zero)

    def _concatenation(self, node: fx.Node, args: tuple, kwargs: dict) -> Value:
        tensors = kwargs.get("tensors", args[0] if args else None)
        shape = tuple(node.meta["val"].shape)
        dim = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)) % len(shape)
        labelled = [v for v in tensors if v.dim is not None]
        zero = all(v.zero for v in labelled)
        if all(v.dim == dim for v in labelled):
            parts = [
                v.labels if v.dim == dim else np.zeros(v.shape[dim], dtype=np.int64)
                for v in tensors
            ]
            return Value(shape, dim, np.concatenate(parts), zero)
        first = labelled[0]
        if len(labelled) < len(tensors) or any(v.dim != first.dim for v in labelled):
            return self._refuse(
                node, list(tensors), f"'{node.name}' joins it along another dimension"
            )
        for v in labelled[1:]:
            self._couple(first.labels, v.labels)
        return Value(shape, first.dim, first.labels, zero)

    def _pad(self, node: fx.Node, x: Value, args: tuple, kwargs: dict) -> Value:
        pads = kwargs.get("pad", args[1] if len(args) > 1 else ())
        mode = kwargs.get("mode", args[2] if len(args) > 2 else "constant")
        value = kwargs.get("value", args[3] if len(args) > 3 else None)
        spatial = 2 * (len(x.shape) - 1 - x.dim)
        if mode == "constant" and value:
            return self._refuse(node, [x], f"'{node.name}' pads with a value that is not 0")
        if len(pads) > spatial and any(pads[:spatial]):
            return self._refuse(node, [x], f"'{node.name}' pads channels and positions at once")
        labels = x.labels
        if len(pads) > spatial:
            before, after = pads[spatial], pads[spatial + 1]
            if before < 0 or after < 0:
                return self._refuse(node, [x], f"'{node.name}' crops channels")
            labels = np.concatenate([np.zeros(before, np.int64), labels, np.zeros(after, np.int64)])
        return Value(tuple(node.meta["val"].shape), x.dim, labels, x.zero)

    def _movement(self, node: fx.Node, name: str, x: Value, args: tuple, kwargs: dict) -> Any:
        """Run the operation itself on a tensor of channel indices, and see where they come out."""
        view = [1] * len(x.shape)
        view[x.dim] = -1
        channels = torch.arange(len(x.labels)).view(view).expand(x.shape)
        rest = fx.map_arg(node.args[1:], lambda n: n.meta["val"])
        plain = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
        try:
            if node.op == "call_module":
                moved = self._modules[node.target](channels)
            elif name == "view":  # the tensor of indices may be strided otherwise than the real one
                moved = channels.reshape(*rest, **plain)
            elif node.op == "call_method":
                moved = getattr(channels, node.target)(*rest, **plain)
            else:
                moved = node.target(channels, *rest, **plain)
        except Exception as error:
            return self._refuse(node, [x], f"'{node.name}' could not be followed ({error})")
        outputs = moved if isinstance(moved, (tuple, list)) else (moved,)
        results = [self._settle(node, name, x, out) for out in outputs]
        if any(r is None for r in results):
            return self._refuse(
                node, [x], f"'{node.name}' ({name}) cuts the channels at fixed places"
            )
        if (
            isinstance(moved, (tuple, list))
            and results[0].dim is not None
            and len(results[0].labels) < len(x.labels)
        ):
            # Pieces of equal size: each must keep as many channels as the others.
            if name not in ("chunk", "tensor_split") or len({len(r.labels) for r in results}) > 1:
                return self._refuse(
                    node, [x], f"'{node.name}' ({name}) cuts the channels at fixed places"
                )
            for other in results[1:]:
                self.constraints.ties.append((results[0].labels, other.labels))
        return type(moved)(results) if isinstance(moved, (tuple, list)) else results[0]

    def _settle(self, node: fx.Node, name: str, x: Value, moved: torch.Tensor) -> Value | None:
        """The moved channels as a ``Value``, or None where a slim network could not repeat the move."""
        shape = tuple(moved.shape)
        varying = [d for d in range(moved.dim()) if _varies(moved, d)]
        if not varying:
            label = int(x.labels[int(moved.flatten()[0])]) if moved.numel() else NONE
            if label != NONE and len(x.labels) > 1:
                return None  # one channel picked by its index
            ones = [d for d in range(len(shape)) if shape[d] == 1]
            return (
                Value(shape)
                if label == NONE
                else Value(shape, ones[0] if ones else None, np.array([label]), x.zero)
            )
        free = [d for d in varying if self._size_is_free(node, name, d, shape, x)]
        if not free:
            return None
        dim = free[-1]
        index = tuple(slice(None) if d == dim else 0 for d in range(len(shape)))
        channels = moved[index].numpy()
        if name == "getitem" and not np.array_equal(channels, np.arange(len(x.labels))):
            return None  # a slice of the channels
        labels = x.labels[channels]
        if len(varying) > 1:
            # The channels are split over several dimensions (a shuffle): every row must keep the same positions.
            rows = moved.movedim(dim, -1).reshape(-1, len(labels)).unique(dim=0).numpy()
            for row in rows:
                self.constraints.ties.append((labels, x.labels[row]))
        return Value(shape, dim, labels, x.zero)

    def _size_is_free(
        self, node: fx.Node, name: str, dim: int, shape: tuple[int, ...], x: Value
    ) -> bool:
        """Whether the output size along ``dim`` follows the channels: computed from them, -1 or implied, not a number."""
        if name == "unflatten":
            return False
        if name not in ("view", "reshape", "expand"):
            return True
        sizes = node.args[1:] or (node.kwargs.get("shape") or node.kwargs.get("size"),)
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list, torch.Size)):
            sizes = sizes[0]
        if len(sizes) == 1 and isinstance(sizes[0], fx.Node):
            return name != "expand" and self._counts_channels(
                sizes[0], x
            )  # a whole shape that was computed
        if len(sizes) != len(shape):
            return False
        return (
            sizes[dim] == -1
            if not isinstance(sizes[dim], fx.Node)
            else self._counts_channels(sizes[dim], x)
        )

    def _counts_channels(self, size: fx.Node, x: Value) -> bool:
        """Whether a size was computed from tensors with the channels of ``x``: another tensor may keep another number."""
        sources, seen = [size], set()
        while sources:
            source = sources.pop()
            if source in seen:
                continue
            seen.add(source)
            if not isinstance(source.meta["val"], torch.Tensor):
                sources += source.all_input_nodes
                continue
            value = self.outputs.get((self._index, source.name))
            if value is None or value.dim is None or not np.isin(x.labels, value.labels).all():
                return False
        return True

    # -- constraints -----------------------------------------------------------------------------------------------

    def _couple(self, a: np.ndarray, b: np.ndarray) -> None:
        if a is not b:
            self.constraints.pairs.append((a, b))
        # A channel that is joined with a fixed one is fixed.
        for labels, other in ((a, b), (b, a)):
            stuck = labels[(other == NONE) & (labels != NONE)]
            if len(stuck):
                self._fix(stuck, "it is joined with channels that are not of a prunable layer")

    def _fix(self, labels: np.ndarray, reason: str) -> None:
        self.constraints.fixed.append((labels[labels != NONE], reason))

    def _fix_all(self, nested: Any, reason: str) -> None:
        for value in _flatten(nested):
            if isinstance(value, Value) and value.dim is not None:
                self._fix(value.labels, reason)

    def _refuse(self, node: fx.Node, values: list[Value], reason: str) -> Any:
        self._fix_all(values, reason)
        return _unlabelled(node.meta["val"])


def _input(args: tuple, kwargs: dict) -> Value:
    """What a layer is called with: ``layer(x)`` or ``layer(input=x)``."""
    return args[0] if args else kwargs["input"]


def _value(shape: tuple[int, ...], dim: int, labels: np.ndarray) -> Value:
    return Value(shape, dim, labels) if labels.any() else Value(shape)


def _unlabelled(value: Any) -> Any:
    """A fake tensor (or a nest of them) as values without labels; plain numbers stay as they are."""
    if isinstance(value, torch.Tensor):
        return Value(tuple(value.shape))
    if isinstance(value, (tuple, list)) and _holds_tensors(value):
        return [_unlabelled(v) for v in value]
    if isinstance(value, dict):
        return {k: _unlabelled(v) for k, v in value.items()}
    return value


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(v, torch.Tensor) for v in _flatten(value))


def _flatten(nested: Any) -> list[Any]:
    if isinstance(nested, dict):
        return [leaf for v in nested.values() for leaf in _flatten(v)]
    if isinstance(nested, (tuple, list)):
        return [leaf for v in nested for leaf in _flatten(v)]
    return [nested]


def _size_at(shape: tuple[int, ...], dim: int, ndim: int) -> int:
    position = dim - (ndim - len(shape))
    return shape[position] if position >= 0 else 1


def _varies(channels: torch.Tensor, dim: int) -> bool:
    if channels.size(dim) <= 1 or channels.stride(dim) == 0:
        return False
    return not bool((channels == channels.select(dim, 0).unsqueeze(dim)).all())


def _shared_weights(root: nn.Module) -> dict[str, str]:
    """Layers whose weight another layer holds as well, by name."""
    holders: dict[int, list[str]] = defaultdict(list)
    for name, module in root.named_modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            holders[id(weight)].append(name)
    return {
        n: next(m for m in names if m != n)
        for names in holders.values()
        if len(names) > 1
        for n in names
    }
