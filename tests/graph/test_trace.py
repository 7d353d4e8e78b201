"""Tracing: both modes, values at every node, MACs, and errors that name the place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small_nets import Frozen, Net, Net2, cbr, conv, head, tiny
from torch import nn
from weightless import weightless

import pfs_fast as pfs
from pfs_fast.budgets.cost import CostModel
from pfs_fast.errors import ModelError, TraceError
from pfs_fast.graph.analysis import analyse
from pfs_fast.graph.trace import trace

IMAGE = torch.zeros(1, 3, 6, 6)


def test_trace_uses_one_graph_where_both_modes_are_equal():
    traced = trace(tiny(), IMAGE)
    assert traced.train is traced.eval
    assert traced.graphs == (traced.train,)


def test_trace_keeps_both_graphs_where_they_differ():
    model = Net(lambda m, x: m.fc(F.dropout(m.a(x), 0.5, m.training)), a=conv(3, 4), fc=head(4))
    traced = trace(model, IMAGE)
    assert traced.train is not traced.eval
    assert traced.graphs == (traced.train, traced.eval)
    assert traced.train.a is traced.eval.a  # one copy of the modules


def test_trace_stores_fake_values_for_a_batch_of_two():
    traced = trace(tiny(), IMAGE)
    values = {node.name: node.meta["val"] for node in traced.train.graph.nodes}
    assert values["_0_0"].shape == (2, 3, 6, 6)
    assert values["_2_2"].shape == (2, 4)
    assert isinstance(values["_0_0"], torch._subclasses.FakeTensor)


def test_trace_counts_the_macs_of_one_image_in_eval_mode():
    model = Net(
        lambda m, x: m.fc(m.a(x)) + m.fc(m.b(x)) if m.training else m.fc(m.a(x)),
        a=conv(3, 4),
        b=conv(3, 4),
        fc=head(4),
    )
    assert trace(model, IMAGE).macs == pfs.count(model, IMAGE).macs == 36 * 9 * 3 * 4 + 16


def test_trace_counts_all_parameters_once():
    model = Net(
        lambda m, x: m.fc(m.b(m.a(x))), a=conv(3, 3), b=conv(3, 3), unused=conv(3, 8), fc=head(3)
    )
    model.b.weight = model.a.weight
    assert trace(model, IMAGE).params == 81 + 216 + 16


def test_trace_leaves_the_model_alone():
    model = tiny().train()
    model[1].eval()
    frozen = Frozen(model)
    trace(model, IMAGE)
    frozen.check()


def test_trace_does_not_count_a_batch_in_the_copy():
    model = Net(
        lambda m, x: m.fc(F.dropout(m.n(m.a(x)), 0.5, m.training)),
        a=conv(3, 4),
        n=nn.BatchNorm2d(4),
        fc=head(4),
    )
    traced = trace(model, IMAGE)
    assert int(traced.train.n.num_batches_tracked) == 0
    assert torch.equal(traced.train.n.running_mean, torch.zeros(4))


def test_trace_takes_several_inputs():
    model = Net2(lambda m, x, y: m.fc(m.a(x) + m.b(y)), a=conv(3, 4), b=conv(2, 4), fc=head(4))
    traced = trace(model, (IMAGE, torch.zeros(1, 2, 6, 6)))
    assert [n.name for n in traced.train.graph.nodes if n.op == "placeholder"] == ["x", "y"]


def test_trace_keeps_subclasses_with_the_forward_of_their_base_as_layers():
    class Conv(nn.Conv2d):
        pass

    class OwnForward(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight * 2)

    model = nn.Sequential(Conv(3, 4, 1), OwnForward(4, 5, 1))
    ops = [(n.op, str(n.target)) for n in trace(model, IMAGE).train.graph.nodes]
    assert ("call_module", "0") in ops
    assert ("call_module", "1") not in ops


def test_layers_whose_weight_is_used_without_calling_them_are_held_with_that_reason():
    class Standardised(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(x, self.weight - self.weight.mean((1, 2, 3), keepdim=True), self.bias)

    model = nn.Sequential(Standardised(3, 4, 1), nn.ReLU(), Standardised(4, 5, 1))
    reason = "the forward computes with its weight instead of calling it (Standardised)"
    assert analyse(model, IMAGE).fixed == (("0", reason), ("2", reason))
    with pytest.raises(ModelError, match=r"  0: the forward computes with its weight.*\n  2: "):
        pfs.search(model, [(IMAGE, torch.zeros(1, dtype=torch.int64))], 0.5)


def test_layer_that_is_called_once_and_read_once_has_the_reason_of_its_channels():
    model = Net(lambda m, x: m.fc(m.a(x) + m.a.weight.mean()), a=conv(3, 4), fc=head(4))
    assert [name for name, _ in analyse(model, IMAGE).fixed].count("a") == 1


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        x = self.conv(x)
        if x.sum() > 0:  # depends on data
            return x
        return -x


def test_trace_error_names_module_and_line():
    model = nn.Sequential(cbr(3, 3), nn.Sequential(Branching()), head(3))
    with pytest.raises(
        TraceError,
        match=r"module '1\.0' \(Branching\) is not \(.*test_trace\.py:\d+: if x\.sum\(\) > 0:.*torch\.fx\.wrap",
    ):
        trace(model, IMAGE)


def test_trace_error_at_the_top_level_says_so():
    with pytest.raises(TraceError, match=r"module 'the model itself' \(Branching\)"):
        trace(Branching(), IMAGE)


@pytest.mark.parametrize("shape", [(1, 5, 6, 6), (1, 3), (1, 3, 6)])
def test_trace_error_names_the_call_that_rejects_the_example(shape):
    model = Net(lambda m, x: m.fc(torch.flatten(m.a(x), 1)), a=conv(3, 4), fc=nn.Linear(144, 4))
    with pytest.raises(
        TraceError, match=r"example_input must fit the model, but call_module '(a|fc)' fails"
    ):
        trace(model, torch.zeros(shape))


def test_trace_error_for_a_missing_input():
    model = Net2(lambda m, x, y: m.a(x) + m.a(y), a=conv(3, 4))
    with pytest.raises(
        TraceError, match="example_input must fit the model, but placeholder 'y' fails"
    ):
        trace(model, IMAGE)


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_trace_refuses_a_model_that_cannot_be_copied():
    model = nn.Sequential(nn.utils.weight_norm(conv(3, 4)), head(4))
    model(torch.zeros(2, 3, 6, 6))
    with pytest.raises(
        ModelError, match=r"copy\.deepcopy copies, got RuntimeError: .*parametrizations"
    ):
        trace(model, IMAGE)


def test_trace_refuses_meta_and_mixed_devices():
    with pytest.raises(
        ModelError, match=r"must hold values, got tensors on the meta device; .*to_empty"
    ):
        trace(tiny().to("meta"), IMAGE)
    model = tiny()
    model[2].to("meta")
    with pytest.raises(
        ModelError, match=r"must lie on one device, got tensors on cpu, meta; use model\.to"
    ):
        trace(model, IMAGE)


class ByImages(nn.Module):
    """Control flow on the number of images: not followed, but it runs."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True) if x.size(0) < 1000 else x


