"""Max pools of a gated network: those that the fused operator can do become it, the others stay what they were."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, cbr, head
from test_gated import BACKENDS, assert_same, gate, needs_ops, saved_maps, shaken
from torch import nn

import pfs_fast as pfs
from pfs_fast import ops
from pfs_fast.gating.gated_layers import GlobalPool, MaxPool, can_pool, is_global_pool
from pfs_fast.ops import reference

X = (3, 3, 12, 12)


class Shouting(nn.MaxPool2d):
    def forward(self, input):
        return 2 * super().forward(input)


FUSED = {
    "module": lambda: nn.MaxPool2d(2),
    "overlapping": lambda: nn.MaxPool2d(3, 2, 1),
    "tuples": lambda: nn.MaxPool2d((3, 2), stride=(2, 1), padding=(1, 0)),
    "function": lambda: lambda x: F.max_pool2d(x, 2),
    "keywords": lambda: lambda x: F.max_pool2d(input=x, kernel_size=3, stride=1, padding=1),
    "torch function": lambda: lambda x: torch.max_pool2d(x, (2, 2)),
    "forward of a subclass": lambda: Shouting(2),
    "two of them": lambda: lambda x: F.max_pool2d(F.max_pool2d(x, 2), 3, 1),
}
LEFT = {
    "rounded up": lambda: nn.MaxPool2d(5, ceil_mode=True),
    "dilated": lambda: nn.MaxPool2d(2, dilation=2),
    "function rounded up": lambda: lambda x: F.max_pool2d(x, 5, ceil_mode=True),
    "indices": lambda: lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "computed": lambda: lambda x: F.max_pool2d(x, x.shape[2] // 2),
    "average": lambda: nn.AvgPool2d(2),
}


def net(pool) -> nn.Module:
    place = pool()
    modules = {"pool": place} if isinstance(place, nn.Module) else {}
    call = (lambda m: m.pool) if modules else (lambda m: place)
    return shaken(
        Net(
            lambda m, x: m.end(m.b(call(m)(m.a(x)))),
            a=cbr(3, 6),
            b=cbr(6, 4),
            end=head(4),
            **modules,
        )
    )


def pools(network) -> list[MaxPool]:
    return [m for m in network.modules() if isinstance(m, MaxPool)]


@pytest.mark.parametrize("kernels", BACKENDS)
@pytest.mark.parametrize("name", [*FUSED, *LEFT])
def test_network_equals_the_model(name, kernels):
    model = net((FUSED | LEFT)[name])
    x = torch.randn(X, dtype=torch.float64)
    network, _ = gate(model, x, kernels)
    expected = 0 if name in LEFT else 2 if name == "two of them" else 1
    assert len(pools(network)) == expected
    for mode in (False, True):  # the latter moves the statistics of the model alone
        network.train(mode), model.train(mode)
        assert_same(network(x.contiguous(memory_format=torch.channels_last)), model(x))


def test_hooked_pool_stays():
    model = net(lambda: nn.MaxPool2d(2))
    model.pool.register_forward_hook(lambda _m, _args, y: y + 1)
    network, _ = gate(model, torch.randn(X, dtype=torch.float64))
    assert not pools(network)


def test_pools_of_other_options_are_other_places():
    model = net(lambda: lambda x: F.max_pool2d(x, 2) + F.max_pool2d(F.max_pool2d(x, 2), 3, 1, 1))
    x = torch.randn(X, dtype=torch.float64)
    network, _ = gate(model, x)
    found = {(p.pool.kernel_size, p.pool.stride, p.pool.padding) for p in pools(network)}
    assert found == {(2, 2, 0), (3, 1, 1)}
    network.eval(), model.eval()
    assert_same(network(x), model(x))


@pytest.mark.parametrize("kernels", BACKENDS)
def test_without_a_batch_dimension_the_layer_runs(kernels):
    pool = nn.MaxPool2d(2)
    x = torch.randn(3, 6, 6)
    assert torch.equal(MaxPool(pool, kernels)(x), pool(x))


def test_numbers_that_the_operator_has_not_stay_torchs():
    x = torch.randint(-9, 9, (2, 3, 6, 6)).to(torch.int32)
    assert torch.equal(MaxPool(nn.MaxPool2d(2), ops)(x), F.max_pool2d(x, 2))


def test_form_that_the_operator_has():
    assert can_pool(nn.MaxPool2d((15, 17), 3, (7, 8)))
    for pool in (
        nn.MaxPool2d(16),
        nn.MaxPool2d(2, return_indices=True),
        nn.MaxPool2d(2, dilation=(1, 2)),
        nn.MaxPool1d(2),
        Shouting(2),
        nn.MaxPool2d(2.0),
    ):
        assert not can_pool(pool)


@needs_ops
def test_pool_keeps_a_byte_for_each_output():
    x = torch.randn(4, 8, 16, 16, requires_grad=True)
    fused = saved_maps(lambda: MaxPool(nn.MaxPool2d(2), ops)(x), set())
    plain = saved_maps(lambda: MaxPool(nn.MaxPool2d(2), reference)(x), set())
    assert sum(fused.values()) == x.numel() // 4
    assert sum(plain.values()) == x.numel() * 4 + x.numel() // 4 * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(3, 5, 7, 6), (2, 8, 8, 8), (2, 4, 1, 1)], ids=str)
def test_global_pool_is_the_mean(size, layout, dtype):
    torch.manual_seed(0)
    x = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    pool, results = nn.AdaptiveAvgPool2d(1), []
    for layer in (pool, GlobalPool(pool)):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        (y * torch.arange(1, size[1] + 1).view(1, -1, 1, 1)).sum().backward()
        results.append((y.detach(), leaf.grad))
    assert results[0][0].shape == results[1][0].shape
    assert all(map(torch.equal, *results))


def test_gradient_of_the_global_pool_is_not_written_out():
    x = torch.randn(3, 5, 7, 6, requires_grad=True)
    y = GlobalPool(nn.AdaptiveAvgPool2d(1))(x)
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    assert grad.stride()[2:] == (0, 0)


def test_global_pool_without_a_batch_is_pytorchs():
    x = torch.randn(5, 7, 6)
    pool = nn.AdaptiveAvgPool2d(1)
    assert torch.equal(GlobalPool(pool)(x), pool(x))


@pytest.mark.parametrize(
    ("pool", "expected"),
    [
        (nn.AdaptiveAvgPool2d(1), True),
        (nn.AdaptiveAvgPool2d((1, 1)), True),
        (nn.AdaptiveAvgPool2d((1, None)), False),
        (nn.AdaptiveAvgPool2d(2), False),
        (nn.AdaptiveMaxPool2d(1), False),
        (nn.AvgPool2d(1), False),
    ],
    ids=str,
)
def test_which_pools_are_global(pool, expected):
    assert is_global_pool(pool) == expected


def test_global_pools_of_a_network_are_replaced():
    model = pfs.models.resnet20(4).double()
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    network, _ = gate(model, x)
    assert sum(isinstance(m, GlobalPool) for m in network.modules()) == 1
    network.eval(), model.eval()
    assert_same(network(x), model(x))
