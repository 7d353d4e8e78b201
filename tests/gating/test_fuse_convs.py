"""Which convolutions and norms a search network joins, and whose input they pass on."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import Tensor, nn

import pfs_fast as pfs
from benchmarks.footprint import saved_bytes
from pfs_fast import ops
from pfs_fast.gating import fuse_convs
from pfs_fast.gating.gated_layers import (
    BranchedConv,
    BranchedConvNorm,
    ChainedConvNorm,
    FrozenConv,
    FusedNorm,
    RecomputedConvNorm,
)
from pfs_fast.searching.plan import prepare


class Branches(nn.Module):
    """One tensor with three readers, two of them convolutions with norms."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.a_norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.b_norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.fc = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.stem_norm(self.stem(x)))
        a, b = torch.relu(self.a_norm(self.a(x))), torch.relu(self.b_norm(self.b(x)))
        return self.fc((a + b + x).mean((2, 3)))


class Downsampling(nn.Module):
    """Two paths to smaller images, whose input somebody may overwrite between its two readers.

    Args:
        overwritten: Rectify it in place after the first convolution.
        shortcut_first: Let the shortcut read it first.
    """

    def __init__(self, overwritten: bool = False, shortcut_first: bool = False) -> None:
        super().__init__()
        self.overwritten, self.shortcut_first = overwritten, shortcut_first
        self.stem, self.stem_norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.a_norm = nn.Conv2d(16, 24, 3, stride=2, padding=1), nn.BatchNorm2d(24)
        self.short, self.short_norm = nn.Conv2d(16, 24, 1, stride=2), nn.BatchNorm2d(24)
        self.fc = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem_norm(self.stem(x))
        shortcut = self.short_norm(self.short(x)) if self.shortcut_first else None
        a = torch.relu(self.a_norm(self.a(x)))
        if self.overwritten:
            x.relu_()
        if shortcut is None:
            shortcut = self.short_norm(self.short(x))
        return self.fc(torch.cat((a, shortcut), 1).mean((2, 3)))


def prepared(model: nn.Module, images: Tensor):
    config = pfs.SearchConfig(scope="all", precision="fp32", compact=False)
    return prepare(model, images, pfs.Budget(0.5), config, device=torch.device("cpu")).loop


def test_every_reader_but_the_last_passes_its_input_on() -> None:
    net = prepared(Branches(), torch.randn(8, 3, 16, 16)).network.train_net
    calls = [node for node in net.graph.nodes if node.op == "call_module"]
    kinds = [type(net.get_submodule(node.target)) for node in calls]
    # The images have one reader, the stem.
    assert kinds == [RecomputedConvNorm, BranchedConvNorm, BranchedConvNorm, nn.Linear]
    assert calls[2].args[0].args == (calls[1], 1)


@pytest.mark.parametrize("model", [Branches, lambda: pfs.models.resnet20(expansion=0.5)])
def test_gradients_stay_what_they_are(model, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images, labels = model(), torch.randn(16, 3, 16, 16), torch.randint(10, (16,))
    grads = []
    for passes in (True, False):
        if not passes:
            monkeypatch.setattr(fuse_convs, "_pass_inputs_on", lambda *args: None)
        loop = prepared(network, images)
        loop.state.gates.values.copy_(torch.linspace(0.3, 1.0, loop.num_gates))
        loop.bank.zero_grad()
        nn.functional.cross_entropy(loop.network(loop.place(images)), labels).backward()
        grads.append(loop.bank.grad.clone())
    assert grads[1].norm() > 0
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("layer", "pays"),
    [
        (nn.Conv2d(3, 64, 3, padding=1), True),  # images
        (nn.Conv2d(3, 64, 7, stride=2, padding=3), True),
        (nn.Conv2d(3, 12, 3, stride=2, padding=1), False),  # no smaller than what it reads
        (nn.Conv2d(16, 32, 1, stride=2), True),  # shortcuts
        (nn.Conv2d(64, 256, 1), True),
        (nn.Conv2d(1024, 2048, 1, stride=2), False),  # much work for what it saves
        (nn.Conv2d(64, 64, 1), False),
    ],
    ids=str,
)
def test_recomputes_what_is_cheap(layer: nn.Conv2d, pays: bool) -> None:
    assert RecomputedConvNorm(FrozenConv(layer, ops), nn.Identity(), ops).pays() is pays


def test_the_first_gated_layer_of_a_deep_network_keeps_the_images() -> None:
    nets = [
        prepare(
            model,
            torch.randn(8, 3, 16, 16),
            pfs.Budget(0.5),
            pfs.SearchConfig(precision="fp32"),
            device=torch.device("cpu"),
        ).loop.network.train_net
        for model in (pfs.models.resnet56(), pfs.models.resnet20())
    ]
    chained = [[m for m in net.modules() if type(m) is ChainedConvNorm] for net in nets]
    assert [len(found) for found in chained] == [1, 0]


