from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch

from pfs_fast.budgets.budget import Budget, Limits
from pfs_fast.errors import BudgetError

REFERENCE = (1_000_000, 2_000)


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        (Budget(macs=0.5, multiple_of=1), Limits(500_000)),
        (Budget(macs=1.0, multiple_of=1), Limits(1_000_000)),
        (Budget(macs=150_000, multiple_of=1), Limits(150_000)),
        (Budget(macs=150e3, multiple_of=1), Limits(150_000)),
        (Budget(macs=2_000_000, multiple_of=1), Limits(2_000_000)),
        (Budget(params=0.25, multiple_of=1), Limits(None, 500)),
        (Budget(macs=0.5, params=10, multiple_of=8, min_channels=4), Limits(500_000, 10, 8, 4)),
        (Budget(macs=np.float32(0.5), params=np.int64(10), multiple_of=1), Limits(500_000, 10)),
    ],
)
def test_resolve_gives_absolute_limits(budget, limits):
    assert budget.resolve(REFERENCE) == limits


@pytest.mark.parametrize(
    ("share", "reference", "limit"), [(0.3, 10, 3), (0.29, 100, 29), (0.999, 10, 9), (1e-9, 10, 0)]
)
def test_share_is_taken_as_written_and_rounded_down(share, reference, limit):
    assert Budget(macs=share).resolve((reference, 1)).macs == limit


def test_share_of_a_huge_network_is_exact():
    assert Budget(macs=0.1).resolve((10**17 + 9, 1)).macs == 10**16


def test_of_takes_shares_numbers_and_budgets():
    budget = Budget(params=0.5)
    assert Budget.of(budget) is budget
    assert Budget.of(0.5) == Budget(macs=0.5)
    assert Budget.of(150_000) == Budget(macs=150_000)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("0.5", Budget(macs=0.5)),
        ("1.0", Budget(macs=1.0)),
        ("50%", Budget(macs=0.5)),
        ("macs=150M", Budget(macs=150_000_000)),
        ("macs = 1.5G", Budget(macs=1_500_000_000)),
        ("macs=0.313k", Budget(macs=313)),
        ("1e6", Budget(macs=1_000_000)),
        ("params=1M,multiple_of=8", Budget(params=1_000_000, multiple_of=8)),
        ("0.5, params=.25, min_channels=2", Budget(macs=0.5, params=0.25, min_channels=2)),
        ("macs=0.5,latency_ms=20,params=1M", Budget(macs=0.5, latency_ms=20, params=1_000_000)),
        ("latency_ms=1", Budget(latency_ms=1.0)),
        (
            "latency_ms=2.5,batch=8,device=cuda:1,precision=bf16,threads=2",
            Budget(latency_ms=2.5, batch=8, device="cuda:1", precision="bf16", threads=2),
        ),
        ("weight_bytes=4MiB", Budget(weight_bytes=4 * 2**20)),
        ("peak_activation_bytes=320k", Budget(peak_activation_bytes=320_000)),
        ("peak_activation_bytes=0.5", Budget(peak_activation_bytes=0.5)),
        ("0.5,multiple_of=auto", Budget(macs=0.5, multiple_of="auto")),
    ],
)
def test_parse_reads_the_command_line_form(text, budget):
    parsed = Budget.parse(text)
    assert parsed == budget
    assert type(parsed.macs) is type(budget.macs)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a value must be a number such as 0.5"),
        ("half", "a value must be a number such as 0.5, 50%, 150M or 1000000, got 'half'"),
        ("macs=", "a value must be a number"),
        ("flops=1M", "key must be one of macs, params, .* got 'flops'"),
        ("0.5,macs=1M", "each key must be given once, got 'macs' twice"),
        ("-0.5", "a value must be a number"),
        ("150%", "share in \\(0, 1\\]"),
        ("multiple_of=8", "at least one limit must be set"),
        ("1", "got the integer 1; write 1.0 for 100 %"),
        ("macs=0", "macs must be above 0, got 0"),
        ("nan", "a value must be a number"),
        ("latency_ms=fast", "a value must be a number"),
        ("latency_ms=150%", "latency_ms must be in milliseconds, never a share, got '150%'"),
        ("0.5,batch=0", "batch must be a whole number of at least 1, got 0"),
        ("0.5,ignore=fc", "key must be one of macs, params, .* got 'ignore'"),
        ("0.5,multiple_of=1.5", "multiple_of must be a whole number of channels, got 1.5"),
    ],
)
def test_parse_names_bad_text(text, message):
    with pytest.raises(BudgetError, match=message):
        Budget.parse(text)


