"""Channels that weight other channels or positions."""

from __future__ import annotations

import torch.nn.functional as F
from small_nets import Net, conv, head
from torch import nn

from .case import OUTPUT, A, Case

CASES = {
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
    "mean over channels": Case(
        Net(lambda m, x: m.fc(m.a(x) * m.a(x).mean(1, keepdim=True)), a=conv(3, 6), fc=head(6)),
        {},
        {"a": "reduces over channels"},
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
}
