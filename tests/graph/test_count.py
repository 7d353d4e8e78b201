from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from pfs_fast.errors import ModelError
from pfs_fast.graph.counting import count


def flops(model: nn.Module, x: torch.Tensor) -> int:
    with (
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
        FlopCounterMode(display=False) as counter,
    ):
        copy.deepcopy(model).eval()(x)
    return counter.get_total_flops()


MODELS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=7),
    "mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=7),
    "resnext": lambda: torchvision.models.ResNet(
        torchvision.models.resnet.Bottleneck,
        [1, 1, 1, 1],
        num_classes=7,
        groups=4,
        width_per_group=4,
    ),
    "vit": lambda: torchvision.models.VisionTransformer(32, 16, 2, 2, 24, 48, num_classes=7),
    "swin": lambda: torchvision.models.SwinTransformer(
        [2, 2], 12, [2, 2], [1, 2], [4, 4], num_classes=7
    ),
    "conv3d": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 3)), nn.Conv3d(1, 4, 2, groups=1), nn.ReLU()
    ),
    "transposed": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3, groups=1), nn.ConvTranspose2d(8, 4, 3, stride=2, groups=2)
    ),
}


@pytest.mark.parametrize(
    ("name", "batch"), [*((name, 1) for name in MODELS), ("resnet18", 3), ("swin", 3)]
)
def test_count_is_half_of_the_flop_counter(name, batch):
    model, x = MODELS[name](), torch.zeros(batch, 3, 32, 32)
    cost = count(model, x)
    assert cost.macs * 2 == flops(model, x)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert sum(layer.macs for layer in cost.layers) == cost.macs
    assert sum(layer.params for layer in cost.layers) == cost.params


def test_count_includes_attention_products():
    attention = nn.MultiheadAttention(8, 2, batch_first=True)
    x = torch.zeros(1, 5, 8)
    projections, products = 5 * 8 * 24 + 5 * 8 * 8, 2 * 5 * 5 * 8
    for enabled in (
        True,
        False,
    ):  # without need_weights torch may fuse the whole layer into one kernel
        assert count(attention.requires_grad_(enabled), (x, x, x)).macs == projections + products
    assert torch.backends.mha.get_fastpath_enabled()


def test_count_leaves_the_model_alone():
    model = torchvision.models.resnet18(num_classes=7).train()
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    count(model, torch.zeros(1, 3, 32, 32))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert not model.fc.weight.requires_grad and model.conv1.weight.requires_grad


def test_count_attributes_costs_to_the_innermost_module():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1, bias=False)
            self.scale = nn.Parameter(torch.ones(2, 4))

        def forward(self, x):
            return self.scale @ self.conv(self.conv(x)[:, :3]).flatten(2)

    cost = count(nn.Sequential(Block()), torch.zeros(1, 3, 2, 2))
    rows = [(r.name, r.kind, r.macs, r.params, r.output_shape) for r in cost.layers]
    assert rows == [
        ("0", "Block", 2 * 4 * 4, 8, (1, 2, 4)),
        ("0.conv", "Conv2d", 2 * 12 * 4, 12, (1, 4, 2, 2)),
    ]


def test_count_counts_shared_parameters_once():
    first = nn.Linear(4, 4, bias=False)
    second = nn.Linear(4, 4, bias=False)
    second.weight = first.weight
    assert count(nn.Sequential(first, second), torch.zeros(1, 4)).params == 16


def test_cost_prints_as_a_table():
    text = str(
        count(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), torch.zeros(1, 3, 34, 34))
    )
    assert text.splitlines()[0].split() == ["layer", "kind", "output", "MACs", "params"]
    assert text.splitlines()[1].split() == ["0", "Conv2d", "1x8x32x32", "221,184", "224"]
    assert text.splitlines()[-1].split() == ["total", "221,184", "240"]


def test_count_needs_no_weight_memory():
    with torch.device("meta"):
        model = nn.Linear(10**6, 10**6, bias=False)
    assert count(model, torch.zeros(1, 10**6, device="meta")).macs == 10**12


@pytest.mark.parametrize(
    ("model", "example_input", "text"),
    [
        (nn.ReLU(), torch.zeros(1), "model must have parameters, got none"),
        (nn.Conv2d, torch.zeros(1), "model must be an nn.Module, got type"),
        (
            nn.Conv2d(3, 4, 1),
            "image",
            "example_input must be a tensor or a tuple with tensors, got str",
        ),
        (
            nn.Conv2d(3, 4, 1),
            torch.zeros(1, 5, 8, 8),
            r"got shape \(1, 5, 8, 8\) \(model on cpu\); RuntimeError: .*channels",
        ),
        (nn.Linear(3, 4), torch.zeros(1, 5), r"got shape \(1, 5\)"),
        (
            nn.DataParallel(nn.Linear(3, 4)),
            torch.zeros(1, 3),
            "got DataParallel; pass model.module",
        ),
        (
            nn.LazyLinear(3),
            torch.zeros(1, 3),
            "got the lazy parameter weight; call the model once first",
        ),
    ],
)
def test_count_names_bad_input(model, example_input, text):
    with pytest.raises(ModelError, match=f"count: .*{text}"):
        count(model, example_input)


def test_count_refuses_a_compiled_model():
    with pytest.raises(
        ModelError,
        match="count: model must be uncompiled, got OptimizedModule; pass the module that",
    ):
        count(torch.compile(nn.Linear(3, 4)), torch.zeros(1, 3))


@pytest.mark.filterwarnings(
    "ignore:.*deprecated:FutureWarning", "ignore:.*deprecated:DeprecationWarning"
)
def test_count_refuses_a_scripted_model():
    scripted = torch.jit.trace(nn.Linear(3, 4), torch.zeros(1, 3))
    with pytest.raises(
        ModelError, match=r"count: model must be a Python module, got .*; pass the module before"
    ):
        count(scripted, torch.zeros(1, 3))


class Caching(nn.Module):
    """Keeps what it computed in eval mode, as attention with position biases does."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 1, bias=False)
        self.bias = nn.Parameter(torch.ones(4, 2))
        self.cache = {}

    def forward(self, x):
        if "bias" not in self.cache:
            self.cache["bias"] = self.bias[:, :1].clone()
        return self.conv(x) + self.cache["bias"][:, :, None]


def test_count_takes_models_that_hold_plain_tensors():
    model, x = Caching().eval(), torch.zeros(1, 3, 2, 2)
    before = count(model, x)
    assert before.macs == 48 and model.cache == {}
    with torch.no_grad():
        model(x)
    kept = model.cache["bias"]
    after = count(model, x)
    assert (after.macs, after.params) == (before.macs, before.params) == (48, 20)
    assert model.cache["bias"] is kept and type(kept) is torch.Tensor


def test_failing_count_logs_nothing(caplog):
    with pytest.raises(ModelError):
        count(nn.Conv2d(3, 4, 9), torch.zeros(1, 3, 4, 4))
    assert not caplog.records
