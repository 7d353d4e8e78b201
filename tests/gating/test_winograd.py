"""Which convolutions of a search run by Winograd's minimal filtering, and what a search is with and without it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pfs_fast as pfs
from pfs_fast import _library, ops
from pfs_fast.errors import ConfigError
from pfs_fast.gating import winograd
from pfs_fast.gating.gated import FrozenConv
from pfs_fast.searching.plan import prepare

needs_ops = pytest.mark.skipif(
    not _library.backends().cpu, reason=f"no compiled operators: {_library.backends().cpu_reason}"
)


@pytest.mark.parametrize(
    ("sizes", "tile"),
    [
        ((128, 64, 64, 8, 8), 4),
        ((128, 512, 512, 4, 4), 4),
        ((128, 512, 512, 2, 2), 2),  # one tile either way: the smaller one has fewer products
        ((128, 64, 64, 1, 1), 2),
        ((128, 64, 64, 3, 3), 4),  # 1 x 36 products against 4 x 16
        ((128, 64, 64, 6, 6), 2),  # 4 x 36 and 9 x 16: the more exact one
        ((128, 64, 64, 7, 7), 4),
        ((128, 8, 8, 32, 32), 4),
        ((128, 7, 64, 32, 32), 0),
        ((128, 64, 7, 32, 32), 0),
        ((1, 512, 512, 4, 4), 0),
        ((0, 64, 64, 8, 8), 0),
        ((128, 64, 64, 0, 8), 0),
    ],
)
def test_tile_for(sizes, tile):
    assert winograd.tile_for(*sizes) == tile


@pytest.mark.parametrize(
    ("options", "usable"),
    [
        (dict(kernel_size=3, padding=1), True),
        (dict(kernel_size=3), True),
        (dict(kernel_size=3, padding=(2, 0), bias=False), True),
        (dict(kernel_size=3, padding=3), False),
        (dict(kernel_size=1), False),
        (dict(kernel_size=(3, 1)), False),
        (dict(kernel_size=3, stride=2), False),
        (dict(kernel_size=3, stride=(1, 2)), False),
        (dict(kernel_size=3, dilation=2), False),
        (dict(kernel_size=3, groups=2), False),
        (dict(kernel_size=3, padding="same"), False),
        (dict(kernel_size=3, padding=1, padding_mode="reflect"), False),
    ],
)
def test_can_use(options, usable):
    assert winograd.can_use(nn.Conv2d(16, 16, **options)) == usable
    assert not winograd.can_use(nn.Conv1d(16, 16, 3))
    assert not winograd.can_use(nn.ConvTranspose2d(16, 16, 3))


def test_tile_of_wants_channels_last_and_a_dtype_that_it_serves(monkeypatch):
    conv = nn.Conv2d(16, 16, 3, padding=1)
    x = torch.randn(8, 16, 8, 8)
    last = x.contiguous(memory_format=torch.channels_last)
    assert winograd.tile_of(conv, last) == 4
    assert winograd.tile_of(conv, x) == winograd.DIRECT
    assert winograd.tile_of(conv, last[0]) == winograd.DIRECT
    assert winograd.tile_of(conv.double(), last.double()) == winograd.DIRECT
    assert winograd.tile_of(conv.float(), last.bfloat16()) == winograd.DIRECT
    for matrix_units, tile in ((False, 4), (True, winograd.DIRECT)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda found=matrix_units: found)
        assert winograd.tile_of(conv.bfloat16(), last.bfloat16()) == tile
        assert winograd.tile_of(conv.float(), last) == 4
    meta = torch.empty_like(last, device="meta")
    assert winograd.tile_of(nn.Conv2d(16, 16, 3, padding=1), meta) == winograd.DIRECT


class Recorder:
    """``ops`` that notes which of its operators run."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        def run(*args, **kwargs):
            self.calls.append(name)
            return getattr(ops, name)(*args, **kwargs)

        return run


