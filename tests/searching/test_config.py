"""Options of a search: the paper's defaults, and every value outside its range refused."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from pfs_fast import SearchConfig
from pfs_fast.errors import ConfigError, PfsError
from pfs_fast.searching.config import compute_dtype


def test_config_defaults_are_the_papers_for_cifar():
    config = SearchConfig()
    assert (config.epochs, config.max_steps, config.lr, config.gamma) == (10, None, 0.01, 0.5)
    assert (config.betas, config.eps, config.gate_init) == ((0.9, 0.999), 1e-8, 1.0)
    assert (config.target, config.scope, config.select) == (None, "paper", "last")
    assert config.ranks_by == "gates"


def test_config_imagenet_has_one_pass_and_a_weaker_pull():
    assert SearchConfig.imagenet() == SearchConfig(epochs=1, gamma=0.05)
    assert SearchConfig.imagenet(gamma=0.1, scope="all") == SearchConfig(
        epochs=1, gamma=0.1, scope="all"
    )


def test_ranking_follows_the_scope_unless_it_is_named():
    assert SearchConfig(scope="all").ranks_by == "layerwise"
    assert SearchConfig(scope="all", ranking="gates").ranks_by == "gates"
    assert SearchConfig(ranking="uniform").ranks_by == "uniform"


def test_config_is_frozen_and_comparable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        SearchConfig().lr = 1.0
    assert SearchConfig(betas=[0.9, 0.999]) == SearchConfig()


def test_config_takes_numbers_of_numpy():
    assert SearchConfig(epochs=np.int64(2), lr=np.float32(0.5)).epochs == 2


BAD = [
    ("epochs", 0, "a whole number of at least 1"),
    ("epochs", 2.0, "a whole number of at least 1"),
    ("epochs", None, "a whole number of at least 1"),
    ("epochs", True, "a whole number of at least 1"),
    ("max_steps", 0, "a whole number of at least 1"),
    ("max_steps", "5", "a whole number of at least 1"),
    ("log_every", 0, "a whole number of at least 1"),
    ("seed", -1, "a whole number of at least 0"),
    ("lr", 0, "a finite number above 0"),
    ("lr", -0.1, "a finite number above 0"),
    ("lr", math.nan, "a finite number above 0"),
    ("lr", math.inf, "a finite number above 0"),
    ("lr", "0.1", "a finite number above 0"),
    ("eps", 0.0, "a finite number above 0"),
    ("gamma", -1, "a finite number at least 0"),
    ("gate_init", 0, "a finite number above 0 and at most 1"),
    ("gate_init", 1.5, "a finite number above 0 and at most 1"),
    ("target", 0.0, "a finite number above 0 and at most 1"),
    ("target", 1.01, "a finite number above 0 and at most 1"),
    ("target", math.nan, "a finite number above 0 and at most 1"),
    ("betas", (0.9,), "two numbers"),
    ("betas", (0.9, 1.0), "a finite number at least 0 and below 1"),
    ("betas", (-0.1, 0.9), "a finite number at least 0 and below 1"),
    ("betas", 0.9, "two numbers"),
    ("scope", "some", "one of 'paper', 'all'"),
    ("precision", "int8", "one of 'auto', 'fp64', 'fp32', 'tf32', 'bf16', 'fp16'"),
    ("precision", torch.float32, "one of 'auto', 'fp64', 'fp32', 'tf32', 'bf16', 'fp16'"),
    ("backend", "cuda", "one of 'auto', 'fused', 'reference'"),
    ("select", "first", "one of 'last', 'best'"),
    ("compact", "no", "True or False"),
    ("channels_last", None, "True or False"),
    ("cuda_graph", 1, "True or False"),
    ("cpu_graph", 1, "True or False"),
]


@pytest.mark.parametrize(("name", "value", "rule"), BAD)
def test_config_refuses_values_outside_their_range(name, value, rule):
    with pytest.raises(ConfigError, match=f"SearchConfig: {name} must be {rule}, got ") as caught:
        SearchConfig(**{name: value})
    assert isinstance(caught.value, (PfsError, ValueError))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_compute_dtype_is_the_precisions(name, dtype):
    assert compute_dtype(name, torch.device("cpu")) == dtype


def test_compute_dtype_of_fp16_needs_cuda():
    with pytest.raises(
        ConfigError, match="precision 'fp16' needs a CUDA device, got cpu; use 'bf16' or 'fp32'"
    ):
        compute_dtype("fp16", torch.device("cpu"))


@pytest.mark.parametrize(
    ("bf16", "amx", "dtype"),
    [(0, 0, torch.float32), (1, 0, torch.bfloat16), (0, 1, torch.bfloat16)],
)
def test_compute_dtype_auto_is_bf16_where_it_is_native(monkeypatch, bf16, amx, dtype):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: bool(bf16))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: bool(amx))
    assert compute_dtype("auto", torch.device("cpu")) == dtype
