"""Inputs and outputs: 1-D, 3-D, several, named, none with channels."""

from __future__ import annotations

import torch.nn.functional as F
from small_nets import Net, Net2, conv, head
from torch import nn

from .case import AB, OUTPUT, A, Case, two

CASES = {
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
}
