"""Tensors that are summed, multiplied or taken through a function, which keeps zeros or does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from small_nets import Net, cbr, conv, head
from torch import nn

from .case import AB, NOT_ZERO, OUTPUT, A, Case, two


@torch.fx.wrap
def unknown_function(x):
    return x.flip(1)


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
    "divided by the number of channels": Case(
        Net(lambda m, x: m.fc((lambda y: y / y.size(1))(m.a(x))), a=conv(3, 6), fc=head(6)),
        {},
        {"a": "computes with their number"},
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
}
