from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from exactness import random_keep
from slim_cases import CONV, NET, Net, broken, structure
from small_nets import Net2
from torch import nn

from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.structure import Structure
from pfs_fast.errors import ConfigError, ModelError, StructureError
from pfs_fast.graph.analysis import analyse
from pfs_fast.slimming.slim import slim
from pfs_fast.slimming.verify import verify

X = torch.zeros(8, 3, 2, 2)  # several images, so that no channel is 0 after ReLU for all


def test_correct_structure_passes_with_a_report():
    report = verify(Net(), None, NET, X)
    assert report.passed and report.max_error < 1e-12 and report.layer is None
    assert (report.layers_compared, report.trials, report.rtol) == (5, 2, 1e-9)
    assert "masked and slim networks are equal" in str(report)


@pytest.mark.parametrize(
    ("s", "layer"),
    [
        (
            broken(layers={"conv": (1, 3, 4, 7)}),
            "bn",
        ),  # wrong channel of one layer: its norm no longer fits
        (broken(layers={"bn": (1, 3, 4, 7)}), "bn"),
        (broken(inputs={"grouped": (1, 3, 4, 7)}), "grouped"),
        (broken(inputs={"grouped": (3, 1, 4, 6)}), "grouped"),  # permuted
        (broken(layers={"conv": (3, 1, 4, 6)}), "bn"),
        (broken(inputs={"fc": (*NET.inputs["fc"][:-1], 95)}), "fc"),
        (broken(inputs={"fc": NET.inputs["fc"][::-1]}), "fc"),
    ],
)
def test_wrong_structure_fails_and_names_the_first_layer(s, layer):
    with pytest.raises(StructureError, match=f"NOT equal: .* first differing layer {layer} "):
        verify(Net(), None, s, X)
    report = verify(Net(), None, s, X, raise_on_fail=False)
    assert not report.passed and report.layer == layer and report.layer_error > 1e-3


def test_cut_that_does_not_run_fails():
    with pytest.raises(StructureError, match="verify: the slim network must run, got RuntimeError"):
        verify(Net(), None, broken(layers={"conv": CONV[:3]}), X)


def test_slim_model_with_inherited_weights_passes():
    model = Net()
    assert verify(model, slim(model, NET, "inherit"), NET, X).passed


@pytest.mark.parametrize("layer", ["conv", "depthwise", "fc"])
def test_slim_model_with_a_wrong_weight_fails(layer):
    model = Net()
    narrow = slim(model, NET, "inherit")
    weight = narrow.get_submodule(layer).weight
    weight.data[1].add_(1e-6)
    report = verify(model, narrow, NET, X, raise_on_fail=False)
    assert not report.passed and report.layer == layer


def test_slim_model_of_another_structure_fails():
    model = Net()
    other = slim(model, structure({}, {}, {}), "inherit")
    with pytest.raises(
        StructureError,
        match="layer bn must keep 4 channels in slim_model, got 8; pass the slim network of",
    ):
        verify(model, other, NET, X)


def test_verify_leaves_models_and_random_state_alone():
    model = Net()
    narrow = slim(model, NET, "inherit")
    before = [copy.deepcopy(net.state_dict()) for net in (model, narrow)]
    state = torch.get_rng_state()
    verify(model, narrow, NET, X)
    for net, old in zip((model, narrow), before, strict=True):
        assert all(torch.equal(old[key], value) for key, value in net.state_dict().items())
        assert net.training and not any(
            m._forward_hooks or m._forward_pre_hooks for m in net.modules()
        )
    assert torch.equal(state, torch.get_rng_state())


