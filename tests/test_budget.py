from __future__ import annotations

import math

import numpy as np
import pytest

from pfs_fast.budget import Budget, Limits
from pfs_fast.errors import BudgetError

REFERENCE = (1_000_000, 2_000)


@pytest.mark.parametrize(
    ("budget", "limits"),
    [
        (Budget(macs=0.5), Limits(500_000)),
        (Budget(macs=1.0), Limits(1_000_000)),
        (Budget(macs=150_000), Limits(150_000)),
        (Budget(macs=150e3), Limits(150_000)),
        (Budget(macs=2_000_000), Limits(2_000_000)),
        (Budget(params=0.25), Limits(None, 500)),
        (Budget(macs=0.5, params=10, multiple_of=8, min_channels=4), Limits(500_000, 10, 8, 4)),
        (Budget(macs=np.float32(0.5), params=np.int64(10)), Limits(500_000, 10)),
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


@pytest.mark.parametrize("name", ["latency_ms", "peak_activation_bytes"])
def test_limits_of_the_future_are_refused(name):
    with pytest.raises(
        BudgetError,
        match=f"Budget: {name} is not supported yet, got 3; limit macs or params instead",
    ):
        Budget(macs=0.5, **{name: 3})


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
