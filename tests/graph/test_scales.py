"""Layer scale: parameters that a forward multiplies channels by are cut with them."""

from __future__ import annotations

import pytest
import torch
from exactness import check_cut, random_keep
from small_nets import Net, batches, cbr, conv, head
from torch import Tensor, nn

import pfs_fast as pfs
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.structure import Structure
from pfs_fast.errors import StructureError
from pfs_fast.graph.analysis import analyse
from pfs_fast.graph.scales import find_scales
from pfs_fast.slimming.slim import slim
from pfs_fast.storage.io import load, save

IMAGE = torch.zeros(1, 3, 6, 6)


class LayerScale(nn.Module):
    """A residual branch scaled by ``gamma``, in one of the forms that libraries use."""

    def __init__(self, channels: int, form: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.gamma = nn.Parameter(1e-6 * torch.randn(channels).view(shape))
        self.form = form
        self.conv = conv(channels, channels)
        self.norm = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        if self.form == "view":
            return x + y * self.gamma.view(1, -1, 1, 1)
        if self.form == "mul":
            return x + y.mul(self.gamma.reshape(1, -1, 1, 1))
        if self.form == "last":
            return x + (y.permute(0, 2, 3, 1) * self.gamma).permute(0, 3, 1, 2)
        return x + self.gamma * y


FORMS = {
    "view": (-1,),
    "mul": (-1,),
    "last": (-1,),
    "plain": (-1, 1, 1),
    "batched": (1, -1, 1, 1),
}


def net(form: str) -> nn.Sequential:
    shape = FORMS[form]
    blocks = [LayerScale(6, form, shape), LayerScale(6, form, shape)]
    return nn.Sequential(cbr(3, 6), *blocks, cbr(6, 5), head(5))


@pytest.mark.parametrize("form", FORMS)
def test_scaled_channels_are_cut_with_their_parameter(form):
    torch.manual_seed(0)
    model = net(form)
    groups = analyse(model, IMAGE)
    assert [(g.name, g.size) for g in groups.groups] == [("0.0", 6), ("3.0", 5)]
    assert {"1.gamma", "2.gamma"} <= set(groups.groups[0].followers)
    structure = check_cut(model, (IMAGE,))
    narrow = slim(model, structure, "inherit")
    kept = list(structure.layers["1.gamma"])
    assert len(kept) < 6 and kept == list(structure.layers["0.0"])
    assert torch.equal(narrow[1].gamma.flatten(), model[1].gamma.flatten()[kept])
    assert narrow[1].gamma.dim() == model[1].gamma.dim()


def test_verify_sees_a_scale_of_the_wrong_channels():
    torch.manual_seed(0)
    model = net("plain")
    structure = check_cut(model, (IMAGE,))
    wrong = slim(model, structure, "inherit")
    wrong[1].gamma = nn.Parameter(model[1].gamma.detach().clone())
    with pytest.raises(StructureError, match=r"parameter 1\.gamma must keep 3 channels"):
        pfs.verify(model, wrong, structure, torch.zeros(4, 3, 6, 6))
    right = slim(model, structure, "inherit")
    assert pfs.verify(model, right, structure, torch.zeros(4, 3, 6, 6)).max_error < 1e-9


def test_slim_network_with_scales_comes_back_from_its_file(tmp_path):
    torch.manual_seed(0)
    model = net("batched").eval()
    groups = analyse(model, IMAGE)
    cost_model = CostModel(groups)
    keep = random_keep(cost_model, groups, 0)
    narrow = slim(model, Structure.from_keep(groups, keep, cost_model), "inherit")
    save(narrow, tmp_path / "slim.safetensors")
    back = load(tmp_path / "slim.safetensors", net("batched").eval())
    x = torch.randn(2, 3, 6, 6)
    assert torch.equal(back(x), narrow(x)) and back[1].gamma.shape == (1, 3, 1, 1)


def test_search_with_scales_ends_in_an_exact_cut():
    torch.manual_seed(0)
    model = net("view")
    config = pfs.SearchConfig(epochs=1, max_steps=2, scope="all", precision="fp32")
    result = pfs.search(model, batches(2), 0.5, config=config, progress=False)
    assert {"1.gamma", "2.gamma"} & result.structure.layers.keys()
    report = pfs.verify(model, None, result.structure, torch.zeros(4, 3, 6, 6))
    assert report.max_error < 1e-9


def other_use(m: Net, x: Tensor) -> Tensor:
    return m.fc(m.b(m.a(x) * m.gamma.view(-1, 1, 1))) + m.gamma.sum()


def added(m: Net, x: Tensor) -> Tensor:
    return m.fc(m.b(m.a(x) + m.gamma.view(-1, 1, 1)))


def cut(m: Net, x: Tensor) -> Tensor:
    return m.fc(m.b(m.a(x)[:, :6] * m.gamma.view(6, 1, 1)))


def fixed(m: Net, x: Tensor) -> Tensor:
    return m.fc(m.b(m.a(x) * m.gamma.view(6, 1, 1)))


@pytest.mark.parametrize("body", [other_use, added, cut, fixed])
def test_parameters_of_other_use_hold_the_channels(body):
    model = Net(body, a=cbr(3, 6), b=cbr(6, 5), fc=head(5), gamma=nn.Parameter(torch.randn(6)))
    assert [group.name for group in analyse(model, IMAGE).groups] == ["b.0"]
    structure = check_cut(model, (IMAGE,))
    assert "gamma" not in structure.layers


def test_scale_over_positions_leaves_the_channels_free():
    model = Net(
        lambda m, x: m.fc(m.b(m.a(x) * m.gamma)),
        a=cbr(3, 6),
        b=cbr(6, 5),
        fc=head(5),
        gamma=nn.Parameter(torch.randn(6)),  # as many as channels, along the width
    )
    assert len(analyse(model, IMAGE).groups) == 2
    assert "gamma" not in check_cut(model, (IMAGE,)).layers


def test_only_parameters_with_one_number_for_each_channel_are_scales():
    model = Net(None, a=conv(3, 4))
    model.gamma = nn.Parameter(torch.ones(4, 1))
    model.matrix = nn.Parameter(torch.ones(4, 2))
    model.register_buffer("fixed", torch.ones(4))
    found = find_scales(model, ["a", "gamma", "matrix", "fixed", "b.gamma", "a.weight"])
    assert list(found) == ["gamma"] and found["gamma"].width == 4


def test_scaled_channels_go_on_as_channels():
    """What a scale was multiplied onto is no scale: a map of one channel may be multiplied onto it afterwards."""
    model = Net(
        lambda m, x: m.fc(m.b((m.gamma.view(-1, 1, 1) * m.a(x)) * torch.sigmoid(m.map(x)))),
        a=cbr(3, 6),
        map=conv(3, 1),
        b=cbr(6, 5),
        fc=head(5),
        gamma=nn.Parameter(torch.randn(6)),
    )
    groups = analyse(model, IMAGE)
    assert [group.name for group in groups.groups] == ["a.0", "b.0"]
    assert "gamma" in check_cut(model, (IMAGE,)).layers
