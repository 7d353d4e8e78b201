"""What the channel propagation knows about operations: tables only.

Functions, methods and modules are looked up by one plain name (``torch.relu``, ``Tensor.relu_``, ``nn.ReLU`` are
``relu``). An operation in none of the tables is not assumed to be anything: the channels that reach it are held fixed.
"""

from __future__ import annotations

import torch
from torch import fx, nn

# f(0) = 0, each element alone: a dropped channel stays 0.
ZERO_PRESERVING = frozenset(
    """relu relu6 leakyrelu leaky_relu rrelu elu celu selu silu gelu mish hardswish tanh tanhshrink softsign hardshrink
    softshrink identity dropout dropout1d dropout2d dropout3d alphadropout featuredropout featurealphadropout
    alpha_dropout feature_alpha_dropout stochasticdepth stochastic_depth droppath clone contiguous detach to type
    float double half bfloat16 neg abs sqrt square sin sinh tan atan asinh erf expm1 log1p floor ceil round trunc
    sign""".split()
)
# Each element alone, but f(0) may differ from 0.
ELEMENTWISE = frozenset(
    """sigmoid hardsigmoid logsigmoid softplus exp log cos rsqrt reciprocal clamp clamp_min clamp_max hardtanh threshold
    pow ipow rpow""".split()
)
# Those whose f(0) depends on their arguments: the propagation computes it.
BOUNDED = frozenset("clamp clamp_min clamp_max hardtanh threshold pow ipow rpow".split())
# Two operands, broadcast.
ADDITIVE = frozenset("add iadd radd sub isub rsub subtract".split())
MULTIPLICATIVE = frozenset("mul imul rmul multiply".split())
DIVISION = frozenset("div truediv itruediv divide".split())
EXTREMES = frozenset("maximum minimum".split())
JOINS = ADDITIVE | MULTIPLICATIVE | DIVISION | EXTREMES
# Spatial only: channel c of the output is a function of channel c of the input, and maps zeros to zeros.
SPATIAL = frozenset(
    """maxpool1d maxpool2d maxpool3d avgpool1d avgpool2d avgpool3d adaptiveavgpool1d adaptiveavgpool2d adaptiveavgpool3d
    adaptivemaxpool1d adaptivemaxpool2d adaptivemaxpool3d max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d
    adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d
    adaptive_max_pool3d lppool1d lppool2d lp_pool2d interpolate upsample upsamplingnearest2d upsamplingbilinear2d
    zeropad1d zeropad2d zeropad3d reflectionpad1d reflectionpad2d reflectionpad3d replicationpad1d replicationpad2d
    replicationpad3d circularpad1d circularpad2d circularpad3d""".split()
)
# Elements are moved, none is computed; shape arguments are checked by the propagation.
MOVEMENT = frozenset(
    """flatten view reshape permute transpose swapaxes swapdims movedim moveaxis unsqueeze squeeze expand unflatten t mT
    repeat tile repeat_interleave""".split()
)
# Some elements are taken.
PIECES = frozenset(
    "getitem chunk split split_with_sizes tensor_split unbind narrow select roll flip".split()
)
CHANNEL_SHUFFLE = frozenset("channelshuffle channel_shuffle native_channel_shuffle".split())
REDUCTION = frozenset("mean sum amax amin std var".split())
SOFTMAX = frozenset("softmax log_softmax softmin logsoftmax".split())
# A channel of zeros may come out as something else.
LIFTING = ELEMENTWISE | SOFTMAX
CONCATENATION = frozenset("cat concat concatenate".split())
# Only dtype and device are taken from the operand.
FACTORY = frozenset("new_empty new_zeros new_ones new_full new_tensor".split())
# Every channel is divided by something that all of them decide.
NORMALISING = frozenset(
    "layernorm layer_norm rmsnorm rms_norm localresponsenorm local_response_norm group_norm normalize".split()
)


_TRUSTED = ("torch", "_operator", "operator", "builtins", "torchvision", "timm")


def plain_name(node: fx.Node, module: nn.Module | None) -> str:
    """One name for the module, function and method forms of an operation.

    >>> graph = fx.symbolic_trace(nn.Sequential(nn.ReLU())).graph
    >>> [plain_name(node, nn.ReLU()) for node in graph.nodes if node.op == "call_module"]
    ['relu']
    """
    if module is not None:
        return type(module).__name__.lower()
    if isinstance(node.target, str):  # a method; in-place forms end in an underscore
        return node.target.strip("_") if node.target.startswith("__") else node.target.rstrip("_")
    if node.target in _DISPATCHED:
        return _DISPATCHED[node.target]
    name = getattr(node.target, "__name__", str(node.target))
    origin = (getattr(node.target, "__module__", None) or "torch").split(".")[0]
    # A function that the user hid behind torch.fx.wrap may be called `add` and do anything.
    return name.rstrip("_") if origin in _TRUSTED else f"{origin}.{name}"


# torch.nn.functional wraps these in a function that has lost its name.
_DISPATCHED = {
    getattr(torch.nn.functional, name): name
    for name in (f"{kind}max_pool{d}d" for kind in ("", "adaptive_") for d in (1, 2, 3))
}
