"""Widths that a running search is narrowed to."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pfs_fast as pfs
from pfs_fast import _library
from pfs_fast.gating import winograd
from pfs_fast.gating.widths import WidthRule, preferred_multiple
from pfs_fast.graph.groups import ChannelGroup
from pfs_fast.searching.plan import prepare

VECTOR = preferred_multiple(torch.device("cpu"))  # 8 or 16, by the processor


def group(size: int, channels_per_unit: int = 1) -> ChannelGroup:
    return ChannelGroup("g", 0, size, ("g",), (), (), False, channels_per_unit)


@pytest.mark.parametrize(
    ("multiple", "least", "alive", "size", "per_unit", "expected"),
    [
        (8, 8, 9, 20, 1, 16),
        (8, 8, 17, 20, 1, 20),  # no more than there are
        (8, 8, 0, 20, 1, 8),
        (2, 8, 9, 20, 1, 10),
        (2, 8, 3, 20, 1, 8),
        (2, 8, 3, 6, 1, 6),
        (8, 8, 3, 20, 4, 4),  # 16 channels
        (2, 8, 3, 20, 4, 3),  # 12 channels
        (2, 8, 1, 20, 4, 2),  # 8 channels
    ],
)
def test_width(
    multiple: int, least: int, alive: int, size: int, per_unit: int, expected: int
) -> None:
    assert WidthRule(multiple, least).width(alive, group(size, per_unit)) == expected


def rules(name: str, **options: object) -> dict[str, WidthRule]:
    return rules_of(pfs.models.get(name, num_classes=10), **options)


def rules_of(model: nn.Module, **options: object) -> dict[str, WidthRule]:
    config = pfs.SearchConfig(scope="all", **{"precision": "fp32", **options})
    plan = prepare(
        model, torch.zeros(2, 3, 32, 32), pfs.Budget(0.5), config, device=torch.device("cpu")
    )
    return plan.loop.compaction._widths


def test_groups_of_own_convolutions_take_pairs() -> None:
    found = rules("resnet20")
    assert {rule.multiple for rule in found.values()} == {2}
    assert {rule.least for rule in found.values()} == {VECTOR}


@pytest.mark.skipif(not winograd.serves(torch.bfloat16), reason="AMX: bf16 is oneDNN's")
def test_bf16_takes_pairs_but_where_a_strided_or_first_convolution_is() -> None:
    found = {name: rule.multiple for name, rule in rules("resnet20", precision="bf16").items()}
    coarse = {name for name, multiple in found.items() if multiple == VECTOR}
    assert found["layer1.0.conv1"] == found["layer3.2.conv1"] == 2 and "layer2.0.conv1" in coarse
    assert set(found.values()) == {2, VECTOR}


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "fp64"},
        {"winograd": False},
        {"channels_last": False},
        {"backend": "reference"},
    ],
)
def test_other_kernels_take_whole_vectors(options: dict[str, object]) -> None:
    assert {rule.multiple for rule in rules("resnet20", **options).values()} == {VECTOR}


def test_a_group_that_others_kernels_read_takes_whole_vectors() -> None:
    found = rules("mobilenet_v1")  # depthwise convolutions are PyTorch's
    assert {rule.multiple for rule in found.values()} == {VECTOR}


def stem(channels: int, kernel: int) -> nn.Module:
    """Two convolutions in a row; neither is one that Winograd's filtering serves."""
    return nn.Sequential(
        nn.Conv2d(3, channels, kernel, padding=kernel // 2),
        nn.BatchNorm2d(channels),
        nn.ReLU(),
        nn.Conv2d(channels, 10, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )


def test_a_group_that_few_channels_are_read_for_takes_pairs() -> None:
    assert rules_of(stem(32, 5))["0"].multiple == 2
    assert rules_of(stem(1024, 7))["0"].multiple == VECTOR  # a weight beyond the second-level cache


def test_the_library_knows_its_own_convolutions() -> None:
    pays = _library._C.direct_conv_pays
    once = ((1, 1), (1, 1), 1)
    assert pays((16, 16, 1, 1), *once) and pays((16, 7, 3, 3), *once)
    assert pays((16, 16, 3, 3), (2, 1), (1, 1), 1)
    assert not pays((16, 8, 3, 3), *once)
    assert not pays((16, 16, 1, 1), (1, 1), (1, 1), 2)
    assert not pays((16, 16, 3, 3), (2, 2), (2, 2), 1)
    assert not pays((16, 3, 3), (2,), (1,), 1)
    assert pays((256, 256, 1, 1), *once) and not pays((257, 256, 1, 1), *once)


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.gamma = nn.Parameter(torch.ones(16, 1, 1))
        self.b, self.fc = nn.Conv2d(16, 16, 3, padding=1), nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.a(x))) * self.gamma
        return self.fc(self.b(x).mean((2, 3)))


def test_a_group_with_a_bare_parameter_takes_whole_vectors() -> None:
    assert rules_of(Scaled())["a"].multiple == VECTOR