@pytest.mark.parametrize("name", ["macs", "params"])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "must be above 0, got 0; pass a share in"),
        (0.0, "must be above 0"),
        (-0.5, "must be above 0, got -0.5"),
        (-3, "must be above 0"),
        (math.nan, "must be finite, got nan; leave it out for no limit"),
        (math.inf, "must be finite, got inf"),
        (True, "must be a number, got True; pass a share"),
        ("0.5", "must be a number, got '0.5'; use Budget.parse for text"),
        ([0.5], r"must be a number, got \[0.5\]"),
        (0.5j, "must be a number"),
        (1.5, "a share must be in \\(0, 1\\]; an absolute limit is a whole number"),
        (1, "got the integer 1; write 1.0 for 100 %"),
    ],
)
def test_bad_limits_are_named(name, value, message):
    with pytest.raises(BudgetError, match=f"Budget: {name} {message}|Budget: {name} .*{message}"):
        Budget(**{name: value})


@pytest.mark.parametrize("name", ["multiple_of", "min_channels"])
@pytest.mark.parametrize("value", [0, -1, 1.5, 8.0, True, "8", None, math.nan])
def test_bad_counts_are_named(name, value):
    with pytest.raises(
        BudgetError, match=f"Budget: {name} must be (a whole number|at least 1).* got {value!r}"
    ):
        Budget(macs=0.5, **{name: value})


