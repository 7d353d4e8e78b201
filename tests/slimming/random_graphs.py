"""Random convolutional networks, each from a list of blocks that can be thinned out until only a bug is left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(NamedTuple):
    """A step of the construction. The seed decides everything about it, whatever the blocks before it are."""

    kind: str
    seed: int


class RandomNet(nn.Module):
    """Runs the steps that the blocks have left. Layers are found by name, so that copies use their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        self.weights = nn.ParameterDict()
        self.steps: list[Callable[[RandomNet, list[Any]], Any]] = []
        self.outputs: list[int] = []

    def _run(self, values: list[Any]) -> Any:
        for step in self.steps:
            values.append(step(self, values))
        results = [values[i] for i in self.outputs]
        return results[0] if len(results) == 1 else tuple(results)

    def forward(self, x: Tensor) -> Any:
        return self._run([x])


class RandomNet2(RandomNet):
    """With two inputs."""

    def forward(self, x: Tensor, y: Tensor) -> Any:
        return self._run([x, y])


def random_blocks(seed: int) -> tuple[Block, ...]:
    """The blocks of one case."""
    rng = np.random.default_rng(seed)
    kinds, weights = zip(*_WEIGHTS.items(), strict=True)
    share = np.array(weights) / sum(weights)
    count = int(rng.integers(2, 8))
    middle = [Block(str(k), int(rng.integers(2**31))) for k in rng.choice(kinds, count, p=share)]
    return (
        Block("stem", int(rng.integers(2**31))),
        *middle,
        Block("head", int(rng.integers(2**31))),
    )


def build(blocks: Sequence[Block]) -> tuple[RandomNet, tuple[Tensor, ...]]:
    """The network of some blocks in float64, and inputs for it."""
    two = any(block.kind == "second input" for block in blocks)
    net = RandomNet2() if two else RandomNet()
    builder = Builder(net, 2 if two else 1)
    for block in blocks:
        builder.rng = np.random.default_rng(block.seed)
        torch.manual_seed(block.seed)
        _BLOCKS[block.kind](builder)
    return net.double(), tuple(v.double() for v in builder.values[: builder.inputs])