class ByValue(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


def test_trace_keeps_modules_whole_that_ask_for_the_number_of_images():
    model = nn.Sequential(cbr(3, 4), ByImages(), cbr(4, 5), ByImages(), head(5))
    traced = trace(model, IMAGE)
    assert set(traced.opaque) == {"1", "3"}
    assert traced.opaque["1"] == "module '1' (ByImages) cannot be traced"
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(traced.eval.eval()(x), model.eval()(x))


def test_trace_error_of_data_stays_where_images_are_counted_too():
    model = nn.Sequential(cbr(3, 4), ByImages(), ByValue(), head(4))
    with pytest.raises(
        TraceError, match=r"module '2' \(ByValue\).*test_trace\.py:\d+: return x if x\.sum"
    ):
        trace(model, IMAGE)


def test_trace_error_names_the_line_of_another_library():
    detector = torchvision.models.detection.fasterrcnn_mobilenet_v3_large_320_fpn
    model = weightless(detector, weights=None, weights_backbone=None)
    with pytest.raises(TraceError, match=r"generalized_rcnn\.py:\d+: .*the backbone of a detector"):
        trace(model, IMAGE, values=False)


def test_analysis_of_weightless_and_real_networks_is_the_same():
    build = torchvision.models.shufflenet_v2_x0_5
    real = analyse(build(), torch.zeros(1, 3, 32, 32))
    meta = analyse(weightless(build), torch.zeros(1, 3, 32, 32, device="meta"))
    assert real.groups == meta.groups and real.fixed == meta.fixed
    assert CostModel(real).base == CostModel(meta).base
