from __future__ import annotations

import copy
import math

import pytest
import torch
import torchvision
from torch import nn

from benchmarks.footprint import peak_bytes
from pfs_fast.errors import ConfigError, ModelError, StructureError
from pfs_fast.slim import narrow_to, slim
from pfs_fast.structure import Structure


def structure(layers: dict, inputs: dict, widths: dict) -> Structure:
    """A structure by its layers alone; costs do not matter here."""
    return Structure({}, {}, layers, inputs, widths, 1, 1, 2, 2)


class Net(nn.Module):
    """Convolution, batch norm, grouped and depthwise convolutions, flatten, linear."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(8)
        self.grouped = nn.Conv2d(8, 12, 3, padding=1, groups=2)
        self.depthwise = nn.Conv2d(12, 24, 3, padding=1, groups=12)
        self.fc = nn.Linear(24 * 4, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.grouped(torch.relu(self.bn(self.conv(x))))
        return self.fc(torch.relu(self.depthwise(x)).flatten(1))


CONV = (1, 3, 4, 6)  # two of each group of `grouped`
GROUPED = (0, 2, 5, 6, 9, 10)
DEPTHWISE = tuple(2 * c + i for c in GROUPED for i in range(2))
FC = tuple(4 * c + i for c in DEPTHWISE for i in range(4))
NET = structure(
    {"conv": CONV, "bn": CONV, "grouped": GROUPED, "depthwise": DEPTHWISE},
    {"grouped": CONV, "depthwise": GROUPED, "fc": FC},
    {"conv": (3, 8), "bn": (8, 8), "grouped": (8, 12), "depthwise": (12, 24), "fc": (96, 5)},
)


def without_dropped(model: nn.Module, s: Structure) -> nn.Module:
    """A copy whose dropped output channels are 0 for every input: an independent mask, in the weights."""
    masked = copy.deepcopy(model)
    for name, kept in s.layers.items():
        module = masked.get_submodule(name)
        dropped = [c for c in range(s.widths[name][1]) if c not in kept]
        for tensor in (module.weight, module.bias):
            if tensor is not None:
                tensor.data[dropped] = 0
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean[dropped] = 0
    return masked


def test_inherited_slim_equals_the_masked_network():
    model = Net().double().eval()
    nn.init.normal_(model.bn.bias)
    nn.init.normal_(model.bn.running_mean)
    x = torch.randn(3, 3, 2, 2, dtype=torch.float64)
    torch.testing.assert_close(
        slim(model, NET, "inherit")(x), without_dropped(model, NET)(x), rtol=1e-12, atol=1e-12
    )


def test_slim_changes_the_attributes_of_its_modules():
    narrow = slim(Net(), NET)
    assert (narrow.conv.in_channels, narrow.conv.out_channels, narrow.bn.num_features) == (3, 4, 4)
    assert (narrow.grouped.in_channels, narrow.grouped.out_channels, narrow.grouped.groups) == (
        4,
        6,
        2,
    )
    assert (
        narrow.depthwise.in_channels,
        narrow.depthwise.out_channels,
        narrow.depthwise.groups,
    ) == (6, 12, 6)
    assert (narrow.fc.in_features, narrow.fc.out_features) == (48, 5)
    assert narrow.grouped.weight.shape == (6, 2, 3, 3) and narrow.depthwise.weight.shape == (
        12,
        1,
        3,
        3,
    )
    assert narrow.bn.running_mean.shape == narrow.bn.weight.shape == (4,)
    assert type(narrow) is Net and type(narrow.conv) is nn.Conv2d
    assert Structure.from_json(narrow.pfs_structure) == NET


def test_slim_leaves_the_model_alone():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    rng = torch.get_rng_state()
    slim(model, NET, "inherit")
    assert torch.equal(rng, torch.get_rng_state())
    slim(model, NET)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert model.conv.out_channels == 8 and not hasattr(model, "pfs_structure")


@pytest.mark.parametrize("weights", ["fresh", "inherit"])
def test_slim_keeps_mode_dtype_layout_hooks_and_requires_grad(weights):
    model = Net().to(torch.bfloat16).to(memory_format=torch.channels_last)
    model.bn.eval()
    model.conv.weight.requires_grad_(False)
    calls = []
    model.conv.register_forward_hook(lambda *args: calls.append(1))
    narrow = slim(model, NET, weights)
    assert narrow.training and not narrow.bn.training
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    assert narrow.conv.weight.stride() == (27, 1, 9, 3) and narrow.grouped.weight.stride() == (
        18,
        1,
        6,
        2,
    )
    assert not narrow.conv.weight.requires_grad and narrow.grouped.weight.requires_grad
    narrow(torch.zeros(2, 3, 2, 2, dtype=torch.bfloat16))
    assert calls == [1]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_slim_keeps_the_layout_of_pointwise_weights(layout):
    model = nn.Sequential(nn.Conv2d(4, 6, 1)).to(memory_format=layout)
    s = structure({"0": (0, 2, 5)}, {}, {"0": (4, 6)})
    expected = torch.empty(3, 4, 1, 1).to(memory_format=layout).stride()
    assert slim(model, s, "inherit")[0].weight.stride() == expected


def test_slim_weights_do_not_share_memory_with_the_model():
    model = Net()
    narrow = slim(model, structure({}, {"fc": tuple(range(96))}, {"fc": (96, 5)}), "inherit")
    narrow.fc.weight.data.zero_()
    narrow.conv.weight.data.zero_()
    assert model.fc.weight.any() and model.conv.weight.any()


def test_slim_takes_no_more_memory_than_the_slim_network():
    model = nn.Sequential(nn.Linear(512, 2048), nn.Linear(2048, 512))
    kept = tuple(range(0, 2048, 4))
    s = structure({"0": kept}, {"1": kept}, {"0": (512, 2048), "1": (2048, 512)})
    sizes = [p.numel() * 4 for p in slim(model, s, "inherit").parameters()]
    peak = peak_bytes(lambda: slim(model, s, "inherit"), torch.device("cpu"))
    assert peak < 1.6 * sum(sizes)  # and one weight with two of its dimensions to take


def test_slim_copies_what_it_does_not_narrow():
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(6, 4)
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.scale

    model = nn.Sequential(nn.Linear(3, 6), Scaled(), nn.Linear(4, 2))
    kept = (1, 4)
    s = structure({"0": kept}, {"1": kept}, {"0": (3, 6), "1": (6, 4)})
    mine = {p.data_ptr() for p in model.parameters()}
    assert not mine & {p.data_ptr() for p in slim(model, s, "inherit").parameters()}


def test_a_refused_cut_leaves_the_model_alone():
    model = Net()
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    with pytest.raises(StructureError):  # channels 0 and 1 are of one group
        slim(model, structure({"grouped": (0, 1)}, {}, {"grouped": (8, 12)}))
    for name, parameter in model.named_parameters():
        assert parameter is before[name][0] and torch.equal(parameter, before[name][1])


@pytest.mark.parametrize(
    ("conv", "bn", "x"),
    [
        (nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6, affine=False), torch.randn(2, 3, 8)),
        (nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, track_running_stats=False), torch.randn(2, 3, 5, 5)),
        (nn.Conv3d(3, 6, 3, bias=False), nn.BatchNorm3d(6), torch.randn(2, 3, 4, 4, 4)),
        (nn.Linear(3, 6, bias=False), nn.BatchNorm1d(6), torch.randn(4, 3)),
    ],
)
def test_slim_narrows_every_dimension_and_optional_tensors(conv, bn, x):
    model = nn.Sequential(conv, bn).eval().double()
    kept = (0, 3, 4)
    s = structure({"0": kept, "1": kept}, {}, {"0": (3, 6), "1": (6, 6)})
    expected = model(x.double())[:, list(kept)]
    torch.testing.assert_close(
        slim(model, s, "inherit")(x.double()), expected, rtol=1e-12, atol=1e-12
    )


def test_grouped_convolution_may_lose_outputs_with_one_input_left_per_group():
    # As many inputs as groups looks depthwise, but the inputs all stay.
    model = nn.Sequential(nn.Conv2d(4, 12, 1, groups=4)).double()
    kept = (0, 2, 3, 4, 7, 8, 9, 11)
    narrow = slim(model, structure({"0": kept}, {}, {"0": (4, 12)}), "inherit")
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(narrow(x), model(x)[:, list(kept)], rtol=1e-12, atol=1e-12)
    entry = {"kind": "conv", "in": 4, "out": 8, "groups": 4}
    assert narrow_to(model, {"0": entry})[0].weight.shape == (8, 1, 1, 1)


def test_slim_of_a_slim_network_is_the_slim_network_of_both():
    model = Net().double().eval()
    half = slim(model, NET, "inherit")
    again = structure(
        {"conv": (0, 2), "bn": (0, 2), "grouped": (1, 5), "depthwise": (2, 3, 10, 11)},
        {
            "grouped": (0, 2),
            "depthwise": (1, 5),
            "fc": tuple(4 * c + i for c in (2, 3, 10, 11) for i in range(4)),
        },
        {"conv": (3, 4), "bn": (4, 4), "grouped": (4, 6), "depthwise": (6, 12), "fc": (48, 5)},
    )
    x = torch.randn(2, 3, 2, 2, dtype=torch.float64)
    masked = without_dropped(half, again)
    torch.testing.assert_close(slim(half, again, "inherit")(x), masked(x), rtol=1e-12, atol=1e-12)


def test_slim_keeps_modules_and_parameters_shared():
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(4, 4, 1)
            self.b = self.a
            self.c = nn.Conv2d(4, 4, 1)
            self.c.weight = self.a.weight

    kept = (0, 3)
    both = {"a": kept, "b": kept, "c": kept}
    narrow = slim(Twice(), structure(both, both, dict.fromkeys(both, (4, 4))))
    assert narrow.a is narrow.b and narrow.c.weight is narrow.a.weight
    assert narrow.a.weight.shape == (2, 2, 1, 1)
    with pytest.raises(
        StructureError, match="slim: layer b must keep the same channels under all its names"
    ):
        slim(Twice(), structure({"a": kept, "b": (0, 1)}, {}, {"a": (4, 4), "b": (4, 4)}))
    with pytest.raises(
        StructureError, match="layers that share a parameter must keep the same channels"
    ):
        slim(Twice(), structure({"a": kept, "c": (0, 1)}, {}, {"a": (4, 4), "c": (4, 4)}))
    with pytest.raises(
        StructureError,
        match=r"parameter c.weight must not be shared with a layer that is narrowed diff",
    ):
        slim(Twice(), structure({"a": kept}, {}, {"a": (4, 4)}))


def broken(**changes: dict) -> Structure:
    tables = {"layers": NET.layers, "inputs": NET.inputs, "widths": NET.widths}
    return structure(**{key: {**table, **changes.get(key, {})} for key, table in tables.items()})


@pytest.mark.parametrize(
    ("s", "text"),
    [
        (
            broken(layers={"gone": (0,)}, widths={"gone": (3, 8)}),
            "layer gone must be a convolution.* no such module",
        ),
        (
            broken(widths={"conv": (3, 16)}),
            r"layer conv must have \(in, out\) = \(3, 16\) channels, got \(3, 8\)",
        ),
        (
            broken(layers={"conv": (0, 8)}),
            r"kept output channels of layer conv must be in 0\.\.7, got \(0, 8\)",
        ),
        (
            broken(inputs={"fc": ()}),
            r"kept input channels of layer fc must be in 0\.\.95, got \(\)",
        ),
        (
            broken(layers={"grouped": (0, 1, 2, 6)}),
            r"layer grouped must keep equally many output channels .* got \[3, 1\]",
        ),
        (
            broken(inputs={"grouped": (0, 1, 4)}),
            r"layer grouped must keep equally many input channels .* got \[2, 1\]",
        ),
        (
            broken(layers={"depthwise": (0, 1, 2, 4)}),
            "layer depthwise must keep equally many output channels of each of its inputs that it keeps, and of no",
        ),
    ],
)
def test_slim_names_the_layer_that_does_not_fit(s, text):
    with pytest.raises(StructureError, match=f"slim: .*{text}"):
        slim(Net(), s)


def test_slim_refuses_computed_weights():
    model = Net()
    nn.utils.parametrizations.weight_norm(model.conv)
    with pytest.raises(
        StructureError, match="slim: layer conv must hold its weight as a plain parameter"
    ):
        slim(model, NET)


def test_slim_refuses_wrappers_and_unknown_options():
    with pytest.raises(
        ModelError, match=r"slim: model must be a plain module, got DataParallel; pass model.module"
    ):
        slim(nn.DataParallel(Net()), NET)
    with pytest.raises(ModelError, match="slim: model must be uncompiled"):
        slim(torch.compile(Net()), NET)
    with pytest.raises(ConfigError, match="slim: weights must be 'fresh' or 'inherit', got 'copy'"):
        slim(Net(), NET, "copy")
    with pytest.raises(
        ConfigError, match="slim: example_input must be given with verify=True, got None"
    ):
        slim(Net(), NET, verify=True)


def test_slim_verifies_on_request():
    x = torch.zeros(2, 3, 2, 2)
    slim(Net(), NET, verify=True, example_input=x)
    with pytest.raises(StructureError, match="verify: slim network must equal the masked network"):
        slim(Net(), broken(layers={"bn": (1, 3, 4, 7)}), verify=True, example_input=x)


# ---- fresh weights ----------------------------------------------------------------------------------------------


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


# ---- narrow_to --------------------------------------------------------------------------------------------------


def entries(model: nn.Module) -> dict:
    return {
        "conv": {
            "kind": "conv",
            "in": model.conv.in_channels,
            "out": model.conv.out_channels,
            "groups": 1,
        },
        "bn": {
            "kind": "bn",
            "in": model.bn.num_features,
            "out": model.bn.num_features,
            "groups": 1,
        },
        **{
            name: {
                "kind": "conv",
                "in": conv.in_channels,
                "out": conv.out_channels,
                "groups": conv.groups,
            }
            for name, conv in (("grouped", model.grouped), ("depthwise", model.depthwise))
        },
        "fc": {
            "kind": "linear",
            "in": model.fc.in_features,
            "out": model.fc.out_features,
            "groups": 1,
        },
    }


def test_narrow_to_takes_the_state_of_a_slim_network():
    model = Net()
    trained = slim(model, NET)
    narrow = narrow_to(model, entries(trained))
    narrow.load_state_dict(trained.state_dict())
    x = torch.randn(2, 3, 2, 2)
    assert torch.equal(narrow.eval()(x), trained.eval()(x))
    assert model.conv.out_channels == 8


@pytest.mark.parametrize(
    ("name", "changes", "text"),
    [
        (
            "conv",
            {"kind": "linear"},
            "layer conv must be a linear layer, got Conv2d; pass a model of the original class",
        ),
        ("conv", {"out": 9}, "layer conv must have at least 3 inputs and 9 outputs, got 3 and 8"),
        (
            "grouped",
            {"out": 5},
            "layer grouped must have 2 groups that divide its channels, got in 4, out 5",
        ),
        ("gone", {"kind": "conv"}, "layer gone must be a conv layer, got no such module"),
        (
            "depthwise",
            {"out": 13},
            "layer depthwise must have 6 groups that divide its channels, got in 6",
        ),
    ],
)
def test_narrow_to_names_the_layer_that_does_not_fit(name, changes, text):
    layers = entries(slim(Net(), NET))
    layers[name] = {**layers.get(name, {}), **changes}
    with pytest.raises(StructureError, match=f"narrow_to: {text}"):
        narrow_to(Net(), layers)
