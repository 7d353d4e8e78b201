"""Slim networks: equal to the masked network, and to nothing else of the model."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from slim_cases import NET, Net, broken, structure
from torch import nn

from benchmarks.footprint import peak_bytes
from pfs_fast.budgets.structure import Structure
from pfs_fast.errors import ConfigError, ModelError, StructureError
from pfs_fast.graph.analysis import analyse
from pfs_fast.models import resnet20
from pfs_fast.slimming.slim import narrow_to, slim


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


@pytest.mark.parametrize("table", ["layers", "inputs"])
@pytest.mark.parametrize("more", [False, True])
def test_structure_whose_layers_do_not_fit_each_other_is_refused(table, more):
    """As after a change of the file by hand: without this the network would be made, and its forward would fail."""
    model = resnet20(4, expansion=0.5)
    groups = analyse(model, torch.zeros(1, 3, 8, 8))
    keep = np.arange(groups.num_units) % 3 > 0
    structure = Structure.from_keep(groups, keep)
    assert slim(model, structure)(torch.zeros(2, 3, 8, 8)).shape == (2, 4)
    for name, kept in getattr(structure, table).items():
        width = structure.widths[name][1 if table == "layers" else 0]
        one = next((i for i in range(width) if (i in kept) != more), None)
        assert one is not None
        document = json.loads(structure.to_json())
        document[table][name] = sorted({*kept} ^ {one})
        broken = Structure.from_json(json.dumps(document))
        with pytest.raises(StructureError, match=r"slim: structure must remove [\d,]+ parameters"):
            slim(model, broken)
