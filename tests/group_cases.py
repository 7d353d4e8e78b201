"""Small networks, each with the groups it must have and the reasons for what must be held whole."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
import torchvision
from small_nets import Net, Net2, cbr, conv, head
from torch import nn

OUTPUT = "it is an output of the network"
NOT_ZERO = "a dropped channel would not be 0 where layer"


@dataclass
class Case:
    """A model, the expected ``{producers: size}`` of its groups, and ``{layer: reason}`` of what is held whole."""

    model: object
    groups: dict[tuple[str, ...], int]
    fixed: dict[str, str] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = ((1, 3, 6, 6),)
    head: bool = True  # the last layer, "fc.2", is held as the output
    residual: tuple[tuple[str, ...], ...] = ()
    per_unit: dict[tuple[str, ...], int] = field(default_factory=dict)


@torch.fx.wrap
def unknown_function(x):
    return x.flip(1)


def shuffle(x: torch.Tensor, groups: int = 2) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def twice_in_place(m, x):
    y = m.a(x)
    y.sigmoid_()
    return m.fc(m.b(y))


def other_name(m, x):
    y = m.a(x)
    z = y
    y += m.b(x)
    return m.fc(m.c(torch.cat([y, z], 1)))


def view_of_written(m, x):
    y = m.a(x)
    flat = y.flatten(1)
    y.sigmoid_()
    return m.fc(m.b(flat[:, :, None, None]))


def hooked(*hooks) -> nn.Module:
    model = Net(lambda m, x: m.fc(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 5), fc=head(5))
    for hook in hooks:
        model.b.register_forward_hook(hook)
    return model


def folded(m, x):
    """Groups of channels as images, as shuffle attention has them."""
    y = m.a(x)
    n, _, h, w = y.shape
    z = m.c(y.reshape(n * 2, -1, h, w))
    return m.fc(m.b(z.reshape(n, -1, h, w)))


class BatchDependent(nn.Module):
    """Cannot be traced, but run: its control flow asks for the number of images."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) if x.size(0) < 1000 else x