@needs_ops
def test_frozen_conv_chooses_by_the_rule():
    conv = nn.Conv2d(16, 24, 3, padding=1).requires_grad_(False)
    x = torch.randn(8, 16, 8, 8).contiguous(memory_format=torch.channels_last)
    for fast, inputs, expected in (
        (True, x, "winograd_conv"),
        (True, x.contiguous(), "frozen_conv"),
        (True, x[:, :, :0], None),
        (False, x, "frozen_conv"),
    ):
        recorder = Recorder()
        layer = FrozenConv(conv, recorder, fast)
        if expected is None:  # as a convolution says it
            with pytest.raises((RuntimeError, ValueError)):
                layer(inputs)
            continue
        torch.testing.assert_close(layer(inputs), conv(inputs), rtol=1e-4, atol=1e-5)
        assert recorder.calls == [expected]


def batches(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(16, 3, 16, 16, generator=generator), torch.arange(16) % 4)
        for _ in range(count)
    ]


def smooth(model):
    """SiLU for ReLU: rounding must not decide whether a gradient is 0."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.SiLU())
    return model


def loop_of(precision="fp32", **changes):
    torch.manual_seed(0)
    model = smooth(pfs.models.resnet20(num_classes=4))
    config = pfs.SearchConfig(precision=precision, **changes)
    images = batches(1)[0][0]
    return prepare(model, images, pfs.Budget(0.5), config, device=torch.device("cpu")).loop


def gradients(loop, batch):
    """Of all gates, before the first step."""
    images, labels = batch
    placed = images.to(next(loop.network.root.parameters()).dtype)
    logits = loop.network(placed.contiguous(memory_format=torch.channels_last))
    loop.bank.zero_grad()
    nn.functional.cross_entropy(logits, labels).backward()
    return loop.bank.grad.clone().double()


@needs_ops
def test_gradients_of_the_gates_are_as_exact_as_those_of_direct_convolutions():
    batch = batches(1)[0]
    exact = gradients(loop_of("fp64"), batch)
    errors = {}
    for fast in (True, False):
        found = gradients(loop_of(winograd=fast), batch)
        errors[fast] = ((found - exact).norm() / exact.norm()).item()
    assert errors[True] != errors[False]  # or it never ran
    assert errors[True] < 1e-5 and errors[False] < 1e-5


@needs_ops
def test_float64_is_not_touched():
    batch = batches(1)[0]
    assert torch.equal(
        gradients(loop_of("fp64", winograd=True), batch),
        gradients(loop_of("fp64", winograd=False), batch),
    )


@needs_ops
def test_first_losses_of_a_search_are_the_same():
    losses = {}
    for fast in (True, False):
        loop = loop_of(winograd=fast, lr=1e-3)
        losses[fast] = []
        for images, labels in batches(4):
            loop.step(images, labels)
            losses[fast].append(loop.entry()["loss"])
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=0)


@needs_ops
def test_narrowed_network_uses_its_own_weights():
    """Nothing of the wide layers is kept: after compaction the fast and the direct convolutions still agree."""
    loop = loop_of()
    values = loop.state.gates.values
    keep = torch.ones(len(values), dtype=torch.bool)
    keep[::2] = False
    values[~keep] = 0
    images = batches(1)[0][0].contiguous(memory_format=torch.channels_last)
    before = loop.network(images)
    loop.compaction.leave_out(keep.numpy())
    convs = [m for m in loop.network.modules() if isinstance(m, FrozenConv)]
    assert any(m.conv.out_channels in (8, 16, 32) for m in convs)
    for module in convs:
        weight = module.conv.weight
        assert weight.is_contiguous(memory_format=torch.channels_last)
    fast = loop.network(images)
    torch.testing.assert_close(fast, before, rtol=1e-3, atol=1e-3)
    for module in convs:
        module.fast = False
    torch.testing.assert_close(loop.network(images), fast, rtol=1e-3, atol=1e-3)


def test_config_wants_a_bool():
    with pytest.raises(ConfigError, match="winograd must be True or False, got 1"):
        pfs.SearchConfig(winograd=1)