class Builder:
    """Appends steps to a network and runs each at once, so that shapes are known.

    Attributes:
        values: Result of every input and step so far.
        open: Values that later blocks may read: maps [N, C, H, W].
    """

    def __init__(self, net: RandomNet, inputs: int) -> None:
        self.net, self.inputs = net, inputs
        self.rng = np.random.default_rng(0)
        self.values: list[Any] = [torch.randn(4, 3, 6, 6) for _ in range(inputs)]
        self.open = list(range(inputs))
        self.read: set[int] = set()

    # -- choices ---------------------------------------------------------------------------------------------------

    def chance(self, p: float) -> bool:
        return bool(self.rng.random() < p)

    def choose(self, options: Sequence[Any]) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def width(self, low: int = 1, high: int = 9) -> int:
        return int(self.rng.integers(low, high + 1))

    def pick(self, fits: Callable[[Tensor], bool] = lambda _: True) -> int:
        """One of the open values, mostly a late one; where none fits, a convolution of one that does."""
        late = self.open[-3:] if self.chance(0.7) else self.open
        options = [i for i in late if fits(self.values[i])]
        index = self.choose(options) if options else self.conv(self.open[-1], 12)
        self.read.add(index)
        return index

    # -- steps -----------------------------------------------------------------------------------------------------

    def step(self, function: Callable[[RandomNet, list[Any]], Any]) -> int:
        self.net.steps.append(function)
        with torch.no_grad():
            self.values.append(function(self.net, self.values))
        return len(self.values) - 1

    def emit(self, index: int) -> int:
        self.open.append(index)
        return index

    def add(self, module: nn.Module) -> str:
        name = f"l{len(self.net.layers)}"
        self.net.layers[name] = module
        return name

    def call(self, module: nn.Module, x: int) -> int:
        name = self.add(module)
        return self.step(lambda m, v: m.layers[name](v[x]))

    def channels(self, x: int) -> int:
        return self.values[x].shape[1]

    def conv(self, x: int, outputs: int | None = None, plain: bool = False) -> int:
        """A convolution of any kind, with ``outputs`` channels where that is asked for."""
        inputs, kernel = self.channels(x), self.choose([1, 3])
        divisors = [g for g in range(2, inputs + 1) if inputs % g == 0]
        groups = 1
        if divisors and not plain and self.chance(0.45):
            groups = inputs if self.chance(0.5) else self.choose(divisors)
            if outputs is not None and outputs % groups:
                groups = 1
        if outputs is None:
            outputs = (
                groups * self.width(1, 2)
                if groups == inputs > 1
                else groups * self.width(1, 9 // groups + 1)
            )
        options = {"padding": "same"} if self.chance(0.1) else {"padding": kernel // 2}
        conv = nn.Conv2d(inputs, outputs, kernel, groups=groups, bias=self.chance(0.4), **options)
        return self.call(conv, x)

    def norm(self, x: int) -> int:
        if self.chance(0.3):
            return x
        return self.call(nn.BatchNorm2d(self.channels(x), affine=self.chance(0.9)), x)

    def act(self, x: int) -> int:
        """An activation in one of its forms. In place only where nothing else holds the value."""
        own = x not in self.open
        functions = [*_FUNCTIONS, *(_IN_PLACE if own else ())]
        if self.chance(0.5):
            module = self.choose(_MODULES)()
            return self.call(module, x)
        function = self.choose(functions) if self.chance(0.93) else self.choose(_NOT_ZERO)
        return self.step(lambda m, v: function(v[x]))

    def resized(self, x: int, like: int) -> int:
        size = self.values[like].shape[2:]
        if self.values[x].shape[2:] == size:
            return x
        if self.chance(0.5):
            return self.step(lambda m, v: F.adaptive_avg_pool2d(v[x], size))
        return self.step(lambda m, v: F.interpolate(v[x], size=v[like].shape[2:]))

    def alike(self, x: int, like: int) -> int:
        """``x`` as a fresh value of the shape of ``like``."""
        x = self.resized(x, like)
        if self.channels(x) == self.channels(like) and x not in self.open and self.chance(0.5):
            return x
        return self.norm(self.conv(x, self.channels(like)))


# -- activations ------------------------------------------------------------------------------------------------------

_MODULES = [
    nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.GELU, nn.ELU, nn.Tanh, nn.PReLU, nn.Identity, nn.Mish,
    lambda: nn.LeakyReLU(0.1), lambda: nn.Hardtanh(-1, 2), lambda: nn.Dropout(0.0), lambda: nn.Softshrink(0.1),
]  # fmt: skip
_FUNCTIONS: list[Callable[[Tensor], Tensor]] = [
    F.relu, torch.relu, torch.tanh, F.silu, F.gelu, F.hardswish, F.relu6, torch.abs, torch.neg,
    lambda x: x.relu(), lambda x: x.clamp(min=0), lambda x: F.leaky_relu(x, 0.2), lambda x: F.hardtanh(x, -1.0, 1.0),
    lambda x: x.square(), lambda x: torch.clamp(x, -1, 3), lambda x: x * 0.5, lambda x: x / 2, lambda x: 2 * x,
]  # fmt: skip
_IN_PLACE: list[Callable[[Tensor], Tensor]] = [
    lambda x: x.relu_(), lambda x: F.relu(x, inplace=True), torch.relu_, lambda x: x.clamp_(min=0), lambda x: x.mul_(0.5),
]  # fmt: skip
# A dropped channel is not 0 behind these, unless it is multiplied onto one that is.
_NOT_ZERO: list[Callable[[Tensor], Tensor]] = [
    torch.sigmoid, F.softplus, F.hardsigmoid, lambda x: x + 1, lambda x: x.clamp(min=0.1), torch.cos, lambda x: 1 - x,
]  # fmt: skip


# -- blocks -----------------------------------------------------------------------------------------------------------


def stem(b: Builder) -> None:
    b.emit(b.act(b.norm(b.conv(b.pick(), b.width(2, 12)))))


def conv(b: Builder) -> None:
    x = b.pick()
    if b.chance(0.2):  # the order of pre-activation networks
        b.emit(b.conv(b.act(b.norm(x))))
    else:
        b.emit(b.act(b.norm(b.conv(x))))


def residual(b: Builder) -> None:
    x = b.pick()
    y = b.act(b.norm(b.conv(x))) if b.chance(0.5) else x
    y = b.norm(b.conv(y, b.channels(x)))
    b.emit(b.act(_sum(b, y, x)) if b.chance(0.7) else _sum(b, y, x))


def _sum(b: Builder, fresh: int, other: int) -> int:
    """A sum in one of its forms; the first operand is nobody else's."""
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: x + y, lambda x, y: y + x, torch.add, lambda x, y: x.add_(y), lambda x, y: y - x,
        lambda x, y: torch.add(x, y, alpha=2), lambda x, y: torch.stack([x, y], 1).sum(1),
        lambda x, y: torch.add(input=y, other=x), lambda x, y: sum([x, y]),
    ]  # fmt: skip
    form = b.choose(forms)
    return b.step(lambda m, v: form(v[fresh], v[other]))


def join(b: Builder) -> None:
    x = b.pick()
    y = b.alike(b.pick(), x)
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, y: x * y, lambda x, y: x * y.sigmoid(), lambda x, y: x.sigmoid() * y, torch.mul,
        lambda x, y: x * torch.sigmoid(y) + y, torch.maximum, lambda x, y: x / (1 + y.abs()),
    ]  # fmt: skip
    if b.chance(0.4):
        b.emit(_sum(b, y, x))
    else:
        form = b.choose(forms)
        b.emit(b.step(lambda m, v: form(v[x], v[y])))


