"""Folding batch norms: the same outputs from plain modules, and nothing folded that another reader would miss."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn

import pfs_fast as pfs
from pfs_fast.errors import ConfigError, ModelError


def shaken(network: nn.Module) -> nn.Module:
    """With norms that are far from the identity."""
    for module in network.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            if module.running_mean is not None:
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias)
    return network.eval()


def norms(network: nn.Module) -> int:
    return sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in network.modules())


def assert_same_outputs(network: nn.Module, x: torch.Tensor, rtol: float = 1e-5) -> nn.Module:
    before = copy.deepcopy(network.state_dict())
    folded = pfs.fold(network, x)
    with torch.no_grad():
        want, got = network(x), folded(x)
    assert (want - got).abs().max() <= rtol * want.abs().max()
    assert type(folded) is type(network) and not folded.training
    assert all(torch.equal(before[k], v) for k, v in network.state_dict().items())
    return folded


@pytest.mark.parametrize(
    ("build", "size", "left"),
    [
        (torchvision.models.resnet18, 64, 0),
        (torchvision.models.mobilenet_v2, 64, 0),
        (torchvision.models.vgg11_bn, 64, 0),
        (pfs.models.resnet20, 32, 0),
        (torchvision.models.densenet121, 64, 62),  # norms before their convolution stay
    ],
)
def test_folded_networks_give_the_same_outputs(build, size, left):
    network = shaken(build())
    folded = assert_same_outputs(network, torch.randn(2, 3, size, size))
    assert norms(folded) == left < norms(network)


def test_slim_networks_know_their_example_input():
    batch = (torch.randn(8, 3, 32, 32), torch.randint(10, (8,)))
    config = pfs.SearchConfig(max_steps=2, backend="reference", precision="fp32")
    result = pfs.search(pfs.models.resnet20(), [batch], 0.5, config=config, progress=False)
    network = shaken(result.slim(seed=0))
    folded = pfs.fold(network)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(folded(x), network(x), rtol=1e-4, atol=1e-4)
    assert norms(folded) == 0


@pytest.mark.parametrize(
    "layers",
    [
        [nn.ConvTranspose2d(3, 6, 3, stride=2, groups=3), nn.BatchNorm2d(6)],
        [nn.Conv2d(3, 6, 3, groups=3, bias=False), nn.BatchNorm2d(6, affine=False)],
        [nn.Conv2d(3, 6, 3), torchvision.ops.FrozenBatchNorm2d(6)],
        [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 5), nn.BatchNorm1d(5)],
    ],
    ids=["transposed", "grouped", "frozen", "linear"],
)
def test_every_kind_of_layer_takes_its_norm(layers):
    torch.manual_seed(0)
    network = shaken(nn.Sequential(*layers)).double()
    folded = assert_same_outputs(network, torch.randn(4, 3, 8, 8, dtype=torch.float64), 1e-12)
    assert isinstance(folded[-1], nn.Identity)


class Fork(nn.Module):
    """The convolution's output has a reader besides the norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.norm(y) + y


class Shared(Fork):
    """One convolution runs before two norms."""

    def __init__(self):
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x)) + self.other(self.conv(x))


class Read(Fork):
    """The forward reads the weight itself, too."""

    def forward(self, x):
        return self.norm(self.conv(x)) * self.conv.weight.mean()


@pytest.mark.parametrize("kind", [Fork, Shared, Read])
def test_layers_with_another_reader_keep_their_norm(kind):
    network = shaken(kind())
    folded = assert_same_outputs(network, torch.randn(2, 3, 4, 4))
    assert norms(folded) == norms(network)


def test_norms_without_statistics_stay():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)).eval()
    assert norms(assert_same_outputs(network, torch.randn(2, 3, 4, 4))) == 1


def test_tied_weights_keep_their_norms():
    network = nn.Sequential(
        nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
    )
    network[2].weight = network[0].weight
    assert norms(assert_same_outputs(shaken(network), torch.randn(2, 3, 4, 4))) == 2


def test_fold_names_what_is_missing():
    with pytest.raises(ConfigError, match="fold: example_input must be given"):
        pfs.fold(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(ModelError, match="fold: model must be a plain module"):
        pfs.fold(nn.DataParallel(nn.Conv2d(3, 4, 1)))


def test_folded_networks_are_exported(tmp_path):
    network = shaken(pfs.models.resnet20())
    x = torch.zeros(1, 3, 32, 32)
    report = pfs.export(pfs.fold(network, x), tmp_path / "folded.pt2", x)
    program = torch.export.load(tmp_path / "folded.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    with torch.no_grad():
        images = torch.randn(4, 3, 32, 32)
        torch.testing.assert_close(program.module()(images), network(images), rtol=1e-4, atol=1e-4)
    assert report.max_error <= 1e-4
