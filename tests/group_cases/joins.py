"""Tensors side by side: concatenations, padding, repetition."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from small_nets import Net, conv, head

from .case import AB, A, Case, two

CASES = {
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
    "repeat": Case(
        Net(lambda m, x: m.fc(m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 6), fc=head(12)), {A: 6}
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
}