@pytest.mark.parametrize("track", [False, True])
def test_chained_layers_change_no_gradient(track: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    network, images = pfs.models.resnet20(expansion=0.5), torch.randn(16, 3, 16, 16)
    labels = torch.randint(10, (16,))
    grads, statistics, kept = [], [], []
    for least in (10**9, 0):
        monkeypatch.setattr(fuse_convs, "MANY_CONVS", least)
        config = pfs.SearchConfig(precision="fp64", compact=False)
        options = {"device": torch.device("cpu"), "track_stats": track}
        loop = prepare(copy.deepcopy(network), images, pfs.Budget(0.5), config, **options).loop
        loop.state.gates.values.copy_(torch.linspace(0.3, 1.0, loop.num_gates))
        placed = loop.place(images)
        kept.append(saved_bytes(lambda: loop.network(placed), without=loop.network.parameters()))  # noqa: B023
        loop.bank.zero_grad()
        nn.functional.cross_entropy(loop.network(placed), labels).backward()
        grads.append(loop.bank.grad.clone())
        norms = (m for m in loop.network.modules() if isinstance(m, nn.BatchNorm2d))
        statistics.append(torch.cat([norm.running_mean for norm in norms]))
    assert kept[0] - kept[1] == 16 * 8 * 16 * 16 * 8 - images.numel() * 8
    assert grads[0].norm() > 0
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(*statistics, rtol=1e-12, atol=1e-12)
    assert statistics[0].any() == track


def test_shortcuts_and_the_first_layer_are_recomputed() -> None:
    net = prepared(pfs.models.resnet20(), torch.randn(8, 3, 32, 32)).network.train_net
    again = [name for name, m in net.named_modules() if type(m) is RecomputedConvNorm]
    assert len(again) == 3  # the stem, and the shortcuts of two stages


@pytest.mark.parametrize(
    ("model", "branched"),
    [
        (lambda: pfs.models.resnet20(), 2),
        (lambda: torchvision.models.resnet50(), 3),
        (Downsampling, 1),
        (lambda: Downsampling(overwritten=True), 0),
        (lambda: Downsampling(shortcut_first=True), 0),
    ],
    ids=["resnet20", "resnet50", "block", "overwritten", "shortcut first"],
)
def test_shortcuts_take_their_pixels_from_the_convolution_beside_them(model, branched: int) -> None:
    net = prepared(model(), torch.randn(2, 3, 64, 64)).network.train_net
    assert sum(type(m) is BranchedConv for m in net.modules()) == branched


@pytest.mark.parametrize(
    "model",
    [
        Downsampling,
        lambda: Downsampling(overwritten=True),
        lambda: pfs.models.resnet20(expansion=0.5),
    ],
    ids=["block", "overwritten", "resnet20"],
)
@pytest.mark.parametrize("evaluated", [False, True])
def test_pixels_passed_on_change_nothing(
    model, evaluated: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    network, images = model(), torch.randn(8, 3, 16, 16)
    labels = torch.randint(10, (8,))
    grads = []
    for passes in (True, False):
        if not passes:
            monkeypatch.setattr(fuse_convs, "_pass_pixels_on", lambda *args: None)
        config = pfs.SearchConfig(scope="all", precision="fp64", compact=False)
        prepare_on = {"config": config, "device": torch.device("cpu")}
        loop = prepare(copy.deepcopy(network), images, pfs.Budget(0.5), **prepare_on).loop
        loop.state.gates.values.copy_(torch.linspace(0.3, 1.0, loop.num_gates))
        loop.bank.zero_grad()
        net = loop.network.eval() if evaluated else loop.network
        nn.functional.cross_entropy(net(loop.place(images)), labels).backward()
        grads.append(loop.bank.grad.clone())
    assert grads[1].norm() > 0
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_replaced_parts_leave_the_network() -> None:
    net = prepared(pfs.models.resnet20(), torch.randn(8, 3, 32, 32)).network.train_net
    called = {node.target for node in net.graph.nodes if node.op == "call_module"}
    kinds = (FrozenConv, FusedNorm, RecomputedConvNorm, BranchedConv, BranchedConvNorm)
    outer = {
        name for name, m in net.named_modules() if name.count(".") == 1 and isinstance(m, kinds)
    }
    assert outer and outer <= called


def test_evaluation_passes_inputs_on_too() -> None:
    loop = prepared(Branches(), torch.randn(8, 3, 16, 16))
    network, images = loop.network, loop.place(torch.randn(4, 3, 16, 16))
    network(images)
    network.eval()
    assert network(images).shape == (4, 10)
