"""Slim modules: the same class with fewer channels, made by narrowing the modules of a copy."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import nn

from .._ambient import own_settings
from .._modules import require_plain
from ..budgets.structure import Structure
from ..errors import ConfigError, StructureError
from ..graph.narrow import (
    Indices,
    Kept,
    kind_in_file,
    kind_of,
    layers_by_name,
    narrow_layers,
    widths_of,
)
from .init import initialise

__all__ = ["kind_in_file", "kind_of", "narrow_layers", "narrow_to", "slim", "widths_of"]


@own_settings()
def slim(
    model: nn.Module,
    structure: Structure,
    weights: Literal["fresh", "inherit"] = "fresh",
    verify: bool = False,
    *,
    example_input: torch.Tensor | tuple[Any, ...] | None = None,
    seed: int | None = None,
) -> nn.Module:
    """A plain module of the model's class that has only the kept channels.

    Args:
        model: The whole network; never modified.
        structure: Kept channels of the model.
        weights: ``"fresh"``: initialised anew, as the model's class does (the method trains slim networks from scratch).
            ``"inherit"``: the kept slices of the model's weights and statistics.
        verify: Prove with ``pfs_fast.verify`` that the structure cuts this model correctly; needs ``example_input``.
        example_input: Input for the proof.
        seed: Seed of the fresh weights; the global random state is then left alone. Default: draw from it.

    Returns:
        nn.Module: The slim network, with mode, device, dtype, memory format, hooks and ``requires_grad`` of the model. Its
        attribute ``pfs_structure`` is ``structure.to_json()``.

    Raises:
        StructureError: If the structure does not fit the model; names the layer.
        ModelError: For a wrapped or compiled model.
        ConfigError: For another value of ``weights``, or ``verify`` without ``example_input``.
        BusyError: Fresh weights while another thread of the process is in a search or a training.
    """
    require_plain("slim", model)
    if not isinstance(structure, Structure):
        raise StructureError(
            f"slim: structure must be a Structure, got {type(structure).__name__}; pass result.structure, or Structure.from_json(text)"
        )
    if not isinstance(verify, bool):
        raise ConfigError(f"slim: verify must be True or False, got {verify!r}")
    if not isinstance(weights, str) or weights not in ("fresh", "inherit"):
        raise ConfigError(
            f"slim: weights must be 'fresh' or 'inherit', got {weights!r}; use one of them"
        )
    if verify:
        if example_input is None:
            raise ConfigError(
                "slim: example_input must be given with verify=True, got None; pass one batch of images"
            )
        from .verify import verify as prove

        prove(model, None, structure, example_input)
    plan = _plan(model, structure)
    narrow = _copy_to_narrow(model, plan)
    narrow_layers("slim", narrow, plan)
    _check_params(model, narrow, structure)
    if weights == "fresh":
        initialise(narrow, seed=seed)
    narrow.pfs_structure = structure.to_json()
    return narrow


def _check_params(model: nn.Module, narrow: nn.Module, structure: Structure) -> None:
    """As many parameters must have gone as the structure says: layers that do not fit each other give another number.

    A structure without groups, made by hand, says nothing of its cost.
    """
    if not structure.kept:
        return
    whole, left = (sum(p.numel() for p in m.parameters()) for m in (model, narrow))
    if whole - left != structure.base_params - structure.params:
        raise StructureError(
            f"slim: structure must remove {structure.base_params - structure.params:,} parameters from the model, as it says, "
            f"got {whole - left:,}; the structure was changed by hand or damaged, cut it from the search again"
        )


def narrow_to(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> nn.Module:
    """A copy of a model narrowed to given widths, for loading a slim state into. Its weights mean nothing.

    Args:
        model: The whole network; never modified.
        layers: ``{module name: {"kind": "conv" | "linear" | "bn", "in": int, "out": int, "groups": int}}``.

    Raises:
        StructureError: If a layer is missing, of another kind, narrower than asked for, or the widths do not fit its groups.
        ModelError: For a wrapped or compiled model.
    """
    require_plain("narrow_to", model)
    modules = layers_by_name(model, layers)
    plan: dict[str, Kept] = {}
    for name, entry in layers.items():
        module = modules.get(name)
        kind = kind_in_file(module)
        if kind is None or kind != entry["kind"]:
            found = "no such module" if module is None else type(module).__name__
            raise StructureError(
                f"narrow_to: layer {name} must be a {entry['kind']} layer, got {found}; pass a model of the original class"
            )
        width_in, width_out = widths_of(module)
        if not 1 <= entry["in"] <= width_in or not 1 <= entry["out"] <= width_out:
            raise StructureError(
                f"narrow_to: layer {name} must have at least {entry['in']} inputs and {entry['out']} outputs, got "
                f"{width_in} and {width_out}; pass the whole network that was slimmed"
            )
        kept = _leading_channels(name, module, entry)
        if (entry["in"], entry["out"]) != (width_in, width_out):
            plan[name] = kept
    narrow = _copy_to_narrow(model, plan)
    narrow_layers("narrow_to", narrow, plan)
    return narrow


def _copy_to_narrow(model: nn.Module, plan: Mapping[str, Kept]) -> nn.Module:
    """A deep copy but for the weights that narrowing replaces, which are the model's own until then: most of the memory."""
    modules = layers_by_name(model, plan)
    replaced = [modules[name] for name in plan if isinstance(modules[name], nn.Module)]
    weights = [module._parameters.get("weight") for module in replaced]
    return copy.deepcopy(model, {id(weight): weight for weight in weights if weight is not None})


def _plan(model: nn.Module, structure: Structure) -> dict[str, Kept]:
    """Kept ``(in, out)`` channels of every layer of the structure, checked against the model. None: all."""
    modules = layers_by_name(model, structure.widths)
    plan = {}
    for name, width in structure.widths.items():
        module = modules.get(name)
        if kind_of(module) is None:
            found = "no such module" if module is None else type(module).__name__
            raise StructureError(
                f"slim: layer {name} must be a convolution, linear or batch-norm module, got {found}; "
                "use the structure with the model it was made for"
            )
        if widths_of(module) != tuple(width):
            raise StructureError(
                f"slim: layer {name} must have (in, out) = {tuple(width)} channels, got {widths_of(module)}; "
                "use the structure with the model it was made for"
            )
        kept_in, kept_out = structure.inputs.get(name), structure.layers.get(name)
        for kept, size, side in ((kept_in, width[0], "input"), (kept_out, width[1], "output")):
            if kept is not None and (not kept or min(kept) < 0 or max(kept) >= size):
                raise StructureError(
                    f"slim: kept {side} channels of layer {name} must be in 0..{size - 1}, got {str(kept)[:60]}"
                )
        plan[name] = (kept_in, kept_out)
    return plan


def _leading_channels(
    name: str, module: nn.Module, entry: Mapping[str, Any]
) -> tuple[Indices, Indices]:
    """Any legal choice of channels with these widths: the first ones of every convolution group."""
    width_in, width_out = widths_of(module)
    groups = getattr(module, "groups", 1)
    # A depthwise group goes with its input channel; other groups stay.
    left = entry["in"] if groups == width_in > 1 else groups
    if entry["groups"] != left or entry["in"] % left or entry["out"] % left:
        raise StructureError(
            f"narrow_to: layer {name} must have {left} groups that divide its channels, got in {entry['in']}, out "
            f"{entry['out']}, groups {entry['groups']}; pass the whole network that was slimmed"
        )
    return tuple(
        tuple(group * (width // groups) + i for group in range(left) for i in range(new // left))
        for width, new in ((width_in, entry["in"]), (width_out, entry["out"]))
    )