def test_dropped_channels_that_are_not_zero_are_found():
    class Sigmoid(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.grouped(torch.sigmoid(self.bn(self.conv(x)))).flatten(1)

    s = structure(
        {"conv": CONV, "bn": CONV},
        {"grouped": CONV},
        {"conv": (3, 8), "bn": (8, 8), "grouped": (8, 12)},
    )
    assert verify(Sigmoid(), None, s, X, raise_on_fail=False).layer == "grouped"


def test_in_place_activations_and_nested_outputs_are_compared():
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = (
                nn.Conv2d(3, 8, 1),
                nn.BatchNorm2d(8),
                nn.Conv2d(8, 2, 1),
            )

        def forward(self, x: torch.Tensor, scale: int) -> dict:
            y = nn.functional.relu_(self.bn(self.conv(x))) * scale
            return {"out": self.head(y), "aux": [y.mean((1, 2, 3))]}

    s = structure(
        {"conv": CONV, "bn": CONV}, {"head": CONV}, {"conv": (3, 8), "bn": (8, 8), "head": (8, 2)}
    )
    report = verify(Nested(), None, s, (X, 2), raise_on_fail=False)
    assert report.layer is None and not report.passed  # the mean over channels is what differs
    assert report.max_error > 1e-3


def two_inputs(m, x, y):
    features = m.a(x) + m.b(y)
    return {"logits": m.fc(features), "maps": (m.c(x).mean(), [m.d(features)])}


def test_several_inputs_and_nested_outputs_are_proved_on_the_way():
    model = Net2(
        two_inputs,
        a=nn.Conv2d(3, 6, 3),
        b=nn.Conv2d(2, 6, 3),
        c=nn.Conv2d(3, 4, 1),
        d=nn.Conv2d(6, 3, 1),
        fc=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2)),
    )
    inputs = (torch.zeros(2, 3, 6, 6), torch.zeros(2, 2, 6, 6))
    groups = analyse(model, inputs)
    cost_model = CostModel(groups)
    s = Structure.from_keep(groups, random_keep(cost_model, groups, 0), cost_model)
    narrow = slim(model, s, "inherit", verify=True, example_input=inputs)
    assert set(narrow(*inputs)) == {"logits", "maps"}
    narrow.d.weight.data.mul_(1.001)
    report = verify(model, narrow, s, inputs, raise_on_fail=False)
    assert not report.passed and report.layer == "d"


def test_slim_refuses_a_structure_that_the_proof_refuses():
    with pytest.raises(StructureError, match="first differing layer bn"):
        slim(Net(), broken(layers={"bn": (1, 3, 4, 7)}), verify=True, example_input=X)


def test_random_forwards_draw_the_same_numbers():
    class Noisy(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) + torch.randn(x.size(0), 1, dtype=x.dtype)

    assert verify(Noisy(), None, NET, X).passed


def test_proof_with_zero_outputs_is_refused():
    class Zero(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 0

    with pytest.raises(
        StructureError,
        match=r"must be finite and not all 0, got a largest value of 0.0; nothing can be",
    ):
        verify(Zero(), None, NET, X)


def test_deep_networks_stay_in_range():
    blocks = [m for _ in range(60) for m in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))]
    model = nn.Sequential(*blocks, nn.Flatten(), nn.Linear(16, 2))
    for module in model:
        if isinstance(module, nn.Conv2d):
            module.weight.data.mul_(1e8)
    kept = (0, 2)
    s = structure({"0": kept, "1": kept}, {"2": kept}, {"0": (4, 4), "1": (4, 4), "2": (4, 4)})
    assert verify(model, None, s, torch.zeros(3, 4, 2, 2)).passed


@pytest.mark.parametrize(
    ("model", "example_input", "options", "error", "text"),
    [
        (
            nn.DataParallel(Net()),
            X,
            {},
            ModelError,
            "verify: model must be a plain module, got DataParallel",
        ),
        (
            Net(),
            "x",
            {},
            ModelError,
            "verify: example_input must be a tensor or a tuple with tensors, got str",
        ),
        (
            Net(),
            torch.zeros(1, 4, 2, 2),
            {},
            ModelError,
            r"must be accepted by the model, got shape \(1, 4, 2, 2\)",
        ),
        (
            Net(),
            X,
            {"trials": 0},
            ConfigError,
            "verify: trials must be a whole number of at least 1, got 0",
        ),
    ],
)
def test_verify_names_bad_arguments(model, example_input, options, error, text):
    with pytest.raises(error, match=text):
        verify(model, None, NET, example_input, **options)


def test_structure_of_another_model_is_named_by_layer():
    s = dataclasses.replace(NET, widths={**NET.widths, "conv": (3, 9)})
    with pytest.raises(StructureError, match=r"layer conv must have \(in, out\) = \(3, 9\)"):
        verify(Net(), None, s, X)


def test_network_of_a_search_needs_no_example_input() -> None:
    model = Net()
    narrow = slim(model, NET, "inherit")
    with pytest.raises(ConfigError, match="example_input must be given"):
        verify(model, narrow, NET)
    narrow.pfs_input_shape = tuple(X.shape[1:])
    assert verify(model, narrow, NET).passed


def test_prelu_with_one_channel_left_is_still_a_layer() -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.PReLU(4), nn.Conv2d(4, 5, 1), nn.PReLU(1), nn.Conv2d(5, 2, 1)]
    model = nn.Sequential(*layers)
    nn.init.uniform_(model[1].weight)
    s = structure({"0": (2,), "1": (2,)}, {"2": (2,)}, {"0": (3, 4), "1": (4, 4), "2": (4, 5)})
    assert verify(model, None, s, X).layers_compared == 4  # a common slope is no layer


