"""Searches with several seeds, on a small network, and what two of them share."""

from __future__ import annotations

import torch
from small_nets import batches, cbr, head
from torch import nn

import pfs_fast as pfs

SEEDS = (3, 0, 7)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(cbr(3, 6), nn.Dropout(0.2), cbr(6, 8), cbr(8, 5), head(5))


def config(**options) -> pfs.SearchConfig:
    few = {"epochs": 4, "backend": "reference", "precision": "fp64", "lr": 0.1, "target": 0.3}
    return pfs.SearchConfig(**{**few, **options})


def run(model=None, loader=None, seeds=SEEDS, checkpoint=None, val_loader=None, **options):
    return pfs.search(
        network() if model is None else model,
        batches() if loader is None else loader,
        0.5,
        config=config(**options),
        checkpoint=checkpoint,
        progress=False,
        seeds=seeds,
        val_loader=val_loader,
    )


def assert_same(a: pfs.SearchResult, b: pfs.SearchResult) -> None:
    assert torch.equal(a.flat_gates, b.flat_gates)
    assert torch.equal(a.died_at, b.died_at)
    assert a.structure == b.structure
    assert a.config == b.config
    without_time = [[{**e, "seconds": 0} for e in r.history] for r in (a, b)]
    assert without_time[0] == without_time[1]


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)
