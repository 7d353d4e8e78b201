"""The paper's networks: sizes, widths under expansion, gates, initialisation; networks by name."""

from __future__ import annotations

import functools
import math
import sys
import types

import pytest
import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pfs_fast import models
from pfs_fast.errors import BackendError, ConfigError, ModelError
from pfs_fast.models.registry import is_listed

# What the official code builds and counts (commit 3102332): MACs in M with average-pool inputs, as it counts them (it does
# not see VGG's pool), parameters in M, number of gate groups, gated channels, gated channels and MACs at expansion 1.25.
TABLE = {
    "vgg16": ("313.20", "14.724", 13, 4224, 5280, "1.561"),
    "vgg19": ("398.14", "20.035", 16, 5504, 6880, "1.561"),
    "resnet20": ("40.82", "0.272", 9, 336, 420, "1.56"),
    "resnet32": ("69.13", "0.467", 15, 560, 700, "1.56"),
    "resnet44": ("97.44", "0.661", 21, 784, 980, "1.56"),
    "resnet56": ("125.75", "0.856", 27, 1008, 1260, "1.56"),
    "resnet110": ("253.15", "1.731", 54, 2016, 2520, "1.56"),
    "resnet50": ("4089.28", "25.557", 32, 7552, 9440, "1.362"),
    "mobilenet_v1": ("568.79", "4.232", 14, 5984, 7480, "1.546"),
    "mobilenet_v2": ("300.84", "3.505", 18, 8416, 10520, "1.250"),
}
POOL_NOT_COUNTED = ("vgg16", "vgg19")

mode = FakeTensorMode()


@functools.cache
def build_fake(name: str, **kwargs) -> nn.Module:
    """The network without storage; shared between tests, which only look at it."""
    with mode:
        return models.get(name, **kwargs)


@functools.cache
def count_macs(name: str, expansion: float) -> int:
    """MACs of one image by torch's counter, plus average-pool inputs."""
    pool_inputs = 0

    def add_pool_input(module, args, output):
        nonlocal pool_inputs
        pool_inputs += args[0].numel()

    model = build_fake(name, expansion=expansion)
    pools = [m for m in model.modules() if isinstance(m, nn.AdaptiveAvgPool2d)]
    hooks = [m.register_forward_hook(add_pool_input) for m in pools if name not in POOL_NOT_COUNTED]
    with mode, FlopCounterMode(display=False) as counter:
        model(torch.empty(2, *model.input_size))
    for hook in hooks:
        hook.remove()
    return (counter.get_total_flops() // 2 + pool_inputs) // 2


def gated_channels(model: nn.Module) -> list[int]:
    modules = dict(model.named_modules())
    return [modules[name].out_channels for name in model.paper_gates()]


def test_names_list_the_table():
    assert set(models.names()) == set(TABLE)


@pytest.mark.parametrize("name", TABLE)
def test_base_macs_equal_the_official_count(name):
    assert f"{count_macs(name, 1.0) / 1e6:.2f}" == TABLE[name][0]


@pytest.mark.parametrize("name", TABLE)
def test_base_params_equal_the_official_count(name):
    params = sum(p.numel() for p in build_fake(name, expansion=1.0).parameters())
    assert f"{params / 1e6:.3f}" == TABLE[name][1]


@pytest.mark.parametrize("name", TABLE)
def test_expanded_macs_have_the_official_ratio(name):
    ratio, expected = count_macs(name, 1.25) / count_macs(name, 1.0), TABLE[name][5]
    assert f"{ratio:.{len(expected) - 2}f}" == expected


@pytest.mark.parametrize("name", TABLE)
def test_paper_gates_have_the_official_channels(name):
    _, _, groups, base, expanded, _ = TABLE[name]
    assert len(gated_channels(build_fake(name, expansion=1.0))) == groups
    assert sum(gated_channels(build_fake(name, expansion=1.0))) == base
    assert sum(gated_channels(build_fake(name, expansion=1.25))) == expanded


@pytest.mark.parametrize("name", TABLE)
def test_gated_conv_feeds_a_batch_norm_and_an_activation(name):
    graph = fx.symbolic_trace(build_fake(name, expansion=1.0)).graph
    modules = dict(build_fake(name, expansion=1.0).named_modules())
    nodes = {node.target: node for node in graph.nodes if node.op == "call_module"}
    for gate in build_fake(name, expansion=1.0).paper_gates():
        (bn,) = nodes[gate].users
        (act,) = bn.users
        assert isinstance(modules[bn.target], nn.BatchNorm2d)
        assert isinstance(modules[act.target], (nn.ReLU, nn.ReLU6))


@pytest.mark.parametrize(
    ("name", "size"), [("vgg16", 48), ("resnet20", 24), ("mobilenet_v1", 96), ("mobilenet_v2", 80)]
)
def test_forward_takes_other_image_sizes(name, size):
    model = models.get(name, num_classes=7, expansion=0.25).eval()
    x = torch.randn(2, 3, size, size - 8)
    assert model(x).shape == (2, 7)


def test_forward_keeps_bn_outputs_unchanged():
    model = models.resnet20(expansion=0.25).double()
    seen = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, args, out: seen.append((out, out.clone())))
    model(torch.randn(2, 3, 16, 16, dtype=torch.float64))
    assert seen and all(torch.equal(out, copy) for out, copy in seen)