# -- weights of the slim network ------------------------------------------------------------------------------------


def test_slim_model_with_fresh_or_trained_weights_passes_and_the_report_says_how():
    model = Net()
    fresh = slim(model, NET)
    before = copy.deepcopy(fresh.state_dict())
    report = verify(model, fresh, NET, X)
    assert report.passed and report.weights == "copied" and "weights copied" in str(report)
    assert all(torch.equal(before[key], value) for key, value in fresh.state_dict().items())
    trained = slim(model, NET, "inherit")
    for parameter in trained.parameters():
        parameter.data.add_(0.01 * torch.randn_like(parameter))
    assert verify(model, trained, NET, X).weights == "copied"
    inherited = verify(model, slim(model, NET, "inherit"), NET, X)
    assert inherited.weights == "inherited" and "weights inherited" in str(inherited)
    assert verify(model, None, NET, X).weights == "inherited"


def other_channels() -> Structure:
    """A cut as wide as NET, of other channels."""
    conv = (0, 2, 5, 7)
    grouped = (1, 3, 4, 7, 8, 11)
    depthwise = tuple(2 * c + i for c in grouped for i in range(2))
    fc = tuple(4 * c + i for c in depthwise for i in range(4))
    return structure(
        {"conv": conv, "bn": conv, "grouped": grouped, "depthwise": depthwise},
        {"grouped": conv, "depthwise": grouped, "fc": fc},
        NET.widths,
    )


def test_inherited_slices_of_other_channels_are_found_in_every_layer():
    model = Net()
    narrow = slim(model, other_channels(), "inherit")
    assert verify(model, narrow, other_channels(), X).passed
    with pytest.raises(StructureError, match="weights inherited; first differing layer conv "):
        verify(model, narrow, NET, X)
    assert verify(model, narrow, NET, X, weights="fresh").weights == "copied"
    with pytest.raises(StructureError, match="weights inherited; first differing layer conv "):
        verify(model, slim(model, NET), NET, X, weights="inherit")


def test_fresh_slim_model_of_another_structure_fails():
    model = Net()
    with pytest.raises(
        StructureError,
        match=r"must have the shape \[.*\] in slim_model, got \[.*\]; pass the slim network of this",
    ):
        verify(model, slim(model, structure({}, {}, {})), NET, X)


def test_fresh_slim_model_with_an_altered_module_fails():
    model = Net()
    narrow = slim(model, NET)
    narrow.grouped.padding_mode = "circular"
    narrow.grouped._reversed_padding_repeated_twice = [1, 1, 1, 1]
    report = verify(model, narrow, NET, X, raise_on_fail=False)
    assert not report.passed and report.layer == "grouped" and report.weights == "copied"


def test_wrong_structure_is_found_with_fresh_weights():
    model = Net()
    wrong = broken(inputs={"grouped": (3, 1, 4, 6)})
    report = verify(model, slim(model, NET), wrong, X, raise_on_fail=False)
    assert not report.passed and report.layer == "grouped" and report.weights == "copied"


def test_verify_names_another_value_of_weights():
    with pytest.raises(
        ConfigError, match="weights must be 'auto', 'inherit' or 'fresh', got 'copy'"
    ):
        verify(Net(), None, NET, X, weights="copy")


# -- forwards that write to their input, or cast --------------------------------------------------------------------


class Scaling(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x *= 3
        return super().forward(x)


class Casting(Net):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.float() * (x > 0).to(torch.float32)
        x = x.type("torch.FloatTensor") + torch.full_like(x, 0.1, dtype=torch.float32)
        return super().forward(x.to(dtype=torch.bfloat16) + torch.linspace(0, 1, 2))


@pytest.mark.parametrize("kind", [Scaling, Casting])
def test_forward_that_writes_to_its_input_or_casts_is_compared_rightly(kind):
    model = kind()
    report = verify(model, slim(model, NET), NET, X)
    assert report.passed and report.max_error < 1e-12
    wrong = broken(layers={"bn": (1, 3, 4, 7)})
    assert verify(model, None, wrong, X, raise_on_fail=False).layer == "bn"


def test_in_place_activation_of_the_input_is_compared_rightly():
    model = nn.Sequential(nn.LeakyReLU(inplace=True), Net())
    s = structure(
        *(
            {f"1.{name}": value for name, value in table.items()}
            for table in (NET.layers, NET.inputs, NET.widths)
        )
    )
    assert verify(model, None, s, X).passed
