"""Forwards that cast: a search in bf16 takes them as one in float32 does, or says what to do."""

from __future__ import annotations

import pytest
import torch
from small_nets import Net, batches, cbr, conv, head
from torch import nn

import pfs_fast as pfs
from pfs_fast import _library
from pfs_fast.errors import ModelError

BACKENDS = [
    "reference",
    pytest.param(
        "fused",
        marks=pytest.mark.skipif(not _library.is_loaded(), reason="needs the compiled operators"),
    ),
]


def masked(y):
    return y * (y > 0).float()


def summed(m, x):
    y = m.a(x)
    return m.h(m.c(m.bn(m.b(y)) + masked(y)))


NETWORKS = {
    "convolution": lambda: Net(
        lambda m, x: m.h(m.b(m.a(x.float()).float()).float()), a=cbr(3, 6), b=cbr(6, 8), h=head(8)
    ),
    "mask": lambda: Net(lambda m, x: m.h(m.b(masked(m.a(x)))), a=cbr(3, 6), b=cbr(6, 8), h=head(8)),
    "sum": lambda: Net(
        summed, a=cbr(3, 6), b=conv(6, 6), bn=nn.BatchNorm2d(6), c=cbr(6, 8), h=head(8)
    ),
    "linear": lambda: Net(
        lambda m, x: m.fc(m.a(x).mean((2, 3)).float()), a=cbr(3, 6), fc=nn.Linear(6, 4)
    ),
    "others": lambda: Net(
        lambda m, x: m.h(m.b(m.p(masked(m.g(masked(m.t(masked(m.a(x))))))))),
        a=cbr(3, 8),
        t=nn.ConvTranspose2d(8, 8, 2),
        g=nn.GroupNorm(2, 8),
        p=nn.PReLU(8),
        b=nn.Sequential(cbr(8, 8), cbr(8, 8)),
        h=head(8),
    ),
}


def search(make, precision, backend):
    torch.manual_seed(0)
    config = pfs.SearchConfig(epochs=3, backend=backend, precision=precision, scope="all")
    loader = batches()
    return pfs.search(make(), loader, 0.9, config=config, val_loader=loader, progress=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", NETWORKS)
def test_network_that_casts_is_searched_in_bf16_as_in_float32(name, backend):
    exact, low = (search(NETWORKS[name], p, backend) for p in ("fp32", "bf16"))
    torch.testing.assert_close(low.flat_gates, exact.flat_gates, rtol=0, atol=0.03)
    assert [e["loss"] for e in low.history] == pytest.approx(
        [e["loss"] for e in exact.history], rel=0.02
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_operation_that_cannot_mix_dtypes_is_told_with_its_repair(backend):
    def make():
        return Net(
            lambda m, x: m.h(m.b(m.a(x))) + (x.float() @ x).mean(),
            a=cbr(3, 6),
            b=cbr(6, 8),
            h=head(8),
        )

    with pytest.raises(
        ModelError, match=r"model must run in bf16.*use SearchConfig\(precision='fp32'\)"
    ):
        search(make, "bf16", backend)
    assert search(make, "fp32", backend).history
