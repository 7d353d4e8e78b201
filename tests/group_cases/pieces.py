"""Channels that are cut, moved and reshaped: splits, slices, shuffles, flattening."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from small_nets import Net, cbr, conv, head
from torch import nn

from .case import OUTPUT, A, Case


def shuffle(x: torch.Tensor, groups: int = 2) -> torch.Tensor:
    n, c, h, w = x.shape
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).reshape(n, c, h, w)


def folded(m, x):
    """Groups of channels as images, as shuffle attention has them."""
    y = m.a(x)
    n, _, h, w = y.shape
    z = m.c(y.reshape(n * 2, -1, h, w))
    return m.fc(m.b(z.reshape(n, -1, h, w)))


CASES = {
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
    "groups in the batch dimension": Case(
        Net(folded, a=conv(3, 12), c=cbr(6, 4), b=cbr(8, 5), fc=head(5)),
        {A: 6, ("c.0",): 4, ("b.0",): 5},
        per_unit={A: 2},
    ),
}
