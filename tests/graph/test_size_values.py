"""Control flow and arithmetic on sizes: followed with the example's numbers, never where channels decide."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from exactness import check_cut
from small_nets import Net, batches, cbr, conv, head
from torch import Tensor, nn

import pfs_fast as pfs
from pfs_fast.errors import ModelError, TraceError
from pfs_fast.graph.analysis import analyse
from pfs_fast.graph.trace import trace

IMAGE = torch.zeros(1, 3, 6, 6)


class SamePad(nn.Module):
    """Pads as TensorFlow does: ``math.ceil``, ``max`` and ``if`` on sizes."""

    def forward(self, x: Tensor) -> Tensor:
        missing = [max((math.ceil(s / 2) - 1) * 2 + 3 - s, 0) for s in x.shape[-2:]]
        if missing[0] > 0 or missing[1] > 0:
            h, w = missing
            x = F.pad(x, [w // 2, w - w // 2, h // 2, h - h // 2])
        return F.max_pool2d(x, 3, 2)


class Windows(nn.Module):
    """Averages over windows of 4x4, with padding where the map does not divide into them."""

    def forward(self, x: Tensor) -> Tensor:
        _, c, h, w = x.shape
        if h == 4 and w == 4:
            return x.mean((2, 3), keepdim=True)
        pad_h, pad_w = (4 - h % 4) % 4, (4 - w % 4) % 4
        if pad_h or pad_w:
            x = F.pad(x, (0, pad_w, 0, pad_h))
        rows, columns = int((h + pad_h) / 4), range(0, w + pad_w, 4)
        x = x.view(-1, c, rows, 4, len(columns), 4)
        return x.mean((3, 5))


class Sizes(nn.Module):
    """Goes through a shape, rounds, and indexes with a size."""

    def forward(self, x: Tensor) -> Tensor:
        half = [round(s / 2) for s in x.shape[2:]]
        factor = (1.0, 2.0, 3.0)[x.shape[2] // 4] * len(x.shape)
        return F.adaptive_avg_pool2d(x, half) * factor


class ByChannels(nn.Module):
    """Another number of channels may take another branch: 12 do not, though 24 would not either."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.shape[1] > 8 else torch.relu(x)


class ByImages(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.size(0) > 8 else torch.relu(x)


@pytest.mark.parametrize("module", [SamePad(), Windows(), Sizes()], ids=["pad", "windows", "sizes"])
def test_control_flow_on_sizes_is_followed_and_cut(module):
    model = nn.Sequential(cbr(3, 6), module, cbr(6, 8), head(8)).double()
    groups = analyse(model, IMAGE.double())
    assert {group.name: group.size for group in groups.groups} == {"0.0": 6, "2.0": 8}
    check_cut(model.float(), (IMAGE,))


def test_graphs_compute_what_the_model_does():
    model = nn.Sequential(cbr(3, 6), Sizes(), SamePad(), Windows(), head(6)).eval()
    traced = trace(model, IMAGE)
    x = torch.randn(5, 3, 6, 6)
    assert not traced.opaque and traced.shapes == ((3, 6, 6),)
    expected = model(x)
    assert torch.isfinite(expected).all()
    assert torch.equal(traced.eval.eval()(x), expected)


def test_networks_that_do_not_ask_have_no_fixed_shape():
    assert trace(nn.Sequential(cbr(3, 6), head(6)), IMAGE).shapes is None


def test_channels_that_decide_the_control_flow_are_held_whole():
    model = nn.Sequential(cbr(3, 12), ByChannels(), cbr(12, 8), head(8))
    groups = analyse(model, IMAGE)
    assert [group.name for group in groups.groups] == ["2.0"]
    assert "the forward decides by their number" in dict(groups.fixed)["0.0"]
    check_cut(model, (IMAGE,))


def test_channels_stay_free_where_only_other_sizes_decide():
    model = Net(
        lambda m, x: m.fc(m.b(y) if (y := m.a(x)).shape[2] == 6 else m.b(y + 1)),
        a=cbr(3, 12),
        b=cbr(12, 4),
        fc=head(4),
    )
    assert len(analyse(model, IMAGE).groups) == 2


def test_channels_inside_arithmetic_with_sizes_are_held_whole():
    def body(m, x):
        y = m.a(x)
        _, c, h, w = y.shape
        return m.fc(m.b(y) if c * h * w > 100 else m.b(y + 1))

    model = Net(body, a=cbr(3, 12), b=cbr(12, 4), fc=head(4))
    assert [group.name for group in analyse(model, IMAGE).groups] == ["b.0"]


def test_number_of_images_gets_no_answer():
    with pytest.raises(
        TraceError,
        match=r"test_size_values\.py:\d+: return x if x\.size\(0\) > 8.*depends on the number of images",
    ):
        trace(Net(lambda m, x: ByImages.forward(m, m.a(x)), a=conv(3, 4)), IMAGE)
    traced = trace(nn.Sequential(cbr(3, 4), ByImages(), head(4)), IMAGE)
    assert list(traced.opaque) == ["1"]  # one node, which runs as it is


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda y: y.sum() > 0, "depends on the values of a tensor"),
        (lambda y: y.is_contiguous(), "depends on 'is_contiguous', which is not a size"),
        (lambda y: y.shape[0] // y.shape[0], "depends on the number of images"),
    ],
)
def test_what_is_no_size_of_an_image_is_refused_with_its_line(ask, text):
    model = Net(lambda m, x: m.a(x) if ask(m.a(x)) else x, a=conv(3, 4))
    with pytest.raises(TraceError, match=rf"test_size_values\.py:\d+: .*{text}"):
        trace(model, IMAGE)


def test_search_refuses_images_of_another_size_than_the_graphs_hold_for():
    model = nn.Sequential(cbr(3, 6), SamePad(), cbr(6, 8), head(8))
    config = pfs.SearchConfig(epochs=1, max_steps=2, scope="all", precision="fp32")
    pfs.search(model, batches(2), 0.5, config=config, progress=False)
    mixed = batches(1) + batches(1, images=(3, 8, 8))
    with pytest.raises(ModelError, match=r"must all have the shape \(3, 6, 6\).* got \(3, 8, 8\)"):
        pfs.search(model, mixed, 0.5, config=config, progress=False)


def test_tracing_with_questions_leaves_buffers_alone():
    model = nn.Sequential(cbr(3, 6), Windows(), head(6))
    traced = trace(model, IMAGE)
    assert int(traced.train.get_submodule("0.1").num_batches_tracked) == 0
    assert torch.equal(traced.train.get_submodule("0.1").running_mean, torch.zeros(6))