BAD = {
    "latency 0": ({"latency_ms": 0}, "latency_ms must be above 0, got 0; pass milliseconds, e.g. 20"),
    "latency negative": ({"latency_ms": -2.5}, "latency_ms must be above 0, got -2.5"),
    "latency NaN": ({"latency_ms": math.nan}, "latency_ms must be a finite number of milliseconds, got nan"),
    "latency infinite": ({"latency_ms": math.inf}, "latency_ms must be a finite number"),
    "latency text": ({"latency_ms": "20"}, "latency_ms must be a finite number of milliseconds, got '20'"),
    "latency True": ({"latency_ms": True}, "latency_ms must be a finite number of milliseconds, got True"),
    "activations above 1": ({"peak_activation_bytes": 1.5}, r"peak_activation_bytes must be a share in \(0, 1\]"),
    "weights 0": ({"weight_bytes": 0}, "weight_bytes must be above 0, got 0"),
    "weights the integer 1": ({"weight_bytes": 1}, "weight_bytes .* got the integer 1"),
    "multiple of text": ({"macs": 0.5, "multiple_of": "8"}, "multiple_of must be a whole number of channels, got '8'"),
    "widths text": ({"macs": 0.5, "widths": "layer3"}, r"widths must map patterns to \(least, most\), got 'layer3'; write e.g."),
    "widths a number": ({"macs": 0.5, "widths": 8}, "widths must map patterns"),
    "widths of numbers": ({"macs": 0.5, "widths": {3: (1, 2)}}, r"widths must map patterns to .*, got \(3, \(1, 2\)\)"),
    "width one number": ({"macs": 0.5, "widths": {"a": 8}}, r"widths\['a'\] must be \(least, most\), got 8; write None for an open end"),
    "width open": ({"macs": 0.5, "widths": {"a": (None, None)}}, r"widths\['a'\] must be \(least, most\), got \(None, None\)"),
    "width of three": ({"macs": 0.5, "widths": {"a": (1, 2, 3)}}, r"widths\['a'\] must be \(least, most\)"),
    "width turned round": ({"macs": 0.5, "widths": {"a": (9, 8)}}, r"widths\['a'\] must have its least at or below its most, got \(9, 8\); swap them"),
    "width 0": ({"macs": 0.5, "widths": {"a": (0, 8)}}, r"whole numbers of channels or shares in \(0, 1\], got 0; write e.g. 8 or 0.5"),
    "width 1.5": ({"macs": 0.5, "widths": {"a": (None, 1.5)}}, r"whole numbers of channels or shares in \(0, 1\], got 1.5"),
    "width True": ({"macs": 0.5, "widths": {"a": (True, 8)}}, "whole numbers of channels or shares .*, got True"),
    "ignore text": ({"macs": 0.5, "ignore": "fc"}, r'ignore must be a list of names or patterns, got \'fc\'; write e.g. \["layer4'),
    "ignore None": ({"macs": 0.5, "ignore": None}, "ignore must be a list of names"),
    "ignore empty name": ({"macs": 0.5, "ignore": [""]}, "ignore must hold names or patterns, got ''"),
    "ignore modules": ({"macs": 0.5, "ignore": [object]}, "ignore must hold names or patterns, got <class"),
    "batch 0": ({"macs": 0.5, "batch": 0}, "batch must be a whole number of at least 1, got 0"),
    "batch of a half": ({"macs": 0.5, "batch": 0.5}, "batch must be a whole number of at least 1, got 0.5"),
    "threads 0": ({"macs": 0.5, "threads": 0}, "threads must be a whole number of at least 1, got 0"),
    "precision": ({"macs": 0.5, "precision": "int8"}, "precision must be one of 'fp64', 'fp32', 'bf16', 'fp16', got 'int8'"),
    "device of no kind": ({"macs": 0.5, "device": "gpu"}, r"device must be 'cpu', 'cuda' or 'cuda:<index>', got 'gpu'"),
    "device meta": ({"macs": 0.5, "device": "meta"}, "device must be a CPU or CUDA device, got 'meta'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_values_are_named(case):
    values, message = BAD[case]
    with pytest.raises(BudgetError, match=f"^Budget: .*{message}"):
        Budget(**values)


def test_every_limit_resolves_to_absolute_numbers():
    budget = Budget(
        macs=0.5,
        latency_ms=20,
        peak_activation_bytes=0.25,
        weight_bytes=0.5,
        widths={"a.*": (8, 0.5)},
        ignore=["b"],
        batch=4,
        precision="bf16",
        device="cpu",
    )
    limits = budget.resolve(REFERENCE, whole_peak=1003)
    assert limits.asked() == {
        "macs": 500_000,
        "weight_bytes": 2_000,  # half of 2,000 parameters of two bytes
        "peak_activation_bytes": 250,
        "latency_ms": 20.0,
    }
    assert limits.widths == (("a.*", (8, 0.5)),) and limits.ignore == ("b",)
    assert (limits.run.batch, limits.run.precision, limits.run.device) == (4, "bf16", "cpu")


def test_limits_name_what_exceeds_them():
    limits = Limits(macs=10, latency_ms=2.0, peak_activation_bytes=7)
    assert limits.exceeded({"macs": 11, "latency_ms": 2.0, "peak_activation_bytes": 8}) == [
        "macs",
        "peak_activation_bytes",
    ]
    assert limits.exceeded({"macs": 10}) == []


def test_automatic_multiple_follows_the_device(monkeypatch):
    for vectors, multiple in [("AVX512", 16), ("AVX2", 8), ("DEFAULT", 8), ("SVE256", 8)]:
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda v=vectors: v)
        limits = Budget(macs=0.5, device="cpu").resolve(REFERENCE)
        assert (limits.multiple_of, limits.preferred) == (multiple, True)
    elsewhere = Budget(macs=0.5, device="cuda:99").resolve(REFERENCE)
    assert (elsewhere.multiple_of, elsewhere.preferred) == (8, True)
    strict = Budget(macs=0.5, multiple_of=4, device="cuda:99").resolve(REFERENCE)
    assert (strict.multiple_of, strict.preferred) == (4, False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for capability, precision, multiple in [
        ((9, 0), "fp32", 8),
        ((8, 0), "bf16", 8),
        ((7, 5), "fp16", 8),
        ((7, 5), "fp32", 1),
        ((7, 5), "bf16", 1),
        ((6, 1), "fp16", 1),
        ((9, 0), "fp64", 1),
    ]:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        budget = Budget(macs=0.5, multiple_of="auto", device="cuda", precision=precision)
        assert budget.resolve(REFERENCE).multiple_of == multiple


def test_budget_comes_back_from_json():
    budget = Budget(
        macs=0.5, widths={"a": (8, None), "b*": (None, 0.5)}, ignore={"x", "c"}, device="cuda:3"
    )
    assert Budget(**json.loads(json.dumps(asdict(budget)))) == budget
    assert budget.ignore == ("c", "x")


def test_budget_without_a_limit_is_refused():
    with pytest.raises(BudgetError, match="Budget: at least one limit must be set, got none"):
        Budget(multiple_of=8)
    with pytest.raises(
        BudgetError, match="budget must be a share, a number of MACs or a Budget, got None"
    ):
        Budget.of(None)


def test_limits_allow_costs_up_to_the_limit():
    limits = Limits(macs=10, params=5)
    assert limits.allow((10, 5)) and not limits.allow((11, 5)) and not limits.allow((10, 6))
    assert Limits(macs=10).allow((10, 10**9))


def test_budget_prints_its_limits():
    assert str(Budget(macs=0.5, params=1_000_000, multiple_of=8)) == (
        "macs <= 0.5 of the reference, params <= 1,000,000, multiple_of = 8"
    )
    budget = Budget(
        latency_ms=20,
        peak_activation_bytes=0.5,
        weight_bytes=0.25,
        multiple_of=1,
        widths={"a*": (8, None)},
        ignore=["b"],
        batch=4,
    )
    assert str(budget) == (
        "weight_bytes <= 0.25 of the reference, peak_activation_bytes <= 0.5 of the whole network, latency <= 20 ms, "
        "multiple_of = 1, width of a* in 8.., ignore b, batch 4"
    )
