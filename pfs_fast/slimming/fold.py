"""Batch norms folded into the convolutions before them: the same outputs at inference from fewer operations."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import torch
from torch import fx, nn
from torchvision.ops import FrozenBatchNorm2d

from .._ambient import own_settings
from .._modules import has_hooks, require_plain
from ..errors import ConfigError
from ..graph.narrow import BATCH_NORMS, CONVOLUTIONS, TRANSPOSED
from ..graph.trace import trace


@own_settings()
def fold(
    network: nn.Module, example_input: torch.Tensor | tuple[torch.Tensor, ...] | None = None
) -> nn.Module:
    """A copy of a network for inference, with every batch norm that directly follows a convolution folded into it.

    A convolution or linear layer takes over the scale and the shift of the batch norm that alone reads its output, and
    ``nn.Identity`` takes the norm's place. Other norms stay. The copy has the network's class and is in eval mode; its outputs
    equal the network's up to rounding (1e-5 in float32). Do not train it.

    Args:
        network: Plain module, on any device. Not modified.
        example_input: A batch of inputs [N, C, ...], or a tuple of inputs; only shape and dtype are used. Default: an image of the
            shape that the network was searched or trained on (``pfs_input_shape``).

    Returns:
        nn.Module: The folded copy.

    Raises:
        ConfigError: No example input, for a network that neither ``search`` nor ``train`` has seen.
        ModelError, TraceError: The network cannot be copied or traced.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> fold(net, torch.zeros(1, 3, 8, 8))[1]
        Identity()
    """
    require_plain("fold", network)
    graph = trace(network, _example(network, example_input)).eval
    folded = copy.deepcopy(network).eval()
    for layer_name, norm_name in _pairs(graph, folded):
        _absorb(folded.get_submodule(layer_name), folded.get_submodule(norm_name))
        folded.set_submodule(norm_name, nn.Identity())
    return folded


def _example(network: nn.Module, example_input: Any) -> Any:
    if example_input is not None:
        return example_input
    shape = getattr(network, "pfs_input_shape", None)
    if shape is None:
        raise ConfigError(
            "fold: example_input must be given for a network that was neither searched nor trained here, got None; pass e.g. "
            "torch.zeros(1, 3, 224, 224)"
        )
    like = next(network.parameters(), torch.empty(0))
    return torch.zeros(1, *shape, dtype=like.dtype, device=like.device)


def _pairs(graph: fx.GraphModule, network: nn.Module) -> list[tuple[str, str]]:
    """Names of layers, each with the norm that alone reads its output. Both run once, and only through their forward."""
    modules = dict(network.named_modules(remove_duplicate=False))
    nodes = list(graph.graph.nodes)
    calls = Counter(
        id(modules[n.target]) for n in nodes if n.op == "call_module" and n.target in modules
    )
    owners = Counter(id(p) for m in modules.values() for p in set(m.parameters(recurse=False)))
    read = {n.target.rpartition(".")[0] for n in nodes if n.op == "get_attr"}
    distinct = Counter(id(module) for module in modules.values())

    def is_own(name: str) -> bool:
        module = modules[name]
        return (
            calls[id(module)] == distinct[id(module)] == 1
            and name not in read
            and not has_hooks(module)
            and all(owners[id(p)] == 1 for p in module.parameters())
        )

    pairs = []
    for node in nodes:
        norm = modules.get(node.target) if node.op == "call_module" else None
        source = node.args[0] if node.args else None
        if norm is None or not _is_foldable(norm) or not isinstance(source, fx.Node):
            continue
        layer = modules.get(source.target) if source.op == "call_module" else None
        if not _takes_norms(layer) or len(source.users) > 1:
            continue
        if is_own(source.target) and is_own(node.target):
            pairs.append((source.target, node.target))
    return pairs


def _is_foldable(norm: nn.Module) -> bool:
    """Whether a module in eval mode is a scale and a shift of each channel, and nothing else."""
    if isinstance(norm, FrozenBatchNorm2d):
        return True
    plain = isinstance(norm, BATCH_NORMS) and type(norm).__module__.startswith("torch.nn.")
    return plain and norm.running_mean is not None


def _takes_norms(layer: nn.Module | None) -> bool:
    """Whether a layer has a weight of its own that a norm's scale can be multiplied into."""
    if not isinstance(layer, (*CONVOLUTIONS, nn.Linear)):
        return False
    return isinstance(layer._parameters.get("weight"), nn.Parameter)


def _absorb(layer: nn.Module, norm: nn.Module) -> None:
    """Scale and shift a layer's weight and bias by a norm's, in float64.

    Not by ``torch.nn.utils.fusion``, which takes no grouped transposed convolution.
    """
    weight = layer.weight.detach().double()
    mean, variance = norm.running_mean.double(), norm.running_var.double()
    scale = torch.rsqrt(variance + norm.eps)
    if norm.weight is not None:
        scale = scale * norm.weight.detach().double()
    shift = -mean * scale if layer.bias is None else (layer.bias.detach().double() - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.detach().double()
    if isinstance(layer, TRANSPOSED):  # [in, out / groups, ...]
        grouped = weight.unflatten(0, (layer.groups, -1))
        per_group = scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))
        scaled = (grouped * per_group).flatten(0, 1)
    else:
        scaled = weight * scale.view(-1, *[1] * (weight.dim() - 1))
    layer.weight = _like(scaled, layer.weight)
    layer.bias = _like(shift, layer.weight)


def _like(value: torch.Tensor, like: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(value.detach().to(like.dtype), requires_grad=like.requires_grad)