class NormAct(nn.BatchNorm2d):
    """Batch norm and activation in one module, as timm has it."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.act = nn.SiLU()

    def forward(self, x):
        training = self.training or self.running_mean is None
        x = F.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            training,
            self.momentum,
            self.eps,
        )
        return self.act(x)


def shared_weight() -> nn.Module:
    model = Net(
        lambda m, x: m.fc(F.relu(m.c(F.relu(m.b(F.relu(m.a(x))))))),
        a=conv(3, 8),
        b=conv(8, 8),
        c=conv(8, 8),
        fc=head(8),
    )
    model.c.weight = model.b.weight
    return model


def parametrised() -> nn.Module:
    a = nn.utils.parametrizations.weight_norm(conv(3, 6))
    return Net(lambda m, x: m.fc(m.b(F.relu(m.a(x)))), a=a, b=conv(6, 5), fc=head(5))


class BlurredConv(nn.Conv2d):
    """A subclass with a forward of its own."""

    def forward(self, x):
        return F.conv2d(x, self.weight - self.weight.mean(), None, padding=self.padding)


A, AB = ("a",), ("a", "b")
two = dict(a=conv(3, 6), b=conv(3, 6), fc=head(6))

CASES = {
    "chain": Case(
        nn.Sequential(cbr(3, 6), cbr(6, 5), head(5)),
        {("0.0",): 6, ("1.0",): 5},
        {"2.2": OUTPUT},
        head=False,
    ),
    "residual add": Case(Net(lambda m, x: m.fc(m.a(x) + m.b(x)), **two), {AB: 6}, residual=(AB,)),
    "residual add, keyword": Case(
        Net(lambda m, x: m.fc(torch.add(m.a(x), other=m.b(x))), **two), {AB: 6}, residual=(AB,)
    ),
    "residual add, keywords": Case(
        Net(lambda m, x: m.fc(torch.add(input=m.a(x), other=m.b(x))), **two),
        {AB: 6},
        residual=(AB,),
    ),
    "residual add in place": Case(
        Net(lambda m, x: m.fc(m.a(x).add_(m.b(x))), **two), {AB: 6}, residual=(AB,)
    ),
    "difference": Case(Net(lambda m, x: m.fc(m.a(x) - m.b(x)), **two), {AB: 6}, residual=(AB,)),
    "product": Case(Net(lambda m, x: m.fc(m.a(x) * m.b(x)), **two), {AB: 6}),
    "concatenation": Case(
        Net(
            lambda m, x: m.fc(torch.cat([m.a(x), m.b(x)], 1)),
            a=conv(3, 6),
            b=conv(3, 2),
            fc=head(8),
        ),
        {A: 6, ("b",): 2},
    ),
    "concatenation, axis": Case(
        Net(
            lambda m, x: m.fc(torch.cat([m.a(x), m.b(x)], axis=1)),
            a=conv(3, 6),
            b=conv(3, 2),
            fc=head(8),
        ),
        {A: 6, ("b",): 2},
    ),
    "concatenation, negative dim": Case(
        Net(
            lambda m, x: m.fc(torch.cat((m.a(x), m.b(x)), dim=-3)),
            a=conv(3, 6),
            b=conv(3, 2),
            fc=head(8),
        ),
        {A: 6, ("b",): 2},
    ),
    "concatenation of positions": Case(
        Net(lambda m, x: m.fc(torch.cat([m.a(x), m.b(x)], 2)), **two), {AB: 6}
    ),
    "concatenation with the input": Case(
        Net(lambda m, x: m.fc(torch.cat([x, m.a(x)], 1)), a=conv(3, 6), fc=head(9)), {A: 6}
    ),
    "sum over a concatenation": Case(
        Net(
            lambda m, x: m.fc(torch.cat([m.a(x), m.b(x)], 1) + m.c(x)),
            a=conv(3, 4),
            b=conv(3, 2),
            c=conv(3, 6),
            fc=head(6),
        ),
        {("a", "b", "c"): 6},
        residual=(("a", "b", "c"),),
    ),
    "sum with the input": Case(
        Net(lambda m, x: m.fc(x + m.a(x)), a=conv(3, 3), fc=head(3)),
        {},
        {"a": "combines it with a tensor of fixed size"},
    ),
    "depthwise": Case(
        nn.Sequential(cbr(3, 6), cbr(6, 6, groups=6), cbr(6, 5, 1), head(5)),
        {("0.0",): 6, ("2.0",): 5},
        {"3.2": OUTPUT},
        head=False,
    ),
    "depth multiplier": Case(
        nn.Sequential(
            conv(3, 4), nn.ReLU(), nn.Conv2d(4, 8, 3, groups=4), nn.ReLU(), conv(8, 5), head(5)
        ),
        {("0",): 4, ("4",): 5},
        {"5.2": OUTPUT},
        head=False,
    ),
    "grouped": Case(
        nn.Sequential(
            conv(3, 8), nn.ReLU(), conv(8, 12, groups=4), nn.ReLU(), conv(12, 5), head(5)
        ),
        {("0",): 2, ("2",): 3, ("4",): 5},
        {"5.2": OUTPUT},
        head=False,
        per_unit={("0",): 4, ("2",): 4},
    ),
    "flatten before linear": Case(
        Net(
            lambda m, x: m.fc(torch.flatten(F.relu(m.a(x)), 1)), a=conv(3, 6), fc=nn.Linear(216, 4)
        ),
        {A: 6},
        {"fc": OUTPUT},
        head=False,
    ),
    "view before linear": Case(
        Net(
            lambda m, x: m.fc((lambda y: y.view(y.size(0), -1))(m.a(x))),
            a=conv(3, 6),
            fc=nn.Linear(216, 4),
        ),
        {A: 6},
        {"fc": OUTPUT},
        head=False,
    ),
    "batch norm after flatten": Case(
        nn.Sequential(conv(3, 6), nn.Flatten(), nn.BatchNorm1d(216), nn.ReLU(), nn.Linear(216, 4)),
        {("0",): 6},
        {"4": OUTPUT},
        head=False,
    ),
    "squeeze and excite": Case(
        Net(
            lambda m, x: m.fc(
                (lambda y: y * m.e(F.relu(m.r(F.adaptive_avg_pool2d(y, 1)))).sigmoid())(m.a(x))
            ),
            a=conv(3, 6),
            r=nn.Conv2d(6, 2, 1),
            e=nn.Conv2d(2, 6, 1),
            fc=head(6),
        ),
        {("a", "e"): 6, ("r",): 2},
    ),
    "pools, module": Case(
        nn.Sequential(
            conv(3, 6),
            nn.MaxPool2d(2),
            nn.AvgPool2d(2, 1),
            nn.AdaptiveMaxPool2d(2),
            conv(6, 5),
            head(5),
        ),
        {("0",): 6, ("4",): 5},
        {"5.2": OUTPUT},
        head=False,
    ),
    "pools, functional": Case(
        Net(
            lambda m, x: m.fc(
                m.b(
                    F.interpolate(
                        F.avg_pool2d(
                            F.max_pool2d(F.relu6(F.dropout(m.a(x), 0.1, m.training)), 2), 2
                        ),
                        scale_factor=2.0,
                    )
                )
            ),
            a=conv(3, 6),
            b=conv(6, 5),
            fc=head(5),
        ),
        {A: 6, ("b",): 5},
    ),
    "zero padding": Case(
        Net(lambda m, x: m.fc(F.pad(m.a(x), (1, 1, 1, 1))), a=conv(3, 6), fc=head(6)), {A: 6}
    ),
    "padded channels": Case(
        Net(lambda m, x: m.fc(F.pad(m.a(x), (0, 0, 0, 0, 1, 2))), a=conv(3, 6), fc=head(9)), {A: 6}
    ),
    "cropped channels": Case(
        Net(lambda m, x: m.fc(F.pad(m.a(x), (0, 0, 0, 0, -1, 0))), a=conv(3, 6), fc=head(5)),
        {},
        {"a": "crops channels"},
    ),
    "padded with ones": Case(
        Net(lambda m, x: m.fc(F.pad(m.a(x), (1, 1), value=1.0)), a=conv(3, 6), fc=head(6)),
        {},
        {"a": "pads with a value"},
    ),
    "module used twice": Case(
        Net(lambda m, x: m.fc(m.b(F.relu(m.b(m.a(x))))), a=conv(3, 6), b=conv(6, 6), fc=head(6)),
        {AB: 6},
    ),
    "batch norm used twice": Case(
        Net(
            lambda m, x: m.fc(torch.cat([m.n(m.a(x)), m.n(m.b(x))], 1)),
            a=conv(3, 6),
            b=conv(3, 6),
            n=nn.BatchNorm2d(6),
            fc=head(12),
        ),
        {AB: 6},
    ),
    "shared weight": Case(
        shared_weight(),
        {},
        {
            "a": "a parameter of layer 'b' is read by 'c'",
            "b": "'b' is read by 'c'",
            "c": "read by 'b'",
        },
    ),
    "parametrised": Case(
        parametrised(), {("b",): 5}, {"a": r"the weight of layer 'a' is computed"}
    ),
    "convolution with its own forward": Case(
        Net(
            lambda m, x: m.fc(m.b(m.a(x))),
            a=conv(3, 6),
            b=BlurredConv(6, 5, 3, padding=1),
            fc=head(5),
        ),
        {},
        {"a": "'conv2d' .* is not understood"},
    ),
    "chunk": Case(
        Net(
            lambda m, x: m.fc((lambda t: t[0] * t[1].sigmoid())(m.a(x).chunk(2, 1))),
            a=conv(3, 6),
            fc=head(3),
        ),
        {A: 3},
        per_unit={A: 2},
    ),
    "split at fixed places": Case(
        Net(
            lambda m, x: m.fc((lambda t: t[0] * t[1])(m.a(x).split(3, 1))), a=conv(3, 6), fc=head(3)
        ),
        {},
        {"a": "cuts the channels at fixed places"},
    ),
    "slice": Case(
        Net(lambda m, x: m.fc(m.a(x)[:, :4]), a=conv(3, 6), fc=head(4)),
        {},
        {"a": "cuts the channels at fixed places"},
    ),
    "slice of positions": Case(
        Net(lambda m, x: m.fc(m.a(x)[:, :, 1:]), a=conv(3, 6), fc=head(6)), {A: 6}
    ),
    "channel shuffle": Case(
        Net(lambda m, x: m.fc(shuffle(m.a(x))), a=conv(3, 6), fc=head(6)), {A: 3}, per_unit={A: 2}
    ),
    "two channel shuffles": Case(  # tied over and over, in the end all are one unit; never "fixed places"
        Net(lambda m, x: m.fc(shuffle(shuffle(m.a(x)))), a=conv(3, 8), fc=head(8)),
        {A: 2},
        per_unit={A: 4},
    ),
    "constant in view": Case(
        Net(lambda m, x: m.fc(m.a(x).mean((2, 3)).view(-1, 6)), a=conv(3, 6), fc=nn.Linear(6, 4)),
        {},
        {"a": r"'view' \(view\) cuts", "fc": OUTPUT},
        head=False,
    ),
    "view to another tensor's width": Case(
        Net(
            lambda m, x: (
                lambda y, z: m.fc(y.mean((2, 3)).view(y.size(0), z.size(1))) + m.fc2(z.mean((2, 3)))
            )(m.a(x), m.b(x)),
            a=conv(3, 6),
            b=conv(3, 6),
            fc=nn.Linear(6, 4),
            fc2=nn.Linear(6, 4),
        ),
        {},
        {
            "a": "cuts the channels",
            "b": "'view' computes with their number",
            "fc": OUTPUT,
            "fc2": OUTPUT,
        },
        head=False,
    ),
    "pixel shuffle": Case(
        nn.Sequential(conv(3, 8), nn.PixelShuffle(2), cbr(2, 5), head(5)),
        {("0",): 2, ("2.0",): 5},
        {"3.2": OUTPUT},
        head=False,
        per_unit={("0",): 4},
    ),
    "pixel shuffle, computed factor": Case(
        Net(
            lambda m, x: m.fc(F.pixel_shuffle(m.a(x), x.size(2) // 3)),
            a=conv(3, 8),
            fc=head(2),
        ),
        {},
        {"a": "'pixel_shuffle' .* is not understood"},
    ),
    "pixel unshuffle": Case(
        Net(
            lambda m, x: m.fc(m.b(F.pixel_unshuffle(m.a(x), 2))),
            a=conv(3, 4),
            b=cbr(16, 5),
            fc=head(5),
        ),
        {A: 4, ("b.0",): 5},
    ),
    "wrapped function": Case(
        Net(lambda m, x: m.fc(unknown_function(m.a(x))), a=conv(3, 6), fc=head(6)),
        {},
        {"a": "the operation 'group_cases.unknown_function' .* is not understood"},
    ),
    "sigmoid before a convolution": Case(
        Net(lambda m, x: m.fc(m.b(m.a(x).sigmoid())), a=conv(3, 6), b=conv(6, 5), fc=head(5)),
        {("b",): 5},
        {"a": f"{NOT_ZERO} 'b'"},
    ),
    "sigmoid in place, its operand read": Case(
        Net(twice_in_place, a=conv(3, 6), b=conv(6, 5), fc=head(5)),
        {("b",): 5},
        {"a": f"{NOT_ZERO} 'b'"},
    ),
    "constant added": Case(
        Net(lambda m, x: m.fc(m.a(x).add(other=1.0)), a=conv(3, 6), fc=head(6)),
        {},
        {"a": f"{NOT_ZERO} 'fc.2'"},
    ),
    "branches summed from 0": Case(
        Net(lambda m, x: m.fc(sum([m.a(x), m.b(x)])), **two), {AB: 6}, residual=(AB,)
    ),
    "clamp at 0": Case(
        Net(lambda m, x: m.fc(m.a(x).clamp(min=0)), a=conv(3, 6), fc=head(6)), {A: 6}
    ),
    "clamp above 0": Case(
        Net(lambda m, x: m.fc(m.a(x).clamp(min=0.5)), a=conv(3, 6), fc=head(6)), {}, {"a": NOT_ZERO}
    ),
    "clamp_max below 0": Case(
        Net(lambda m, x: m.fc(m.a(x).clamp_max(-1)), a=conv(3, 6), fc=head(6)), {}, {"a": NOT_ZERO}
    ),
    "hardtanh around 0": Case(
        Net(lambda m, x: m.fc(F.hardtanh(m.a(x), -1, 1)), a=conv(3, 6), fc=head(6)), {A: 6}
    ),
    "hardtanh above 0": Case(
        Net(lambda m, x: m.fc(m.act(m.a(x))), a=conv(3, 6), act=nn.Hardtanh(0.5, 1), fc=head(6)),
        {},
        {"a": NOT_ZERO},
    ),
    "transposed convolution": Case(
        nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 4, 3, 2, 1, 1), cbr(4, 5), head(5)),
        {("0",): 6, ("1",): 4, ("2.0",): 5},
        {"3.2": OUTPUT},
        head=False,
    ),
    "transposed convolution, grouped": Case(
        nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 4, 2, groups=2), cbr(4, 5), head(5)),
        {("0",): 3, ("1",): 2, ("2.0",): 5},
        {"3.2": OUTPUT},
        head=False,
        per_unit={("0",): 2, ("1",): 2},
    ),
    "transposed convolution, depthwise": Case(
        nn.Sequential(conv(3, 6), nn.ConvTranspose2d(6, 12, 2, groups=6), cbr(12, 5), head(5)),
        {("0",): 6, ("2.0",): 5},
        {"3.2": OUTPUT},
        head=False,
    ),
    "group norm": Case(
        nn.Sequential(conv(3, 6), nn.GroupNorm(2, 6), head(6)),
        {("0",): 2},
        {"2.2": OUTPUT},
        head=False,
        per_unit={("0",): 3},
    ),
    "group norm over all channels": Case(
        nn.Sequential(conv(3, 6), nn.GroupNorm(1, 6), head(6)),
        {},
        {"0": "layer '1' normalises over all of its channels", "2.2": OUTPUT},
        head=False,
    ),
    "group norm of another number of groups": Case(
        nn.Sequential(conv(3, 12), nn.GroupNorm(6, 12), nn.ReLU(), nn.GroupNorm(4, 12), head(12)),
        {("0",): 2},
        {"4.2": OUTPUT},
        head=False,
        per_unit={("0",): 6},
    ),
    "instance norm": Case(
        nn.Sequential(conv(3, 6), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), head(6)),
        {("0",): 6},
        {"3.2": OUTPUT},
        head=False,
    ),
    "instance norm without parameters": Case(
        nn.Sequential(conv(3, 6), nn.InstanceNorm2d(6), nn.ReLU(), head(6)),
        {("0",): 6},
        {"3.2": OUTPUT},
        head=False,
    ),
    "frozen batch norm": Case(
        nn.Sequential(conv(3, 6), torchvision.ops.FrozenBatchNorm2d(6), nn.ReLU(), head(6)),
        {("0",): 6},
        {"3.2": OUTPUT},
        head=False,
    ),
    "layer norm over channels": Case(
        Net(
            lambda m, x: m.fc(m.n(m.a(x).permute(0, 2, 3, 1)).mean((1, 2))),
            a=conv(3, 6),
            n=nn.LayerNorm(6),
            fc=nn.Linear(6, 4),
        ),
        {},
        {"a": "'layernorm' .* normalises over channels", "fc": OUTPUT},
        head=False,
    ),
    "prelu with a slope for each channel": Case(
        nn.Sequential(conv(3, 6), nn.PReLU(6), head(6)), {("0",): 6}, {"2.2": OUTPUT}, head=False
    ),
    "prelu with one slope": Case(
        nn.Sequential(conv(3, 6), nn.PReLU(), head(6)), {("0",): 6}, {"2.2": OUTPUT}, head=False
    ),
    "channel shuffle, module": Case(
        nn.Sequential(conv(3, 6), nn.ChannelShuffle(3), cbr(6, 5), head(5)),
        {("0",): 2, ("2.0",): 5},
        {"3.2": OUTPUT},
        head=False,
        per_unit={("0",): 3},
    ),
    "channel shuffle, function": Case(
        Net(
            lambda m, x: m.fc(m.b(F.channel_shuffle(m.a(x), 2))),
            a=conv(3, 6),
            b=cbr(6, 5),
            fc=head(5),
        ),
        {A: 3, ("b.0",): 5},
        per_unit={A: 2},
    ),
    "split at a computed place": Case(
        Net(
            lambda m, x: m.fc(
                (lambda y: (lambda t: t[0] * t[1])(y.split(y.size(1) // 2, 1)))(m.a(x))
            ),
            a=conv(3, 6),
            fc=head(3),
        ),
        {A: 3},
        per_unit={A: 2},
    ),
    "slices at computed places": Case(
        Net(
            lambda m, x: m.fc(
                (lambda y: torch.cat([y[:, y.shape[1] // 2 :], y[:, : y.shape[1] // 2]], 1))(m.a(x))
            ),
            a=conv(3, 6),
            fc=head(6),
        ),
        {A: 3},
        per_unit={A: 2},
    ),
    "narrow at a computed place": Case(
        Net(
            lambda m, x: m.fc((lambda y: y.narrow(1, 0, y.size(1) // 3))(m.a(x))),
            a=conv(3, 6),
            fc=head(2),
        ),
        {A: 2},
        per_unit={A: 3},
    ),
    "slice that does not follow the channels": Case(
        Net(
            lambda m, x: m.fc((lambda y: y[:, : y.size(1) // 2 + 1])(m.a(x))),
            a=conv(3, 6),
            fc=head(4),
        ),
        {},
        {"a": "cuts the channels at fixed places"},
    ),
    "slice of what is fixed": Case(
        Net(lambda m, x: m.fc(torch.cat([x, m.a(x)], 1)[:, 3:]), a=conv(3, 6), fc=head(6)),
        {A: 6},
    ),
    "slice of one of two": Case(
        Net(
            lambda m, x: m.fc(torch.cat([m.b(x), m.a(x)], 1)[:, 2:]),
            a=conv(3, 6),
            b=conv(3, 2),
            fc=head(6),
        ),
        {A: 6},
        {"b": "cuts the channels at fixed places"},
    ),
    "slice from the end": Case(
        Net(
            lambda m, x: m.fc(torch.cat([m.a(x), m.b(x)], 1)[:, :-2]),
            a=conv(3, 6),
            b=conv(3, 2),
            fc=head(6),
        ),
        {A: 6},
        {"b": "cuts the channels at fixed places"},
    ),
    "one channel by its number": Case(
        Net(
            lambda m, x: m.fc(torch.cat([m.a(x)[:, 0:1], m.b(x)], 1)),
            a=conv(3, 6),
            b=conv(3, 2),
            fc=head(3),
        ),
        {("b",): 2},
        {"a": "cuts the channels at fixed places"},
    ),
    "flip of channels": Case(
        Net(lambda m, x: m.fc(m.a(x).flip(1)), a=conv(3, 6), fc=head(6)), {A: 6}
    ),
    "roll of channels": Case(
        Net(lambda m, x: m.fc(m.a(x).roll(1, 1)), a=conv(3, 6), fc=head(6)),
        {},
        {"a": "cuts the channels at fixed places"},
    ),
    "roll of positions": Case(
        Net(lambda m, x: m.fc(m.b(m.a(x).roll(1, 2))), a=conv(3, 6), b=cbr(6, 5), fc=head(5)),
        {A: 6, ("b.0",): 5},
    ),
    "channels by number": Case(
        Net(
            lambda m, x: m.fc(m.a(x).index_select(1, m.index)),
            a=conv(3, 6),
            index=nn.Parameter(torch.tensor([0, 2, 4]), requires_grad=False),
            fc=head(3),
        ),
        {},
        {"a": "cuts the channels at fixed places"},
    ),
    "positions by number": Case(
        Net(
            lambda m, x: m.fc(m.a(x).index_select(2, m.index)),
            a=conv(3, 6),
            index=nn.Parameter(torch.tensor([0, 2, 4]), requires_grad=False),
            fc=head(6),
        ),
        {A: 6},
    ),
    "repeat": Case(
        Net(lambda m, x: m.fc(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 6), fc=head(12)), {A: 6}
    ),
    "stack": Case(Net(lambda m, x: m.fc(torch.stack([m.a(x), m.b(x)], 1).sum(1)), **two), {AB: 6}),
    "stack, last": Case(
        Net(lambda m, x: m.fc(torch.stack([m.a(x), m.b(x)], -1).mean(-1)), **two), {AB: 6}
    ),
    "maximum": Case(Net(lambda m, x: m.fc(torch.maximum(m.a(x), m.b(x))), **two), {AB: 6}),
    "power": Case(Net(lambda m, x: m.fc(m.a(x) ** 2), a=conv(3, 6), fc=head(6)), {A: 6}),
    "power of 0": Case(
        Net(lambda m, x: m.fc(m.a(x) ** 0), a=conv(3, 6), fc=head(6)), {}, {"a": NOT_ZERO}
    ),
    "gated linear unit": Case(
        Net(lambda m, x: m.fc(F.glu(m.a(x), 1)), a=conv(3, 6), fc=head(3)), {A: 3}, per_unit={A: 2}
    ),
    "spatial attention": Case(
        Net(
            lambda m, x: m.fc((lambda y: y * m.s(y).sigmoid())(m.a(x))),
            a=conv(3, 6),
            s=conv(6, 1),
            fc=head(6),
        ),
        {A: 6},
        {"s": "broadcasts a single channel"},
    ),
    "squeeze and excite, expanded": Case(
        Net(
            lambda m, x: m.fc(
                (lambda y: y * m.e(y.mean((2, 3), keepdim=True)).expand_as(y))(m.a(x))
            ),
            a=conv(3, 6),
            e=nn.Conv2d(6, 6, 1),
            fc=head(6),
        ),
        {("a", "e"): 6},
    ),
    "softmax over positions": Case(
        Net(
            lambda m, x: m.fc((lambda y: y * F.softmax(y.flatten(2), -1).view_as(y))(m.a(x))),
            a=conv(3, 6),
            fc=head(6),
        ),
        {},
        {"a": "'view_as' .* is not understood"},
    ),
    "softmax over channels": Case(
        Net(lambda m, x: m.fc(m.a(x).softmax(1)), a=conv(3, 6), fc=head(6)),
        {},
        {"a": "normalises over channels"},
    ),
    "divided by the number of channels": Case(
        Net(lambda m, x: m.fc((lambda y: y / y.size(1))(m.a(x))), a=conv(3, 6), fc=head(6)),
        {},
        {"a": "computes with their number"},
    ),
    "zeros beside the channels": Case(
        Net(
            lambda m, x: m.fc(torch.cat([m.a(x), x.new_zeros(x.size(0), 2, 6, 6)], 1)),
            a=conv(3, 6),
            fc=head(8),
        ),
        {A: 6},
    ),
    "as many zeros as channels": Case(
        Net(
            lambda m, x: m.fc(
                (lambda y: torch.cat([y, x.new_zeros(x.size(0), y.size(1), 6, 6)], 1))(m.a(x))
            ),
            a=conv(3, 6),
            fc=head(12),
        ),
        {},
        {"a": "'new_zeros' computes with their number"},
    ),
    "functional convolution": Case(
        Net(
            lambda m, x: m.fc(
                F.relu(F.conv2d(F.relu(m.a(x)), m.b.weight, m.b.bias, stride=2, padding=1))
            ),
            a=conv(3, 6),
            b=nn.Conv2d(6, 5, 3, 2, 1),
            fc=head(5),
        ),
        {A: 6, ("b",): 5},
    ),
    "functional convolution, another stride": Case(
        Net(
            lambda m, x: m.fc(F.conv2d(m.a(x), m.b.weight, m.b.bias, padding=1)),
            a=conv(3, 6),
            b=nn.Conv2d(6, 5, 3, 2, 1),
            fc=head(5),
        ),
        {},
        {"a": "'conv2d' .* is not understood"},
    ),
    "functional linear": Case(
        Net(
            lambda m, x: m.fc(F.linear(m.a(x).mean((2, 3)), m.b.weight, m.b.bias).relu()),
            a=conv(3, 6),
            b=nn.Linear(6, 5),
            fc=nn.Linear(5, 4),
        ),
        {A: 6, ("b",): 5},
        {"fc": OUTPUT},
        head=False,
    ),
    "batch norm with an activation": Case(
        nn.Sequential(conv(3, 6), NormAct(6), cbr(6, 5), head(5)),
        {("0",): 6, ("2.0",): 5},
        {"3.2": OUTPUT},
        head=False,
    ),
    "weight read by the forward": Case(
        Net(
            lambda m, x: m.fc(m.b(m.a(x))) + m.a.weight.mean(),
            a=conv(3, 6),
            b=cbr(6, 5),
            fc=head(5),
        ),
        {("b.0",): 5},
        {"a": r"a parameter of layer 'a' is read by the forward itself"},
    ),
    "control flow by the number of images": Case(
        nn.Sequential(
            cbr(3, 6), BatchDependent(conv(6, 5)), cbr(5, 4), BatchDependent(conv(4, 4)), head(4)
        ),
        {},
        {
            "0.0": r"module '1' \(BatchDependent\) cannot be traced",
            "2.0": r"module '3' \(BatchDependent\) cannot be traced",
            "4.2": OUTPUT,
        },
        head=False,
    ),
    "layer that an untraceable module calls too": Case(
        (
            lambda inner: Net(
                lambda m, x: m.fc(m.b(m.a(x)) + m.s(x.repeat(1, 2, 1, 1))),
                a=cbr(3, 6),
                b=inner,
                s=BatchDependent(inner),
                fc=head(5),
            )
        )(conv(6, 5)),
        {},
        {"a.0": "read by 's'", "b": "cannot be traced|read by 's'"},
    ),
    "groups in the batch dimension": Case(
        Net(folded, a=conv(3, 12), c=cbr(6, 4), b=cbr(8, 5), fc=head(5)),
        {A: 6, ("c.0",): 4, ("b.0",): 5},
        per_unit={A: 2},
    ),
    "hook that looks": Case(hooked(lambda m, x, y: None), {A: 6, ("b",): 5}),
    "hook that changes": Case(
        hooked(lambda m, x, y: None, lambda m, x, y: y - y.mean(1, keepdim=True)),
        {},
        {"a": "a forward hook of 'b' changes"},
    ),
    "hook that changes in place": Case(
        hooked(lambda m, x, y: y.sigmoid_()),
        {},
        {"a": "a forward hook of 'b' changes"},
    ),
    "sum in place, the other name is read": Case(
        Net(other_name, a=conv(3, 6), b=conv(3, 6), c=conv(12, 5), fc=head(5)),
        {AB: 6, ("c",): 5},
        residual=(AB,),
    ),
    "view of what is written in place": Case(
        Net(view_of_written, a=conv(3, 6), b=conv(216, 5, 1), fc=head(5)),
        {("b",): 5},
        {"a": "writes in place what 'flatten' shows"},
    ),
    "mean over channels": Case(
        Net(lambda m, x: m.fc(m.a(x) * m.a(x).mean(1, keepdim=True)), a=conv(3, 6), fc=head(6)),
        {},
        {"a": "reduces over channels"},
    ),
    "max pool without a batch": Case(
        Net(
            lambda m, x: m.fc(F.max_pool2d(m.a(x), 3, 1, 1).mean(2)),
            a=nn.Conv1d(3, 6, 3),
            fc=nn.Linear(6, 4),
        ),
        {},
        {"a": "'max_pool2d' .* is not understood", "fc": OUTPUT},
        ((1, 3, 12),),
        head=False,
    ),
    "keyword input": Case(
        Net(
            lambda m, x: m.fc(m.n(input=m.a(input=x))),
            a=conv(3, 6),
            n=nn.BatchNorm2d(6),
            fc=head(6),
        ),
        {A: 6},
    ),
    "1d": Case(
        nn.Sequential(
            nn.Conv1d(3, 6, 3),
            nn.BatchNorm1d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool1d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        ),
        {("0",): 6},
        {"5": OUTPUT},
        ((1, 3, 12),),
        head=False,
    ),
    "3d": Case(
        nn.Sequential(
            nn.Conv3d(3, 6, 3),
            nn.BatchNorm3d(6),
            nn.ReLU(),
            nn.AdaptiveAvgPool3d(1),
            nn.Flatten(),
            nn.Linear(6, 4),
        ),
        {("0",): 6},
        {"5": OUTPUT},
        ((1, 3, 4, 4, 4),),
        head=False,
    ),
    "linear layers only": Case(
        nn.Sequential(
            nn.Linear(7, 6),
            nn.ReLU(),
            nn.Linear(6, 5),
            nn.BatchNorm1d(5),
            nn.ReLU(),
            nn.Linear(5, 4),
        ),
        {("0",): 6, ("2",): 5},
        {"5": OUTPUT},
        ((1, 7),),
        head=False,
    ),
    "two inputs": Case(
        Net2(lambda m, x, y: m.fc(m.a(x) + m.b(y)), a=conv(3, 6), b=conv(2, 6), fc=head(6)),
        {AB: 6},
        inputs=((1, 3, 6, 6), (1, 2, 6, 6)),
        residual=(AB,),
    ),
    "dict of outputs": Case(
        Net(lambda m, x: {"logits": m.fc(m.a(x)), "features": m.b(x)}, **two), {A: 6}, {"b": OUTPUT}
    ),
    "layer that is never called": Case(
        Net(lambda m, x: m.fc(m.a(x)), a=conv(3, 6), unused=conv(3, 9), fc=head(6)), {A: 6}
    ),
    "attention": Case(
        Net(
            lambda m, x: m.fc(m.att(*[m.a(x).flatten(2).transpose(1, 2)] * 3)[0].mean(1)),
            a=conv(3, 6),
            att=nn.MultiheadAttention(6, 2, batch_first=True),
            fc=nn.Linear(6, 4),
        ),
        {},
        {"a": "'multiheadattention' .* is not understood", "fc": OUTPUT},
        head=False,
    ),
}
