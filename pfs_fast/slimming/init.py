"""Fresh weights, drawn as the model's own class draws them.

Constructors are not run again (their arguments are unknown), so classes whose initialisation stands in ``__init__`` are
looked up in a table of rules; the rules below are those of torchvision 0.29, unchanged since 0.9.
"""

from __future__ import annotations

import inspect
import math
import numbers
import warnings
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import init

from .._ambient import random_numbers, turn
from ..errors import ConfigError

_METHODS = (
    "reset_parameters",
    "_reset_parameters",
    "init_weights",
    "_initialize_weights",
    "_init_weights",
)
_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm)

Rule = Callable[[nn.Module], None]


def initialise(model: nn.Module, *, seed: int | None = None) -> None:
    """Draw all parameters of a model anew, in place, as its class does.

    Children first, then their parent, as constructors run: a leaf by its ``reset_parameters``, a container by its
    ``reset_parameters``, ``init_weights``, ``_initialize_weights`` or ``_init_weights``, or by the rule of its class.

    Args:
        model: Any module.
        seed: Seed to draw from; the global random state is then left alone. Default: draw from the global state.

    Warns:
        UserWarning: For parameters that no initialiser reaches; they keep their values.
    """
    untouched = draw(model, seed)
    if untouched:
        warnings.warn(
            f"slim: no initialiser is known for {some(untouched)}; they keep the model's values; give their module a "
            "reset_parameters method",
            UserWarning,
            stacklevel=4,  # of the caller of `slim`
        )


def draw(model: nn.Module, seed: int | None, function: str = "slim") -> list[str]:
    """As ``initialise``, with the names of the parameters that no initialiser reaches in place of the warning.

    Raises:
        BusyError: Beside a search or a training of another thread, from whose random numbers some would be drawn.
    """
    if seed is not None:
        whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
        if not whole or not 0 <= seed < 2**64:
            raise ConfigError(
                f"slim: seed must be None or a whole number from 0 to 2**64 - 1, got {'one outside' if whole else repr(seed)[:40]}"
            )
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    devices = {parameter.device for parameter in model.parameters()}
    with turn(function), random_numbers(seed, devices), torch.no_grad():
        _initialise(model, set())
    return [
        name for name, parameter in model.named_parameters() if parameter._version == versions[name]
    ]


