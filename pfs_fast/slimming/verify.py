"""Proof that a structure cuts a model correctly: the slim network equals the masked whole network."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torchvision.ops import FrozenBatchNorm2d

from .._ambient import own_settings, random_numbers, reseed, turn
from .._modules import require_plain
from ..budgets.structure import Structure
from ..errors import ConfigError, ModelError, StructureError
from ..graph.narrow import (
    BATCH_NORMS,
    INSTANCE_NORMS,
    TRANSPOSED,
    is_channelwise,
    kind_of,
    layers_by_name,
    widths_of,
)
from ..graph.scales import Scale, find_scales
from .slim import slim


@dataclass(frozen=True)
class VerifyReport:
    """Result of ``verify``.

    Attributes:
        passed: The networks are equal to within ``rtol``.
        max_error: Largest error of the networks' outputs, relative to the largest output, over all trials.
        rtol: Tolerance.
        layer: First layer, in the order of execution, whose outputs differ by more; None if none does.
        layer_error: Relative error of that layer's outputs, 0 if none differs.
        layers_compared: Number of layers whose outputs were compared.
        trials: Number of trials.
        weights: ``"inherited"``: the slim network's weights are the model's kept ones, and were compared as they are.
            ``"copied"``: they are others, and a copy of the slim network was given the model's kept ones.
    """

    passed: bool
    max_error: float
    rtol: float
    layer: str | None
    layer_error: float
    layers_compared: int
    trials: int
    weights: Literal["inherited", "copied"] = "inherited"

    def __str__(self) -> str:
        verdict = "equal" if self.passed else "NOT equal"
        where = (
            ""
            if self.layer is None
            else f"; first differing layer {self.layer} (error {self.layer_error:.1e})"
        )
        return (
            f"masked and slim networks are {verdict}: max relative error {self.max_error:.1e} (rtol {self.rtol:.0e}) over "
            f"{self.trials} trials, {self.layers_compared} layers compared, weights {self.weights}{where}"
        )


@own_settings()
@turn("verify")
def verify(
    model: nn.Module,
    slim_model: nn.Module | None,
    structure: Structure,
    example_input: torch.Tensor | tuple[Any, ...] | None = None,
    *,
    trials: int = 2,
    rtol: float = 1e-9,
    seed: int = 0,
    raise_on_fail: bool = True,
    weights: Literal["auto", "inherit", "fresh"] = "auto",
) -> VerifyReport:
    """Prove in float64 that slimming a model by a structure equals masking the dropped channels.

    In a copy of the model every dropped output channel of every layer of ``structure.layers`` is set to 0; the slim network
    with the model's kept weights must give the same outputs, layer by layer and at the end. Both run in eval mode on random
    inputs of the shape of ``example_input``, each on its own copy. Batch norms first get random affine parameters and
    statistics, the same in both networks, since freshly initialised ones would hide a wrong channel. Where a forward casts to
    another floating dtype, it casts to float64 here.

    Args:
        model: The whole network; never modified.
        slim_model: A slim network to check; never modified. Norms are overwritten in a copy, and so is everything where
            its weights are not those of ``model`` (see ``weights``). None: one is made by ``slim``.
        structure: Kept channels of the model.
        example_input: A batch of inputs, or a tuple of positional arguments. Float tensors give only their shape; take
            several images where feature maps are tiny, so that every channel is above 0 somewhere. Default: eight images
            of the shape that the slim network of a search carries (``pfs_input_shape``).
        trials: Number of random inputs and batch-norm states.
        rtol: Largest error allowed, relative to the largest value of a layer's output.
        seed: Seed of the inputs and the batch-norm states; the global random state is left alone.
        raise_on_fail: Raise instead of returning a report with ``passed=False``.
        weights: Of ``slim_model``, as in `slim`. ``"inherit"``: they must be the model's kept ones; wrong ones are found.
            ``"fresh"``: new or trained ones; what is proved is that the slim network with the model's kept weights equals the
            masked one. ``"auto"``: ``"inherit"`` if most of their values occur in the model's layer of the same name.

    Returns:
        VerifyReport: Largest error and the first layer that differs.

    Raises:
        StructureError: If the networks differ, or the proof would be void (outputs all 0 or not finite).
        ModelError: For a wrapped or compiled model, or an input that the model rejects.
        BusyError: Another thread of the process is in a search or a training.
        ConfigError: For another value of ``weights`` or ``trials``, or no input to take.
    """
    require_plain("verify", model)
    if weights not in ("auto", "inherit", "fresh"):
        raise ConfigError(
            f"verify: weights must be 'auto', 'inherit' or 'fresh', got {weights!r}; use one of them"
        )
    if slim_model is not None:
        require_plain("verify", slim_model)
        if weights == "auto":
            weights = "inherit" if _is_inherited(model, slim_model) else "fresh"
    copied = slim_model is not None and weights == "fresh"
    example_input = _example(example_input, slim_model, model)
    if isinstance(trials, bool) or not isinstance(trials, int) or trials < 1:
        raise ConfigError(f"verify: trials must be a whole number of at least 1, got {trials!r}")
    devices = {t.device for t in [*model.parameters(), *model.buffers()]}
    worst, layer, layer_error, compared = 0.0, None, 0.0, 0
    with random_numbers(seed, devices), torch.no_grad():
        for trial in range(trials):
            reseed(seed + trial, devices)
            dense = copy.deepcopy(model).double().eval()
            inputs = _random_inputs(example_input, next(dense.parameters()).device)
            kept = slim(dense, structure, weights="inherit") if copied else None
            _shake_scales(dense, structure)
            _shake(dense, inputs)
            if slim_model is None:
                narrow = slim(dense, structure, weights="inherit")
            else:
                narrow = copy.deepcopy(slim_model).double().eval()
                if kept is not None:
                    _copy_state(kept, narrow)
                _copy_norms(dense, narrow, structure)
                _copy_scales(dense, narrow, structure)
            _zero_dropped(dense, structure)
            # By the whole network: a PReLU that is left with one channel looks like one with a common slope.
            layers = {name for name, m in dense.named_modules() if kind_of(m) is not None}
            masked_outputs, masked_layers = _run(
                dense, inputs, layers, structure.layers, seed + trial
            )
            slim_outputs, slim_layers = _run(narrow, inputs, layers, {}, seed + trial)
            error, where, where_error = _compare(
                masked_outputs, slim_outputs, masked_layers, slim_layers, rtol
            )
            worst, compared = max(worst, error), len(masked_layers)
            if layer is None and where is not None:
                layer, layer_error = where, where_error
    passed = worst <= rtol and layer is None
    origin = "copied" if copied else "inherited"
    report = VerifyReport(passed, worst, rtol, layer, layer_error, compared, trials, origin)
    if raise_on_fail and not passed:
        raise StructureError(
            f"verify: slim network must equal the masked network, got: {report}; the structure or the cut is wrong"
        )
    return report


class _InFloat64(TorchFunctionMode):
    """Casts to floating dtypes, and what is made in one, are float64: a forward that casts would round, or mix dtypes."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _FLOATING_CASTS:
            func = torch.Tensor.double
        args = tuple(_widened(value) for value in args)
        result = func(*args, **{key: _widened(value) for key, value in (kwargs or {}).items()})
        narrow = isinstance(result, torch.Tensor) and result.dtype in _NARROW
        return result.double() if narrow else result