def cat(b: Builder) -> None:
    first = b.pick()
    parts = [first, *(b.resized(b.pick(), first) for _ in range(b.width(1, 2)))]
    dim = b.choose([1, -3])
    b.emit(b.act(b.norm(b.step(lambda m, v: torch.cat([v[i] for i in parts], dim)))))


def chunk(b: Builder) -> None:
    n = b.choose([2, 2, 3])
    x = b.pick(lambda t: t.shape[1] % n == 0)
    cuts: list[Callable[[Tensor], Sequence[Tensor]]] = [
        lambda t: t.chunk(n, 1), lambda t: torch.chunk(t, n, dim=1), lambda t: t.tensor_split(n, 1),
        lambda t: t.split(t.shape[1] // n, 1), lambda t: torch.split(t, t.size(1) // n, dim=1),
        lambda t: [t[:, i * (t.shape[1] // n) : (i + 1) * (t.shape[1] // n)] for i in range(n)],
        lambda t: t.view(t.shape[0], n, -1, t.shape[2], t.shape[3]).unbind(1),
        lambda t: t.unflatten(1, (n, -1)).unbind(1),
    ]  # fmt: skip
    cut = b.choose(cuts)
    pieces = b.step(lambda m, v: cut(v[x]))
    parts = [b.step(lambda m, v, i=i: v[pieces][i]) for i in range(n)]
    use = b.choose(["gate", "swap", "branch", "apart", "sum"])
    if use == "gate":
        b.emit(b.step(lambda m, v: v[parts[0]] * v[parts[1]].sigmoid()))
    elif use == "swap":
        b.emit(b.step(lambda m, v: torch.cat([v[i] for i in reversed(parts)], 1)))
    elif use == "branch":
        parts[-1] = b.act(b.norm(b.conv(parts[-1], b.channels(parts[-1]))))
        y = b.emit(b.step(lambda m, v: torch.cat([v[i] for i in parts], 1)))
        if b.chance(0.5) and b.channels(y) % 2 == 0:
            _shuffle(b, y)
    elif use == "apart":
        for part in parts:
            b.emit(part)
    else:
        b.emit(b.step(lambda m, v: sum(v[i] for i in parts)))


def shuffle(b: Builder) -> None:
    _shuffle(b, b.pick(lambda t: t.shape[1] % 2 == 0))


def _shuffle(b: Builder, x: int) -> None:
    c = b.channels(x)
    groups = b.choose([g for g in (2, 3, 4) if c % g == 0])

    def by_views(t: Tensor) -> Tensor:
        n, c, h, w = t.shape
        return t.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)

    def by_flatten(t: Tensor) -> Tensor:
        n, _, h, w = t.size()
        return t.reshape(n, groups, -1, h, w).permute(0, 2, 1, 3, 4).flatten(1, 2)

    form = b.choose([by_views, by_flatten, lambda t: F.channel_shuffle(t, groups), None])
    if form is None:
        b.emit(b.call(nn.ChannelShuffle(groups), x))
    else:
        b.emit(b.step(lambda m, v: form(v[x])))


def squeeze_excite(b: Builder) -> None:
    x = b.pick()
    c, inner = b.channels(x), b.width(1, 4)
    sigmoid = b.choose([torch.sigmoid, F.hardsigmoid, lambda t: t.sigmoid()])
    pool = b.choose([lambda t: F.adaptive_avg_pool2d(t, 1), lambda t: t.mean((2, 3), keepdim=True)])
    if b.chance(0.5):
        reduce, expand = b.add(nn.Conv2d(c, inner, 1)), b.add(nn.Conv2d(inner, c, 1))
        s = b.step(lambda m, v: sigmoid(m.layers[expand](F.relu(m.layers[reduce](pool(v[x]))))))
    else:
        reduce, expand = b.add(nn.Linear(c, inner)), b.add(nn.Linear(inner, c))
        up = b.choose([
            lambda t: t[:, :, None, None], lambda t: t.view(t.shape[0], -1, 1, 1), lambda t: t.unsqueeze(-1).unsqueeze(-1),
        ])  # fmt: skip
        s = b.step(
            lambda m, v: up(
                sigmoid(m.layers[expand](F.relu(m.layers[reduce](pool(v[x]).flatten(1)))))
            )
        )
    b.emit(b.step(b.choose([lambda m, v: v[x] * v[s], lambda m, v: v[s] * v[x]])))


def shared(b: Builder) -> None:
    """A module that is called twice."""
    x = b.pick()
    c = b.channels(x)
    name, norm = b.add(nn.Conv2d(c, c, 3, padding=1)), b.add(nn.BatchNorm2d(c))
    if b.chance(0.5):
        b.emit(b.step(lambda m, v: m.layers[name](F.relu(m.layers[norm](m.layers[name](v[x]))))))
    else:
        y = b.alike(b.pick(), x)
        b.emit(b.step(lambda m, v: F.relu(m.layers[norm](m.layers[name](v[x])))))
        b.emit(b.step(lambda m, v: m.layers[norm](m.layers[name](v[y]))))


def tied(b: Builder) -> None:
    """Two modules with one weight."""
    x = b.pick()
    c = b.channels(x)
    first, second = nn.Conv2d(c, c, 1), nn.Conv2d(c, c, 1, bias=b.chance(0.5))
    second.weight = first.weight
    one, two = b.add(first), b.add(second)
    b.emit(b.step(lambda m, v: m.layers[two](F.relu(m.layers[one](v[x])))))


def pool(b: Builder) -> None:
    x = b.pick(lambda t: t.shape[2] >= 2)
    if b.values[x].shape[2] < 2:
        return
    down: list[Callable[[Tensor], Tensor] | nn.Module] = [
        nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(3, 2, 1), lambda t: F.max_pool2d(t, 2),
        lambda t: F.avg_pool2d(t, 2, ceil_mode=True), lambda t: t[:, :, ::2, ::2],
    ]  # fmt: skip
    other: list[Callable[[Tensor], Tensor] | nn.Module] = [
        nn.Upsample(scale_factor=2), nn.ZeroPad2d(1), nn.AvgPool2d(3, 1, 1), lambda t: F.pad(t, (1, 1, 1, 1)),
        lambda t: F.interpolate(t, scale_factor=2.0, mode="nearest"), lambda t: t.flip(-1), lambda t: t.transpose(2, 3),
        lambda t: t.contiguous(), lambda t: t.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
        lambda t: F.unfold(t, 2).mean(-1)[:, :, None, None].expand(-1, -1, 2, 2),
    ]  # fmt: skip
    form = b.choose(down if b.values[x].shape[2] > 8 else [*down, *other])
    b.emit(b.call(form, x) if isinstance(form, nn.Module) else b.step(lambda m, v: form(v[x])))


def odd(b: Builder) -> None:
    """Operations that few networks have. What is not understood must be held whole, not guessed."""
    x = b.pick()
    c = b.channels(x)
    forms: list[Callable[[Tensor], Tensor]] = [
        lambda t: F.pad(t, (0, 0, 0, 0, 1, 2)), lambda t: t[:, : max(1, c - 1)], lambda t: t.flip(1), lambda t: t.roll(1, 1),
        lambda t: t * t.mean(1, keepdim=True).sigmoid(), lambda t: t * t.amax(1, keepdim=True), lambda t: t.softmax(1),
        lambda t: torch.cat([t, t], 1), lambda t: torch.cat([t, -t], 1), lambda t: t.repeat(1, 2, 1, 1),
        lambda t: t - t.mean((2, 3), keepdim=True), lambda t: t * torch.arange(c, dtype=t.dtype)[:, None, None],
        lambda t: t.repeat_interleave(2, 1), lambda t: t[:, torch.arange(c).flip(0)], lambda t: t[:, ::2],
        lambda t: torch.where(t > 0, t, t * 0.1), lambda t: t.cumsum(1), lambda t: torch.einsum("nchw->nchw", t),
        lambda t: t.reshape(t.shape[0], -1, t.shape[2], t.shape[3]), lambda t: F.normalize(t, dim=1),
        lambda t: (t.flatten(2) @ (t.flatten(2).transpose(1, 2) @ t.flatten(2)).softmax(-1)).view_as(t),
    ]  # fmt: skip
    function = b.choose(forms)
    b.emit(b.step(lambda m, v: function(v[x])))


def weights(b: Builder) -> None:
    """Parameters besides those of layers."""
    x = b.pick()
    c = b.channels(x)
    name = f"w{len(b.net.weights)}"
    shape, function = b.choose([
        ((c, 1, 1), lambda t, w: t * w), ((1, c, 1, 1), lambda t, w: t + w), ((5, c, 1, 1), F.conv2d), ((c,), F.prelu),
        ((1,), lambda t, w: t * w), ((c,), lambda t, w: t * w.view(-1, 1, 1)), ((1,), F.prelu),
    ])  # fmt: skip
    b.net.weights[name] = nn.Parameter(torch.randn(shape))
    b.emit(b.step(lambda m, v: function(v[x], m.weights[name])))


def rearrange(b: Builder) -> None:
    """Channels become positions, or the other way round; transposed convolutions."""
    form = b.choose(["shuffle", "unshuffle", "transposed", "channel prelu"])
    x = b.pick(lambda t: t.shape[1] % 4 == 0 if form == "shuffle" else t.shape[2] % 2 == 0)
    c = b.channels(x)
    if form == "shuffle" and c % 4 == 0:
        b.emit(b.call(nn.PixelShuffle(2), x))
    elif form == "unshuffle" and _even(b.values[x]):
        b.emit(b.step(lambda m, v: F.pixel_unshuffle(v[x], 2)))
    elif form == "transposed":
        groups = b.choose([g for g in (1, 2, c) if c % g == 0])
        module = nn.ConvTranspose2d(
            c, groups * b.width(1, 3), 2, 2, groups=groups, bias=b.chance(0.5)
        )
        b.emit(b.act(b.norm(b.call(module, x))))
    else:
        b.emit(b.call(nn.PReLU(c), x))


def _even(t: Tensor) -> bool:
    return t.shape[2] % 2 == 0 and t.shape[3] % 2 == 0


def in_place(b: Builder) -> None:
    """A value that is overwritten while another step still reads it under its old name."""
    x = b.pick(lambda t: t.dtype.is_floating_point)
    if x < b.inputs:  # an input is the caller's
        return
    copied = b.step(lambda m, v: v[x] * 1.5)
    function = b.choose(
        [lambda t: t.relu_(), lambda t: t.sigmoid_(), lambda t: t.mul_(2), lambda t: t.add_(1)]
    )
    after = b.step(lambda m, v: function(v[copied]))
    b.emit(copied)
    b.emit(after)


def output(b: Builder) -> None:
    """One more output of the network."""
    b.net.outputs.append(b.pick())


def second_input(b: Builder) -> None:
    """A network with two inputs; what is read of the second is chosen by the other blocks."""
    b.emit(b.conv(b.inputs - 1))


def head(b: Builder) -> None:
    """All that nothing has read yet, as logits."""
    left = [i for i in b.open if i not in b.read] or [b.open[-1]]
    form = b.choose(["pool", "pool", "flatten", "conv"])
    if form == "conv":
        names = [b.add(nn.Conv2d(b.channels(i), 4, 1)) for i in left]
        y = b.step(
            lambda m, v: sum(
                m.layers[n](v[i]).mean((2, 3)) for n, i in zip(names, left, strict=True)
            )
        )
    else:
        flats: list[Callable[[Tensor], Tensor]] = [
            lambda t: torch.flatten(t, 1), lambda t: t.flatten(1), lambda t: t.view(t.size(0), -1), lambda t: t.reshape(t.shape[0], -1),
        ]  # fmt: skip
        flat = b.choose(flats)
        size = 1 if form == "pool" else 2
        y = b.step(
            lambda m, v: torch.cat([flat(F.adaptive_avg_pool2d(v[i], size)) for i in left], 1)
        )
        if b.chance(0.3):
            y = b.call(nn.Linear(b.channels(y), 6, bias=b.chance(0.5)), y)
            y = b.call(nn.ReLU(), b.call(nn.BatchNorm1d(6), y) if b.chance(0.7) else y)
        y = b.call(nn.Linear(b.channels(y), 4), y)
    b.net.outputs.append(y)


_BLOCKS: dict[str, Callable[[Builder], None]] = {
    "stem": stem, "conv": conv, "residual": residual, "join": join, "cat": cat, "chunk": chunk, "shuffle": shuffle,
    "squeeze-excite": squeeze_excite, "shared": shared, "tied": tied, "pool": pool, "odd": odd, "weights": weights,
    "rearrange": rearrange, "in place": in_place, "output": output, "second input": second_input, "head": head,
}  # fmt: skip
_WEIGHTS = {
    "conv": 10, "residual": 5, "join": 4, "cat": 4, "chunk": 4, "shuffle": 3, "squeeze-excite": 3, "shared": 2, "tied": 0.5,
    "pool": 3, "odd": 1.2, "weights": 0.6, "rearrange": 1.2, "in place": 0.7, "output": 0.4, "second input": 0.7,
}  # fmt: skip