@pytest.mark.parametrize("name", ["vgg16", "resnet20", "mobilenet_v2", "resnet50"])
def test_channels_last_stays_through_the_network(name):
    model = models.get(name, expansion=0.25).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    outputs = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda m, args, out: outputs.append(out))
    model(x)
    assert all(out.is_contiguous(memory_format=torch.channels_last) for out in outputs)


def test_vgg_batch_norm_weights_start_at_half():
    weights = [
        m.weight for m in models.vgg16(expansion=0.25).modules() if isinstance(m, nn.BatchNorm2d)
    ]
    assert len(weights) == 13
    assert all((w == 0.5).all() for w in weights)


@pytest.mark.parametrize("name", ["vgg16", "resnet20", "mobilenet_v1", "mobilenet_v2"])
def test_conv_init_has_the_fan_out_scale(name):
    for module in models.get(name, expansion=0.5).modules():
        if isinstance(module, nn.Conv2d) and module.weight.numel() > 4000:
            k = module.kernel_size[0]
            expected = math.sqrt(2.0 / (k * k * module.out_channels))
            assert module.weight.std().item() == pytest.approx(expected, rel=0.06)


def test_resnet50_init_is_kaiming_and_its_classifier_the_default():
    model = models.resnet50(num_classes=50, expansion=0.25, multiplier=0.25)
    conv = model.layer3[1].conv2
    assert conv.weight.std().item() == pytest.approx(
        math.sqrt(2.0 / (9 * conv.out_channels)), rel=0.05
    )
    bound = 1 / math.sqrt(model.fc.in_features)
    assert bound * 0.95 < model.fc.weight.abs().max().item() <= bound


@pytest.mark.parametrize("name", ["vgg16", "mobilenet_v1", "mobilenet_v2"])
def test_linear_init_is_small_with_zero_bias(name):
    classifier = models.get(name, expansion=0.5).classifier
    assert classifier.weight.std().item() == pytest.approx(0.01, rel=0.06)
    assert (classifier.bias == 0).all()


@pytest.mark.parametrize("name", TABLE)
def test_reset_parameters_rewrites_every_tensor(name):
    model = models.get(name, expansion=0.125)
    first = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(7)
    model.reset_parameters()
    for key, value in model.state_dict().items():
        assert value.shape == first[key].shape
        constant = (first[key] == first[key].flatten()[0]).all()
        if constant:
            assert torch.equal(value, first[key]), key
        else:
            assert value.float().abs().max() < 7, key


def test_multiplier_scales_block_outputs_alone():
    model = models.mobilenet_v2(multiplier=0.5)
    assert [b.project.out_channels for b in model.blocks[:4]] == [8, 12, 12, 16]
    assert gated_channels(model) == gated_channels(models.mobilenet_v2())
    resnet = build_fake("resnet50", multiplier=0.5)
    assert (resnet.conv1.out_channels, resnet.layer4[0].conv3.out_channels) == (32, 1024)
    assert gated_channels(resnet) == gated_channels(build_fake("resnet50"))