_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16})
_FLOATING_CASTS = frozenset({torch.Tensor.float, torch.Tensor.half, torch.Tensor.bfloat16})
_NARROW_TYPES = tuple(f"{name}Tensor" for name in ("Float", "Half", "BFloat16"))


def _widened(value: Any) -> Any:
    if isinstance(value, torch.dtype):
        return torch.float64 if value in _NARROW else value
    if isinstance(value, (str, type)) and str(value).rstrip("'>").endswith(_NARROW_TYPES):
        return torch.float64  # x.type("torch.FloatTensor")
    return value


def _is_inherited(model: nn.Module, slim_model: nn.Module) -> bool:
    """Whether most weights of a slim network are weights of the model's layer, in whatever place."""
    sources, found, total = dict(model.named_parameters()), 0, 0
    for name, weight in slim_model.named_parameters():
        if name not in sources or weight.dim() < 2:
            continue
        source = sources[name].detach()
        there = torch.isin(weight.detach().to(source), source)
        found, total = found + int(there.sum()), total + there.numel()
    return 2 * found > total


def _copy_state(source: nn.Module, target: nn.Module) -> None:
    """Gives a slim network the state of another one of the same structure."""
    states = [{**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (source, target)]
    for name in states[0].keys() | states[1].keys():
        shapes = [list(state[name].shape) if name in state else None for state in states]
        if shapes[0] != shapes[1]:
            raise StructureError(
                f"verify: {name} must have the shape {shapes[0]} in slim_model, got {shapes[1]}; pass the slim network of this "
                "structure"
            )
    for name, tensor in states[1].items():
        tensor.copy_(states[0][name])


def _example(
    example_input: torch.Tensor | tuple[Any, ...] | None, *networks: nn.Module | None
) -> torch.Tensor | tuple[Any, ...]:
    if example_input is not None:
        return example_input
    shape = next((s for s in (getattr(n, "pfs_input_shape", None) for n in networks) if s), None)
    if shape is None:
        raise ConfigError(
            "verify: example_input must be given for a network that no search made, got None; pass a batch of images"
        )
    return torch.zeros(8, *shape)


def _random_inputs(
    example_input: torch.Tensor | tuple[Any, ...], device: torch.device
) -> tuple[Any, ...]:
    """Inputs of the same shapes; float tensors standard normal in float64, others as they are."""
    inputs = example_input if isinstance(example_input, tuple) else (example_input,)
    if not any(isinstance(value, torch.Tensor) for value in inputs):
        raise ModelError(
            f"verify: example_input must be a tensor or a tuple with tensors, got {type(example_input).__name__}"
        )
    return tuple(
        torch.randn(value.shape, dtype=torch.float64, device=device)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
        else (value.to(device) if isinstance(value, torch.Tensor) else value)
        for value in inputs
    )


def _shake(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Give every norm a random affine map, and batch norms random statistics near those of their input.

    Statistics near the true ones keep activations of deep networks in range, which random ones alone would not.
    """
    for module in model.modules():
        if is_channelwise(module) and module.weight is not None:
            module.weight.copy_(torch.rand_like(module.weight) + 0.5)
            if getattr(module, "bias", None) is not None:
                module.bias.copy_(0.5 * torch.randn_like(module.bias))

    def shake(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values()))).transpose(0, 1).flatten(1)  # [C, values]
        noise = torch.randn(2, x.size(0), dtype=torch.float64, device=x.device)
        if module.running_mean is not None:
            std = x.std(dim=1, correction=0)
            module.running_mean.copy_(x.mean(dim=1) + 0.3 * std * noise[0])
            module.running_var.copy_((std.square() + 1e-3) * noise[1].mul(0.3).exp())

    tracked = (*BATCH_NORMS, *INSTANCE_NORMS, FrozenBatchNorm2d)
    handles = [
        m.register_forward_pre_hook(shake, with_kwargs=True)
        for m in model.modules()
        if isinstance(m, tracked)
    ]
    try:
        with _InFloat64():
            model(*_copies(inputs))
    except (
        Exception
    ) as error:  # any code of the model may have failed; its own message is the useful one
        shapes = ", ".join(str(tuple(v.shape)) for v in inputs if isinstance(v, torch.Tensor))
        raise ModelError(
            f"verify: example_input must be accepted by the model, got shape {shapes}; {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _shake_scales(model: nn.Module, structure: Structure) -> None:
    """Parameters that the forward multiplies channels by, which often start so small that they would hide an error."""
    for scale in find_scales(model, structure.widths).values():
        scale.parameter.copy_(torch.rand_like(scale.parameter) + 0.5)


def _copy_norms(dense: nn.Module, narrow: nn.Module, structure: Structure) -> None:
    """Give the norms of a slim network the kept slices of those of the whole one."""
    sources = dict(dense.named_modules(remove_duplicate=False))
    for name, target in narrow.named_modules(remove_duplicate=False):
        if not is_channelwise(target):
            continue
        source = sources.get(name)
        there = is_channelwise(source)
        kept = structure.layers.get(name, range(widths_of(source)[1] if there else 0))
        width = widths_of(target)[1]
        if not there or len(kept) != width:
            raise StructureError(
                f"verify: layer {name} must keep {len(kept)} channels in slim_model, got {width}; "
                "pass the slim network of this structure"
            )
        index = torch.tensor(list(kept), device=next(dense.parameters()).device)
        for key in ("weight", "bias", "running_mean", "running_var"):
            tensor = getattr(target, key, None)
            if tensor is not None:
                tensor.copy_(getattr(source, key)[index])


def _copy_scales(dense: nn.Module, narrow: nn.Module, structure: Structure) -> None:
    there = find_scales(narrow, structure.widths)
    for name, scale in find_scales(dense, structure.widths).items():
        kept = structure.layers[name]
        if name not in there or there[name].width != len(kept):
            raise StructureError(
                f"verify: parameter {name} must keep {len(kept)} channels in slim_model; pass the slim network of this "
                "structure"
            )
        index = torch.tensor(list(kept), device=scale.parameter.device)
        there[name].parameter.copy_(scale.parameter.index_select(scale.dim, index))


def _zero_dropped(dense: nn.Module, structure: Structure) -> None:
    """Dropped rows of weights and biases become 0, since a forward may use them without calling their layer.

    Where it does call it, the hooks of ``_run`` do the same.
    """
    modules = layers_by_name(dense, structure.layers)
    for name, kept in structure.layers.items():
        module = modules[name]
        if isinstance(module, Scale):
            continue  # what it multiplies is 0
        dropped = sorted(set(range(widths_of(module)[1])) - set(kept))
        if isinstance(module, TRANSPOSED):
            continue  # their output channels are not rows
        for key in ("weight", "bias"):
            tensor = module._parameters.get(key)
            if tensor is not None and dropped:
                tensor[dropped] = 0


def _run(
    model: nn.Module,
    inputs: tuple[Any, ...],
    layers: Collection[str],
    masks: Mapping[str, tuple[int, ...]],
    seed: int,
) -> tuple[list[torch.Tensor], list[tuple[str, torch.Tensor]]]:
    """Outputs of a model, and kept outputs of some layers in the order of execution.

    Dropped output channels of the layers in ``masks`` are set to 0.
    """
    outputs: list[tuple[str, torch.Tensor]] = []
    handles = []
    for name, module in model.named_modules():
        if name not in layers:
            continue
        kept = masks.get(name)

        def record(
            module: nn.Module,
            _args: Any,
            output: torch.Tensor,
            name: str = name,
            kept: tuple[int, ...] | None = kept,
        ) -> torch.Tensor:
            if kept is not None:
                dim = _channel_dim(module)
                mask = output.new_zeros(output.size(dim))
                mask[list(kept)] = 1
                output = output * (mask if dim == -1 else mask.view(-1, *[1] * (output.dim() - 2)))
                outputs.append(
                    (name, output.index_select(dim, torch.tensor(kept, device=output.device)))
                )
            else:
                outputs.append((name, output.clone()))  # a copy: an in-place activation may follow
            return output

        handles.append(module.register_forward_hook(record))
    # The same random numbers in both networks, should a forward draw any.
    reseed(seed, {t.device for t in [*model.parameters(), *model.buffers()]})
    try:
        with _InFloat64():
            result = model(*_copies(inputs))
    except Exception as error:
        raise StructureError(
            f"verify: the slim network must run, got {type(error).__name__}: {error}; the structure or the cut is wrong"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return list(_tensors(result)), outputs


def _copies(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs that a forward may write to."""
    return tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in inputs)


def _channel_dim(module: nn.Module) -> int:
    return -1 if isinstance(module, nn.Linear) else 1


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """All tensors of nested lists, tuples, dictionaries and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


def _compare(
    masked_outputs: list[torch.Tensor],
    slim_outputs: list[torch.Tensor],
    masked_layers: list[tuple[str, torch.Tensor]],
    slim_layers: list[tuple[str, torch.Tensor]],
    rtol: float,
) -> tuple[float, str | None, float]:
    """Largest error of the outputs; first differing layer and its error."""
    if not masked_outputs:
        raise ModelError("verify: model must return tensors, got none")
    scales = [float(output.abs().max()) if output.numel() else 0.0 for output in masked_outputs]
    if not all(map(torch.isfinite, map(torch.tensor, scales))) or max(scales) == 0:
        raise StructureError(
            f"verify: outputs of the masked network must be finite and not all 0, got a largest value of {max(scales)}; "
            "nothing can be proved with this model and input"
        )
    outputs = zip(masked_outputs, slim_outputs, strict=True)
    error = max(_relative_error(masked, cut) for masked, cut in outputs)
    where, where_error = None, 0.0
    for (name, masked), (slim_name, cut) in zip(masked_layers, slim_layers, strict=False):
        layer_error = _relative_error(masked, cut) if name == slim_name else float("inf")
        if layer_error > rtol:
            where, where_error = name, layer_error
            break
    return error, where, where_error


def _relative_error(expected: torch.Tensor, actual: torch.Tensor) -> float:
    """Largest difference over the largest expected value; infinite for another shape or values that are not finite."""
    if expected.shape != actual.shape:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    error = float((expected - actual).abs().max()) / max(
        float(expected.abs().max()), torch.finfo(torch.float64).tiny
    )
    return error if error == error else float("inf")
