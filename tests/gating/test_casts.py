"""Forwards that cast, in searches of another dtype than the model's, and weights that a hook computes."""

from __future__ import annotations

import pytest
import torch
from small_nets import Net, batches, cbr, conv, head
from torch import nn

import pfs_fast as pfs

CASTS = {
    "float": lambda m, x: m.c(m.b(m.a(x).float())),
    "to": lambda m, x: m.c(m.b(m.a(x).to(torch.float32))),
    "to by name": lambda m, x: m.c(m.b(m.a(x).to(dtype=torch.float32))),
    "double and back": lambda m, x: m.c(m.b(m.a(x).double().float())),
    "mask": lambda m, x: m.c(m.b(m.a(x) * (m.a(x) > 0).float())),
    "images": lambda m, x: m.c(m.b(m.a(x.float()))),
    "ones": lambda m, x: m.c(m.b(m.a(x) * torch.ones_like(x[:, :1], dtype=torch.float32))),
    "sum": lambda m, x: m.c(m.b[2](m.b[1](m.b[0](m.a(x))) + m.d(x).float())),
    "head": lambda m, x: m.c[2](m.c[1](m.c[0](m.b(m.a(x)))).float()),
}


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("precision", ["bf16", "fp64"])
@pytest.mark.parametrize("name", CASTS)
def test_forward_that_casts_is_searched_in_any_precision(name, precision, backend):
    model = Net(CASTS[name], a=cbr(3, 4), b=cbr(4, 5), c=head(5), d=cbr(3, 5))
    config = pfs.SearchConfig(epochs=1, precision=precision, backend=backend)
    result = pfs.search(model, batches(2), 0.9, config=config, progress=False, device="cpu")
    assert all((gates < 1).any() for gates in result.gates.values())


CALLS = []


def computed(module: nn.Module, _inputs: tuple) -> None:
    """As the hook of ``nn.utils.spectral_norm``: the weight is a plain attribute, made before each call."""
    CALLS.append(module.weight_orig.dtype)
    module.weight = module.weight_orig * 2


@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_weight_that_a_hook_computes_is_computed_in_every_step(precision, backend):
    layer = conv(3, 4)
    layer.weight_orig = layer._parameters.pop("weight")
    layer.weight = torch.zeros(())
    layer.register_forward_pre_hook(computed)
    model = nn.Sequential(layer, nn.BatchNorm2d(4), cbr(4, 5), head(5))
    config = pfs.SearchConfig(epochs=1, precision=precision, backend=backend)
    CALLS.clear()
    pfs.search(model, batches(3), 0.9, config=config, progress=False, device="cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    assert CALLS[-3:] == [dtype] * 3
    assert len(CALLS) >= 4  # once or more in the analysis


@pytest.mark.filterwarnings("ignore:.*spectral_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize("backend", ["reference", "fused"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_old_spectral_norm_is_searched(precision, backend):
    layer = nn.utils.spectral_norm(conv(3, 4))
    model = nn.Sequential(layer, nn.BatchNorm2d(4), cbr(4, 5), head(5))
    config = pfs.SearchConfig(epochs=1, precision=precision, backend=backend)
    result = pfs.search(model, batches(3), 0.9, config=config, progress=False, device="cpu")
    assert (result.gates["2.0"] < 1).any()