def test_mobilenet_v2_widths_truncate_like_the_official_code():
    widths = gated_channels(build_fake("mobilenet_v2", expansion=41 / 32))
    assert widths[:4] == [41, 96 * 41 // 32, 144 * 41 // 32, 144 * 41 // 32]
    assert widths[1] == 123 and widths[2] == 184


def test_mobilenet_v2_blocks_keep_their_form_when_widths_coincide():
    # Here the first block's input is as wide as its output; there the second block's input is as wide as its hidden layer.
    assert not build_fake("mobilenet_v2", expansion=0.5).blocks[0].residual
    block = build_fake("mobilenet_v2", multiplier=6.0).blocks[1]
    assert block.expand.conv.in_channels == block.expand.conv.out_channels == 96


def test_resnet50_state_fits_torchvision():
    torchvision = pytest.importorskip("torchvision")
    with FakeTensorMode():
        theirs = torchvision.models.resnet50(weights=None).state_dict()
    ours = build_fake("resnet50").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize("expansion", [0, -1.0, float("nan"), float("inf"), "1.25", None, True])
@pytest.mark.parametrize("name", ["vgg16", "resnet20", "resnet50", "mobilenet_v1", "mobilenet_v2"])
def test_bad_expansion_is_refused(name, expansion):
    with pytest.raises(ConfigError, match=f"{name}: expansion must be a finite number > 0, got"):
        models.get(name, expansion=expansion)


def test_expansion_that_leaves_no_channel_is_refused():
    with pytest.raises(
        ConfigError, match="resnet20: expansion must leave at least one channel of 16"
    ):
        models.resnet20(expansion=0.01)
    with pytest.raises(ConfigError, match="multiplier must leave at least one channel of 16"):
        models.mobilenet_v2(multiplier=0.05)


@pytest.mark.parametrize("num_classes", [0, -3, 2.0, "10", True])
def test_bad_num_classes_is_refused(num_classes):
    with pytest.raises(ConfigError, match="num_classes must be an integer >= 1, got"):
        models.vgg16(num_classes=num_classes)


def test_unknown_depth_is_refused():
    with pytest.raises(ConfigError, match="VGG: depth must be one of"):
        models.VGG(11)
    with pytest.raises(ConfigError, match="CifarResNet: depth must be 6 n"):
        models.CifarResNet(18)


def test_get_passes_arguments_on():
    assert models.get("resnet20", num_classes=100).fc.out_features == 100


def test_get_builds_torchvision_networks_without_weights():
    pytest.importorskip("torchvision")
    assert models.get("torchvision:resnet18", num_classes=3).fc.out_features == 3


def test_get_builds_networks_of_timms_list_without_weights():
    pytest.importorskip("timm")
    assert models.get("timm:test_resnet", num_classes=3).get_classifier().out_features == 3
    with pytest.raises(
        ModelError, match=r"network of timm\.list_models\(\), got .*did you mean timm:resnet26"
    ):
        models.get("timm:resnet26x")


def test_get_calls_a_function_of_timm_too():
    pytest.importorskip("timm")
    model = models.get("timm:create_model", model_name="test_resnet", num_classes=3)
    assert model.get_classifier().out_features == 3


def test_get_builds_every_kind_of_torchvision_network_without_weights():
    pytest.importorskip("torchvision")
    with mode:  # a download would need storage
        models.get("torchvision:lraspp_mobilenet_v3_large", num_classes=3)


@pytest.mark.parametrize(
    ("name", "listed"),
    [
        ("resnet20", True),
        ("resnet21", False),
        ("torchvision:resnet18", True),
        ("torchvision:get_model", False),
        ("torchvision.models:resnet18", False),
        ("os:system", False),
        (":resnet20", False),
    ],
)
def test_only_networks_of_a_list_are_listed(name, listed):
    assert is_listed(name) == listed


def test_get_imports_a_factory(monkeypatch):
    module = types.ModuleType("pfs_fast_test_zoo")
    module.tiny = lambda num_classes=2: nn.Linear(1, num_classes)
    module.number = lambda: 3
    monkeypatch.setitem(sys.modules, "pfs_fast_test_zoo", module)
    assert models.get("pfs_fast_test_zoo:tiny", num_classes=5).out_features == 5
    with pytest.raises(ModelError, match="did you mean pfs_fast_test_zoo:tiny"):
        models.get("pfs_fast_test_zoo:tinny")
    with pytest.raises(ModelError, match=r"must return a torch\.nn\.Module, got int"):
        models.get("pfs_fast_test_zoo:number")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vg16", r"got 'vg16'; did you mean vgg16"),
        ("zzz", r"got 'zzz'; see models\.names\(\)"),
        ("torchvision:resnet19", r"did you mean torchvision:resnet1"),
        ("no_such_package:net", r"got 'no_such_package:net' \(No module named"),
        (":net", r"importable module, got ':net'"),
        (3, r"name must be a string, got int"),
    ],
)
def test_get_refuses_unknown_names(name, message):
    with pytest.raises(ModelError, match=message):
        models.get(name)


def test_get_refuses_arguments_the_factory_does_not_take():
    with pytest.raises(
        ModelError, match="keyword arguments must be ones that 'mobilenet_v1' takes"
    ):
        models.get("mobilenet_v1", multiplier=2.0)


def test_get_without_torchvision_names_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(BackendError, match="needs the package torchvision"):
        models.get("torchvision:resnet18")
