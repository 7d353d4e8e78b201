"""Fresh weights of a slim network: drawn as its class would draw them at this width."""

from __future__ import annotations

import math

import pytest
import torch
import torchvision
from slim_cases import NET, Net, structure
from torch import nn

from pfs_fast.budgets.structure import Structure
from pfs_fast.slimming.slim import slim


def halves(model: nn.Module) -> Structure:
    """A ResNet's inner widths halved: first convolution and batch norm of every basic block."""
    layers, inputs, widths = {}, {}, {}
    for name, module in model.named_modules():
        if isinstance(module, torchvision.models.resnet.BasicBlock):
            width = module.conv1.out_channels
            kept = tuple(range(0, width, 2))
            layers |= {f"{name}.conv1": kept, f"{name}.bn1": kept}
            inputs[f"{name}.conv2"] = kept
            widths |= {
                f"{name}.conv1": (module.conv1.in_channels, width),
                f"{name}.bn1": (width, width),
            }
            widths[f"{name}.conv2"] = (width, module.conv2.out_channels)
    return structure(layers, inputs, widths)


def test_fresh_resnet_is_drawn_for_its_slim_width():
    model = torchvision.models.resnet18(num_classes=10)
    nn.init.constant_(model.layer1[0].bn1.weight, 3.0)
    narrow = slim(model, halves(model))
    for block in (narrow.layer3[0], narrow.layer4[1]):
        for conv in (block.conv1, block.conv2):
            expected = math.sqrt(2 / (9 * conv.out_channels))
            assert abs(conv.weight.std().item() / expected - 1) < 0.02
            assert abs(conv.weight.mean().item()) < 0.02 * expected
    assert (narrow.layer1[0].bn1.weight == 1).all() and (narrow.layer1[0].bn1.bias == 0).all()
    assert narrow.fc.weight.abs().max() <= 1 / math.sqrt(512) < narrow.fc.weight.abs().max() * 1.01


def test_fresh_weights_have_nothing_of_the_old_ones():
    model = torchvision.models.resnet18(num_classes=10)
    fresh, inherited = slim(model, halves(model)), slim(model, halves(model), "inherit")
    for name in ("layer4.0.conv1", "layer1.0.conv2", "conv1", "fc"):
        pair = torch.stack([net.get_submodule(name).weight.flatten() for net in (fresh, inherited)])
        assert abs(torch.corrcoef(pair)[0, 1]) < 0.05


def small_vgg() -> nn.Module:
    features = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU(), nn.Conv2d(64, 64, 3)
    )
    net = torchvision.models.VGG(features, num_classes=9)
    net.classifier = nn.Sequential(nn.Linear(64 * 49, 16), nn.ReLU(), nn.Linear(16, 9))
    return net


FAMILIES = {
    "vgg conv": (small_vgg, "features.3", math.sqrt(2 / (9 * 64))),
    "vgg linear": (small_vgg, "classifier.0", 0.01),
    "mobilenet linear": ("mobilenet_v2", "classifier.1", 0.01),
    "mobilenet conv": ("mobilenet_v2", "features.18.0", math.sqrt(2 / 1280)),
    "mobilenet v3": ("mobilenet_v3_small", "classifier.0", 0.01),
    "efficientnet": ("efficientnet_b0", "classifier.1", 0.1 / math.sqrt(3)),
    "squeezenet last": ("squeezenet1_1", "classifier.1", 0.01),
    "squeezenet": ("squeezenet1_1", "features.12.expand3x3", math.sqrt(2 / (9 * 64))),
    "densenet": ("densenet121", "features.conv0", math.sqrt(2 / 147)),
    "regnet": ("regnet_x_400mf", "trunk_output.block4.block4-1.f.b.0", math.sqrt(2 / (9 * 400))),
    "mnasnet": ("mnasnet0_5", "classifier.1", math.sqrt(1 / 100)),
    "googlenet": ("googlenet", "conv3.conv", 0.01),
    "inception": ("inception_v3", "fc", 0.1),
    "inception auxiliary": ("inception_v3", "AuxLogits.fc", 0.001),
    "convnext": ("convnext_tiny", "classifier.2", 0.02),
    "shufflenet, by its leaves": ("shufflenet_v2_x0_5", "conv5.0", 1 / math.sqrt(3 * 192)),
}


@pytest.mark.filterwarnings("ignore:slim. no initialiser is known for .*layer_scale:UserWarning")
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_weights_follow_the_rule_of_the_family(family):
    build, layer, std = FAMILIES[family]
    if isinstance(build, str):
        skip = {"init_weights": False} if build in ("googlenet", "inception_v3") else {}
        model = getattr(torchvision.models, build)(num_classes=100, **skip)
    else:
        model = build()
    old, fresh = model.get_submodule(layer), slim(model, structure({}, {}, {})).get_submodule(layer)
    assert abs(fresh.weight.std().item() / std - 1) < 0.06
    assert not torch.equal(fresh.weight, old.weight)


def test_fresh_uses_the_method_of_the_class_after_its_leaves():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
            self.reset_parameters()

        def reset_parameters(self) -> None:
            nn.init.constant_(self.bn.weight, 0.5)

    kept = (1, 2)
    model = Own()
    nn.init.constant_(model.bn.weight, 9)
    nn.init.constant_(model.bn.running_mean, 9)
    nn.init.constant_(model.conv.weight, 9)
    narrow = slim(model, structure({"conv": kept, "bn": kept}, {}, {"conv": (3, 8), "bn": (8, 8)}))
    assert (narrow.bn.weight == 0.5).all() and (narrow.bn.running_mean == 0).all()
    assert narrow.conv.weight.abs().max() <= 1 / math.sqrt(27)


def test_fresh_applies_an_initialiser_that_takes_modules():
    class Applied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def _init_weights(self, module: nn.Module) -> None:
            if isinstance(module, nn.Conv2d):
                nn.init.constant_(module.weight, 0.25)

    assert (slim(Applied(), structure({}, {}, {})).conv.weight == 0.25).all()


def test_fresh_names_parameters_that_it_cannot_draw():
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.full((4,), 7.0))

    with pytest.warns(
        UserWarning, match="no initialiser is known for 1.scale; they keep the model's values"
    ):
        narrow = slim(nn.Sequential(nn.Conv2d(3, 4, 1), Scale()), structure({}, {}, {}))
    assert (narrow[1].scale == 7).all()


def test_seed_fixes_the_fresh_weights_and_spares_the_global_state():
    model, state = Net(), torch.get_rng_state()
    first, second, other = (slim(model, NET, seed=seed).conv.weight for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(state, torch.get_rng_state())