def some(names: list[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _initialise(module: nn.Module, done: set[nn.Module]) -> None:
    if module in done:
        return
    done.add(module)
    for child in module.children():
        _initialise(child, done)
    for base in type(module).__mro__:
        rule = _RULES.get(f"{base.__module__}.{base.__qualname__}")
        if rule is not None:
            rule(module)
            return
    for name in _METHODS:
        method = getattr(module, name, None)
        if callable(method):
            required = _required_arguments(method)
            if required == 0:
                method()
                return
            if required == 1 and name == "_init_weights":
                module.apply(method)
                return


def _required_arguments(method: Callable[..., object]) -> int:
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.KEYWORD_ONLY,
    )
    parameters = inspect.signature(method).parameters.values()
    return sum(p.default is inspect.Parameter.empty and p.kind in kinds for p in parameters)


def _for_each(rule: Rule) -> Rule:
    """The rule applied to every module of a network."""

    def apply(network: nn.Module) -> None:
        for module in network.modules():
            rule(module)

    return apply


def _norm_to_identity(module: nn.Module) -> None:
    if isinstance(module, _NORM) and module.weight is not None:
        init.ones_(module.weight)
        init.zeros_(module.bias)


def _zero_bias(module: nn.Module) -> None:
    if module.bias is not None:
        init.zeros_(module.bias)


def _conv_fan_out(module: nn.Module) -> None:
    """Convolutions N(0, 2 / fan_out), biases 0; norms 1 and 0. Linear layers keep their own rule."""
    _norm_to_identity(module)
    if isinstance(module, _CONV):
        init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        _zero_bias(module)


def _conv_fan_out_linear_normal(module: nn.Module) -> None:
    _conv_fan_out(module)
    if isinstance(module, nn.Linear):
        init.normal_(module.weight, 0, 0.01)
        _zero_bias(module)


def _mnasnet(module: nn.Module) -> None:
    _conv_fan_out(module)
    if isinstance(module, nn.Linear):
        init.kaiming_uniform_(module.weight, mode="fan_out", nonlinearity="sigmoid")
        _zero_bias(module)


def _efficientnet(module: nn.Module) -> None:
    _conv_fan_out(module)
    if isinstance(module, nn.Linear):
        bound = 1 / math.sqrt(module.out_features)
        init.uniform_(module.weight, -bound, bound)
        _zero_bias(module)


def _densenet(module: nn.Module) -> None:
    _norm_to_identity(module)
    if isinstance(module, _CONV):
        init.kaiming_normal_(module.weight)
    elif isinstance(module, nn.Linear):
        _zero_bias(module)


def _truncated_normal(module: nn.Module, std: float) -> None:
    _norm_to_identity(module)
    if isinstance(module, (*_CONV, nn.Linear)):
        init.trunc_normal_(module.weight, mean=0.0, std=std, a=-2, b=2)


def _googlenet(module: nn.Module) -> None:
    _truncated_normal(module, 0.01)


def _inception(module: nn.Module) -> None:
    _truncated_normal(module, float(getattr(module, "stddev", 0.1)))


def _regnet(module: nn.Module) -> None:
    _norm_to_identity(module)
    if isinstance(module, nn.Conv2d):
        # Not divided by groups, unlike kaiming_normal_'s fan_out.
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
        init.normal_(module.weight, mean=0.0, std=math.sqrt(2.0 / fan_out))
    elif isinstance(module, nn.Linear):
        init.normal_(module.weight, mean=0.0, std=0.01)
        _zero_bias(module)


def _convnext(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        init.trunc_normal_(module.weight, std=0.02)
        _zero_bias(module)


def _feature_pyramid(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        init.kaiming_uniform_(module.weight, a=1)
        _zero_bias(module)


def _layer_scale(block: nn.Module) -> None:
    """One constant for all channels, which only an untrained block still tells."""
    scale = block.layer_scale
    if bool((scale == scale.flatten()[0]).all()):
        init.constant_(scale, float(scale.flatten()[0]))


def _squeezenet(network: nn.Module) -> None:
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight)
            _zero_bias(module)
    init.normal_(network.classifier[1].weight, mean=0.0, std=0.01)


def _mlp_block(block: nn.Module) -> None:
    for module in block.modules():
        if isinstance(module, nn.Linear):
            init.xavier_uniform_(module.weight)
            init.normal_(module.bias, std=1e-6)


def _encoder(encoder: nn.Module) -> None:
    init.normal_(encoder.pos_embedding, std=0.02)


def _vision_transformer(network: nn.Module) -> None:
    init.zeros_(network.class_token)
    stem = network.conv_proj
    if isinstance(stem, nn.Conv2d):
        fan_in = stem.in_channels * stem.kernel_size[0] * stem.kernel_size[1]
        init.trunc_normal_(stem.weight, std=math.sqrt(1 / fan_in))
        _zero_bias(stem)
    elif isinstance(getattr(stem, "conv_last", None), nn.Conv2d):
        init.normal_(stem.conv_last.weight, std=math.sqrt(2.0 / stem.conv_last.out_channels))
        _zero_bias(stem.conv_last)
    hidden = getattr(network.heads, "pre_logits", None)
    if isinstance(hidden, nn.Linear):
        init.trunc_normal_(hidden.weight, std=math.sqrt(1 / hidden.in_features))
        _zero_bias(hidden)
    if isinstance(network.heads.head, nn.Linear):
        init.zeros_(network.heads.head.weight)
        _zero_bias(network.heads.head)


def _window_attention(attention: nn.Module) -> None:
    """Table of the first version and of MaxViT; scale of the second version."""
    if getattr(attention, "relative_position_bias_table", None) is not None:
        init.trunc_normal_(attention.relative_position_bias_table, std=0.02)
    if getattr(attention, "logit_scale", None) is not None:
        init.constant_(attention.logit_scale, math.log(10))


def _swin(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        init.trunc_normal_(module.weight, std=0.02)
        _zero_bias(module)


# AlexNet and ShuffleNetV2 have no rule of their own: their leaves' defaults are their initialisation.
_RULES: dict[str, Rule] = {
    # What is left of a ResNet or MobileNetV3 in segmentation and detection; both draw convolutions alike.
    "torchvision.models._utils.IntermediateLayerGetter": _for_each(_conv_fan_out),
    "torchvision.models.convnext.CNBlock": _layer_scale,
    "torchvision.models.convnext.ConvNeXt": _for_each(_convnext),
    "torchvision.models.densenet.DenseNet": _for_each(_densenet),
    "torchvision.models.efficientnet.EfficientNet": _for_each(_efficientnet),
    "torchvision.models.googlenet.GoogLeNet": _for_each(_googlenet),
    "torchvision.models.inception.Inception3": _for_each(_inception),
    "torchvision.models.maxvit.RelativePositionalMultiHeadAttention": _window_attention,
    "torchvision.models.mnasnet.MNASNet": _for_each(_mnasnet),
    "torchvision.models.mobilenetv2.MobileNetV2": _for_each(_conv_fan_out_linear_normal),
    "torchvision.models.mobilenetv3.MobileNetV3": _for_each(_conv_fan_out_linear_normal),
    "torchvision.models.regnet.RegNet": _for_each(_regnet),
    "torchvision.models.resnet.ResNet": _for_each(_conv_fan_out),
    "torchvision.models.squeezenet.SqueezeNet": _squeezenet,
    "torchvision.models.swin_transformer.ShiftedWindowAttention": _window_attention,
    "torchvision.models.swin_transformer.SwinTransformer": _for_each(_swin),
    "torchvision.models.vgg.VGG": _for_each(_conv_fan_out_linear_normal),
    "torchvision.models.video.resnet.VideoResNet": _for_each(_conv_fan_out_linear_normal),
    "torchvision.models.vision_transformer.Encoder": _encoder,
    "torchvision.models.vision_transformer.MLPBlock": _mlp_block,
    "torchvision.models.vision_transformer.VisionTransformer": _vision_transformer,
    "torchvision.ops.feature_pyramid_network.FeaturePyramidNetwork": _for_each(_feature_pyramid),
}
