"""Whole networks through the whole chain: two steps of search, slim, proof, cost.

By default one network of each kind that costs little; ``-m slow`` runs all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision_names import NAMES, size_of

import pfs_fast as pfs

FAST = frozenset(
    """resnet18 shufflenet_v2_x0_5 mobilenet_v3_small mnasnet0_5 squeezenet1_1 regnet_y_400mf lraspp r3d_18
    fpn_resnet18 conv1d unet""".split()
)
# Attention is held whole, so that less can go.
FLOORS = frozenset(n for n in NAMES if n.startswith(("vit", "swin", "maxvit")))
CLASSES = 10


class Pooled(nn.Module):
    """Logits from maps: the first output, averaged over positions, as the search's loss needs them."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        outputs = self.network(x)
        first = next(iter(outputs.values())) if isinstance(outputs, dict) else outputs
        return first.flatten(2).mean(2)


class Down(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.conv(x)))


class UNet(nn.Module):
    """Skips are concatenated, maps grow by transposed convolution and by pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = Down(3, 8), Down(8, 16), Down(16, 24)
        self.up = nn.ConvTranspose2d(24, 12, 2, 2)
        self.left = Down(28, 16)
        self.shuffle = nn.PixelShuffle(2)
        self.right = Down(12, 8)
        self.head = nn.Conv2d(8, CLASSES, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        second = self.second(nn.functional.max_pool2d(first, 2))
        third = self.third(nn.functional.max_pool2d(second, 2))
        left = self.left(torch.cat([self.up(third), second], 1))
        return self.head(self.right(torch.cat([self.shuffle(left), first], 1)))


class Residual1d(nn.Module):
    """A one-dimensional residual network with squeeze and excitation and a depthwise convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, 12, 7, 2, 3), nn.BatchNorm1d(12), nn.SiLU())
        self.wide = nn.Sequential(nn.Conv1d(12, 24, 1), nn.BatchNorm1d(24), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv1d(24, 24, 5, padding=2, groups=24), nn.BatchNorm1d(24))
        self.squeeze = nn.Sequential(
            nn.AdaptiveAvgPool1d(1),
            nn.Conv1d(24, 6, 1),
            nn.ReLU(),
            nn.Conv1d(6, 24, 1),
            nn.Sigmoid(),
        )
        self.back = nn.Sequential(nn.Conv1d(24, 12, 1), nn.BatchNorm1d(12))
        self.head = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.deep(self.wide(x))
        x = x + self.back(y * self.squeeze(y))
        return self.head(x.mean(-1))


@dataclass(frozen=True)
class Network:
    """A constructor, and the shape of one input."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]


def classifier(name: str) -> Network:
    options = {"init_weights": False} if name in ("googlenet", "inception_v3") else {}
    build = lambda: torchvision.models.get_model(name, num_classes=CLASSES, **options)  # noqa: E731
    return Network(build, (3, size_of(name), size_of(name)))


def maps(name: str, shape: tuple[int, ...] = (3, 64, 64)) -> Network:
    build = lambda: Pooled(  # noqa: E731
        torchvision.models.get_model(name, weights_backbone=None, num_classes=CLASSES)
    )
    return Network(build, shape)


def video(name: str, shape: tuple[int, ...] = (3, 4, 16, 16)) -> Network:
    return Network(lambda: torchvision.models.get_model(name, num_classes=CLASSES), shape)


NETWORKS = {name: classifier(name) for name in NAMES} | {
    "lraspp": maps("lraspp_mobilenet_v3_large"),
    "fcn_resnet50": maps("fcn_resnet50"),
    "fcn_resnet101": maps("fcn_resnet101"),
    "deeplabv3_resnet50": maps("deeplabv3_resnet50"),
    "deeplabv3_resnet101": maps("deeplabv3_resnet101"),
    "deeplabv3_mobilenet": maps("deeplabv3_mobilenet_v3_large"),
    "r3d_18": video("r3d_18"),
    "mc3_18": video("mc3_18"),
    "r2plus1d_18": video("r2plus1d_18"),
    "s3d": video("s3d", (3, 16, 224, 224)),
    "fpn_resnet18": Network(
        lambda: Pooled(resnet_fpn_backbone(backbone_name="resnet18", weights=None)), (3, 64, 64)
    ),
    "fpn_mobilenet": Network(
        lambda: Pooled(
            mobilenet_backbone(backbone_name="mobilenet_v3_large", fpn=True, weights=None)
        ),
        (3, 64, 64),
    ),
    "conv1d": Network(Residual1d, (3, 64)),
    "unet": Network(lambda: Pooled(UNet()), (3, 16, 16)),
}


@pytest.mark.parametrize(
    "name",
    [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in NETWORKS],
)
def test_network_is_searched_slimmed_and_proved(name):
    network = NETWORKS[name]
    model = network.build()
    for parameter in model.parameters():
        if not parameter.any() and parameter.dim() > 1:  # a head of zeros, which proves nothing
            nn.init.normal_(parameter, std=0.02)
    loader = [(torch.randn(2, *network.shape), torch.tensor([0, 1])) for _ in range(2)]
    config = pfs.SearchConfig(epochs=1, scope="all", backend="reference", precision="fp32")
    floor = 0.9 if name in FLOORS else 0.6
    result = pfs.search(model, loader, floor, config=config, progress=False)
    structure = result.structure
    assert structure.macs <= floor * structure.base_macs
    narrow = result.slim(weights="inherit")
    x = torch.zeros(2, *network.shape)
    report = pfs.verify(model, narrow, structure, x, trials=1)
    assert report.max_error < 1e-9
    cost = pfs.count(narrow, x[:1])
    assert (cost.macs, cost.params) == (structure.macs, structure.params)
    assert "held whole" in result.report()
    with torch.no_grad():
        logits = result.slim().eval()(torch.randn(2, *network.shape))
    assert logits.shape == (2, logits.size(1)) and bool(logits.isfinite().all())
