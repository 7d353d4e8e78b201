"""Narrow modules in place: keep some channels of their parameters, buffers and attributes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from ..errors import ModelError, StructureError
from .scales import Scale, find_scales

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Norms that leave every channel, or every group of channels, to itself.
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm, FrozenBatchNorm2d)

Indices = tuple[int, ...]
Kept = tuple[Indices | None, Indices | None]  # kept (in, out) channels, ascending; None: all


def layers_by_name(model: nn.Module, names: Iterable[str] = ()) -> dict[str, nn.Module | Scale]:
    """All modules of a model, under all their names, and those of ``names`` that are parameters which scale channels."""
    return dict(model.named_modules(remove_duplicate=False)) | find_scales(model, names)


def kind_of(module: nn.Module | Scale | None) -> str | None:
    """``"conv"``, ``"linear"``, ``"bn"`` or ``"scale"`` for what has a width that can change, else None.

    ``"bn"`` is every layer that takes its channels one by one: norms, and PReLU with a slope for each.
    """
    if isinstance(module, Scale):
        return "scale"
    if isinstance(module, CONVOLUTIONS):
        return "conv"
    if isinstance(module, nn.Linear):
        return "linear"
    return "bn" if is_channelwise(module) else None


def kind_in_file(module: nn.Module | None) -> str | None:
    """``kind_of``, with a PReLU of one slope, which may be what is left of one with a slope for each channel."""
    return "bn" if isinstance(module, nn.PReLU) else kind_of(module)


def is_channelwise(module: nn.Module | None) -> bool:
    """Norms and PReLU: as many outputs as inputs, with parameters for each channel."""
    return isinstance(module, NORMS) or (isinstance(module, nn.PReLU) and module.num_parameters > 1)


def widths_of(module: nn.Module | Scale) -> tuple[int, int]:
    """``(in, out)`` channels of a module that ``kind_of`` knows."""
    if isinstance(module, Scale):
        return (module.width,) * 2
    if isinstance(module, CONVOLUTIONS):
        return module.in_channels, module.out_channels
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if isinstance(module, FrozenBatchNorm2d):
        return (module.weight.shape[0],) * 2
    return (getattr(module, _WIDTH_OF[_base(module)]),) * 2


_WIDTH_OF = {
    **dict.fromkeys((*BATCH_NORMS, *INSTANCE_NORMS), "num_features"),
    nn.GroupNorm: "num_channels",
    nn.PReLU: "num_parameters",
}


def _base(module: nn.Module) -> type[nn.Module]:
    return next(base for base in _WIDTH_OF if isinstance(module, base))


def narrow_layers(function: str, model: nn.Module, plan: Mapping[str, Kept]) -> None:
    """Narrow modules of a model in place; modules and parameters that occur twice stay shared.

    Args:
        function: Name of the caller, for errors.
        model: The model to change.
        plan: ``{module name: kept (in, out) channels}``.

    Raises:
        StructureError: Names the layer that cannot be narrowed so. The model may then be narrowed in part.
    """
    modules = layers_by_name(model, plan)
    done: dict[nn.Module | Scale, Kept] = {}
    narrowed: dict[tuple[int, Kept], nn.Parameter] = {}
    originals: dict[int, nn.Parameter] = {}  # keeps them alive, so that their ids stay theirs
    for name, kept in plan.items():
        module = modules[name]
        if module in done:
            if done[module] != kept:
                raise StructureError(
                    f"{function}: layer {name} must keep the same channels under all its names"
                )
            continue
        done[module] = kept
        if isinstance(module, Scale):
            _narrow_scale(module, kept[1], narrowed, originals)
            continue
        try:
            _narrow(module, *kept, narrowed, originals)
        except StructureError as error:
            raise StructureError(f"{function}: layer {name} {error}") from None
    for name, parameter in model.named_parameters():
        if id(parameter) in originals:
            raise StructureError(
                f"{function}: parameter {name} must not be shared with a layer that is narrowed differently; untie it first"
            )
    shared = [key[0] for key in narrowed]
    if len(shared) != len(set(shared)):
        raise StructureError(
            f"{function}: layers that share a parameter must keep the same channels; untie the parameter first"
        )


def _narrow(
    module: nn.Module,
    kept_in: Indices | None,
    kept_out: Indices | None,
    narrowed: dict[tuple[int, Kept], nn.Parameter],
    originals: dict[int, nn.Parameter],
) -> None:
    """Narrow one module in place. Raises StructureError with the end of a sentence that starts with the layer."""
    tensors: dict[str, Kept]  # parameter or buffer -> kept indices of dimensions 1 and 0
    if is_channelwise(module):
        kept_out = kept_out if kept_out is not None else kept_in
        tensors = dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (None, kept_out))
        attributes = _channelwise_attributes(module, kept_out)
    elif isinstance(module, nn.Linear):
        tensors = {"weight": (kept_in, kept_out), "bias": (None, kept_out)}
        attributes = {
            "in_features": _length(kept_in, module.in_features),
            "out_features": _length(kept_out, module.out_features),
        }
    else:
        groups = _new_groups(module, kept_in, kept_out)
        tensors = {"weight": (kept_in, kept_out), "bias": (None, kept_out)}
        attributes = {
            "in_channels": _length(kept_in, module.in_channels),
            "out_channels": _length(kept_out, module.out_channels),
            "groups": groups,
        }
    with torch.no_grad():
        for name, kept in tensors.items():
            if name in module._parameters:
                old = module._parameters[name]
                if old is None:
                    continue
                key = (id(old), kept)
                originals[id(old)] = old
                if key not in narrowed:
                    new = (
                        _narrow_weight(module, old, *kept)
                        if name == "weight"
                        else _take(old, *kept)
                    )
                    narrowed[key] = _like_parameter(old, new)
                module._parameters[name] = narrowed[key]
            elif name in module._buffers:
                old_buffer = module._buffers[name]
                module._buffers[name] = None if old_buffer is None else _take(old_buffer, *kept)
            elif name in ("weight", "bias") and hasattr(module, name):
                raise StructureError(
                    f"must hold its {name} as a plain parameter, got a computed one; remove weight norm, spectral norm, "
                    "pruning masks or parametrizations first"
                )
    for name, value in attributes.items():
        setattr(module, name, value)


def _narrow_scale(
    scale: Scale,
    kept: Indices | None,
    narrowed: dict[tuple[int, Kept], nn.Parameter],
    originals: dict[int, nn.Parameter],
) -> None:
    old = scale.parameter
    originals[id(old)] = old
    index = torch.tensor(range(scale.width) if kept is None else kept, device=old.device)
    new = _in_format_of(old, old.detach().index_select(scale.dim, index))
    narrowed[id(old), (None, kept)] = _like_parameter(old, new)
    scale.owner._parameters[scale.attribute] = narrowed[id(old), (None, kept)]


def _channelwise_attributes(module: nn.Module, kept: Indices | None) -> dict[str, int]:
    """New widths of a layer that takes its channels one by one."""
    if isinstance(module, FrozenBatchNorm2d):
        return {}
    attributes = {_WIDTH_OF[_base(module)]: _length(kept, widths_of(module)[1])}
    if isinstance(module, nn.GroupNorm) and kept is not None:
        per_group = module.num_channels // module.num_groups
        groups = sorted({channel // per_group for channel in kept})
        if list(kept) != [g * per_group + i for g in groups for i in range(per_group)]:
            raise StructureError(
                f"must keep whole groups of {per_group} channels, which it normalises together, got {str(kept)[:60]}"
            )
        attributes["num_groups"] = len(groups)
    return attributes


def _length(kept: Indices | None, size: int) -> int:
    return size if kept is None else len(kept)


def _new_groups(conv: nn.Module, kept_in: Indices | None, kept_out: Indices | None) -> int:
    """Number of groups after narrowing; StructureError where the kept channels do not form legal groups."""
    groups = conv.groups
    if groups == 1:
        return 1
    kept_in = tuple(range(conv.in_channels)) if kept_in is None else kept_in
    kept_out = tuple(range(conv.out_channels)) if kept_out is None else kept_out
    depthwise = groups == conv.in_channels
    left = (
        set(kept_in) if depthwise else set(range(groups))
    )  # a depthwise group goes with its input channel
    for kept, per_group, side in (
        (kept_in, conv.in_channels // groups, "input"),
        (kept_out, conv.out_channels // groups, "output"),
    ):
        counts = [0] * groups
        for channel in kept:
            counts[channel // per_group] += 1
        lost = any(count for group, count in enumerate(counts) if group not in left)
        if lost or len({counts[group] for group in left}) > 1:
            what = "inputs that it keeps, and of no other" if depthwise else f"{groups} groups"
            raise StructureError(
                f"must keep equally many {side} channels of each of its {what}, got {counts[:16]}"
            )
    return len(left)


def _narrow_weight(
    module: nn.Module, weight: torch.Tensor, kept_in: Indices | None, kept_out: Indices | None
) -> torch.Tensor:
    """Kept slices of a weight. [out, in / groups, *kernel]; transposed convolutions [in, out / groups, *kernel]."""
    if weight.dim() < 2:
        return _take(weight, None, kept_out)
    groups = getattr(module, "groups", 1)
    sides = [(kept_out, weight.shape[0]), (kept_in, weight.shape[1] * groups)]
    if isinstance(module, TRANSPOSED):
        sides = [(kept_in, weight.shape[0]), (kept_out, weight.shape[1] * groups)]
    (kept_rows, num_rows), (kept_columns, _) = sides
    if groups == 1:
        return _take(weight, kept_columns, kept_rows)
    if kept_columns is None or groups == module.in_channels:  # depthwise: all of a row's columns
        return _take(weight, None, kept_rows)
    per_group, rows = weight.shape[1], range(num_rows) if kept_rows is None else kept_rows
    local: list[list[int]] = [[] for _ in range(groups)]  # kept columns inside each group
    for channel in kept_columns:
        local[channel // per_group].append(channel % per_group)
    columns = [local[row // (num_rows // groups)] for row in rows]
    row_index = torch.tensor(list(rows), device=weight.device)[:, None]
    return _in_format_of(weight, weight[row_index, torch.tensor(columns, device=weight.device)])


def _take(tensor: torch.Tensor, dim1: Indices | None, dim0: Indices | None) -> torch.Tensor:
    """A copy of the kept slices, in the memory format of ``tensor``."""
    taken = tensor.detach()
    for dim, kept in ((0, dim0), (1, dim1)):
        if kept is not None:
            taken = taken.index_select(
                dim, torch.tensor(kept, dtype=torch.int64, device=tensor.device)
            )
    return _in_format_of(tensor, taken)


def _in_format_of(tensor: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """A fresh tensor with the values of ``taken`` and the dense layout (contiguous or channels last) of ``tensor``."""
    layout = torch.contiguous_format
    for ndim, channels_last in ((4, torch.channels_last), (5, torch.channels_last_3d)):
        if tensor.dim() == ndim and tensor.stride() == _strides(tensor.shape, channels_last):
            layout = channels_last
    if tensor.stride() == _strides(tensor.shape, torch.contiguous_format):
        layout = torch.contiguous_format
    own = taken.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()
    if own and taken.stride() == _strides(taken.shape, layout):
        return taken
    return torch.empty(
        taken.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout
    ).copy_(taken)


def _strides(shape: torch.Size, layout: torch.memory_format) -> tuple[int, ...]:
    return torch.empty(shape, device="meta", memory_format=layout).stride()


def _like_parameter(old: nn.Parameter, new: torch.Tensor) -> nn.Parameter:
    """A parameter of the same class, ``requires_grad`` and attributes as ``old``."""
    parameter = nn.Parameter(new, requires_grad=old.requires_grad)
    if type(old) is not nn.Parameter:
        raise ModelError(
            f"slim: parameters must be plain nn.Parameter, got {type(old).__name__}; convert the model first"
        )
    parameter.__dict__.update(old.__dict__)
    return parameter
