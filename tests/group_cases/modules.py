"""Modules that are shared, hooked, wrapped or never called."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from small_nets import Net, cbr, conv, head
from torch import nn

from .case import AB, OUTPUT, UNCALLED, A, Case


def hooked(*hooks) -> nn.Module:
    model = Net(lambda m, x: m.fc(m.b(m.a(x))), a=conv(3, 6), b=conv(6, 5), fc=head(5))
    for hook in hooks:
        model.b.register_forward_hook(hook)
    return model


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


CASES = {
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
        {"a": "'conv2d' .* is not understood", "b": UNCALLED},
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
    "layer that is never called": Case(
        Net(lambda m, x: m.fc(m.a(x)), a=conv(3, 6), unused=conv(3, 9), fc=head(6)), {A: 6}
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
}
