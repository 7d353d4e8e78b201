"""Kinds of layers: grouped and transposed convolutions, norms, pools, functional forms."""

from __future__ import annotations

import torch.nn.functional as F
import torchvision
from small_nets import Net, cbr, conv, head
from torch import nn

from .case import OUTPUT, UNCALLED, A, Case

CASES = {
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
        {"a": "'conv2d' .* is not understood", "b": UNCALLED},
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
}
