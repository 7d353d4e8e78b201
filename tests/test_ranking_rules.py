"""Rules of the ranking experiment: every one gives finite scores, and orders channels as it says."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from small_nets import cbr, head
from torch import nn

from benchmarks.experiments.ranking import RECIPE, known_rows, report, structure
from benchmarks.experiments.ranking_rules import RULES, Measured, rule_of
from pfs_fast.graph.analysis import analyse

SIZES = (8, 8, 16)


@pytest.fixture(scope="module")
def measured() -> Measured:
    """An early, expensive group; the same behind a pool; a late, cheap one. Gates fall within each."""
    model = nn.Sequential(
        cbr(3, 8), nn.MaxPool2d(2), cbr(8, 8), nn.MaxPool2d(2), cbr(8, 16), head(16)
    )
    groups = analyse(model, torch.zeros(1, 3, 16, 16))
    assert tuple(g.size for g in groups.groups) == SIZES
    gates = np.concatenate([np.linspace(1, 0.1, size) for size in SIZES])
    saliency = np.random.default_rng(0).random(sum(SIZES))
    return Measured(groups, gates, np.full(sum(SIZES), -1), saliency, saliency[::-1].copy())


def widths(measured: Measured, rule: str) -> list[int]:
    return [len(kept) for kept in structure(measured, rule, 0.5).kept.values()]


@pytest.mark.parametrize("rule", RULES)
def test_rule_fills_the_budget(measured: Measured, rule: str):
    cut = structure(measured, rule, 0.5)
    assert np.isfinite(RULES[rule](measured)).all()
    assert 0.35 < cut.macs_share <= 0.5


def test_a_share_may_refer_to_another_network(measured: Measured):
    whole = structure(measured, "uniform", 1.0)
    cut = structure(measured, "uniform", 0.5, reference=(whole.macs // 2, whole.params // 2))
    assert 0.15 * whole.macs < cut.macs <= 0.25 * whole.macs


def test_uniform_keeps_the_same_share_everywhere(measured: Measured):
    shares = [width / size for width, size in zip(widths(measured, "uniform"), SIZES, strict=True)]
    assert max(shares) - min(shares) <= 1 / min(SIZES)


def test_costs_move_the_budget_from_early_to_late(measured: Measured):
    even, late = widths(measured, "uniform"), widths(measured, "cost")
    assert late[0] < even[0] and late[-1] > even[-1]


def test_dead_gates_enter_after_the_living_and_the_later_dead_first(measured: Measured):
    gates, died_at = measured.gates.copy(), measured.died_at.copy()
    gates[[0, 1]], died_at[[0, 1]] = 0, (5, 9)
    order = Measured(
        measured.groups, gates, died_at, measured.early, measured.late
    ).order_of_gates()
    assert order[0] < order[1] < np.delete(order, [0, 1]).min()


def test_shares_follow_a_mean_and_the_costs(measured: Measured):
    assert widths(measured, "share:gates^0/macs^0") == widths(measured, "uniform")
    even, late = widths(measured, "uniform"), widths(measured, "share:gates^0/macs^0.5")
    assert late[0] < even[0] and late[-1] > even[-1]
    gates = measured.gates.copy()
    gates[: SIZES[0]] /= 4
    weak = Measured(measured.groups, gates, measured.died_at, measured.early, measured.late)
    assert widths(weak, "share:gates^0.5/macs^0")[0] < even[0]


def test_shape_moves_the_budget_by_place_alone(measured: Measured):
    even = widths(measured, "uniform")
    assert widths(measured, "shape:0,0,0") == widths(measured, "shape:0,0,1") == even  # no streams
    late, middle = widths(measured, "shape:0.8,0,0"), widths(measured, "shape:0,-0.8,0")
    assert late[0] < even[0] and late[-1] > even[-1]
    assert middle[1] > even[1] and middle[0] < even[0]


def test_weights_are_the_shares(measured: Measured):
    assert widths(measured, "weights:2,2,2") == widths(measured, "uniform")
    first, _, last = widths(measured, "weights:1,1,0.5")
    assert first / SIZES[0] == pytest.approx(2 * last / SIZES[2], rel=0.2)
    for wrong in ("weights:1,1", "weights:1,0,1"):
        with pytest.raises(ValueError, match="one positive number for each of the 3 groups, got"):
            widths(measured, wrong)


def test_an_unknown_rule_is_none():
    with pytest.raises(KeyError):
        rule_of("share:params^1/macs^1")


def test_report_averages_trainings_and_pairs_seeds():
    def row(rule: str, seed: int, accuracy: float, repeat: int = 0) -> dict:
        return {
            "network": "net",
            "share": 0.5,
            "rule": rule,
            "seed": seed,
            "repeat": repeat,
            "accuracy": accuracy,
            "params": 10 * (seed + 1),
            "images": 1000,
        }

    rows = [row("uniform", 0, 0.6), row("uniform", 1, 0.7), row("random-0", 0, 0.5)]
    rows += [row("random-1", 0, 0.4), row("gate", 2, 0.1)]
    rows += [row("layerwise", 0, 0.61), row("layerwise", 0, 0.65, 1), row("layerwise", 1, 0.71)]
    table = report(rows).splitlines()[-4:]
    assert table == [
        "| layerwise | 67.00 | 2 | +2.00 | 1.41 | 2 | 13 |",
        "| uniform | 65.00 | 2 | +0.00 | 0.00 | 2 | 15 |",
        "| random | 45.00 | 2 | -15.00 | 7.07 | 2 | 10 |",
        "| gate | 10.00 | 1 | - | - | 0 | 30 |",
    ]


def test_known_trainings_are_those_of_this_recipe_and_length(tmp_path):
    row = {"network": "resnet20", "seed": 3, "share": 0.5, "rule": "gate", "images": 120_000}
    rows = [
        row | {"recipe": RECIPE, "repeat": 1},
        row | {"recipe": {"lr": RECIPE["lr"]}},  # an older row, which does not say all
        row | {"recipe": RECIPE | {"lr": 0.05}, "seed": 4},
        row | {"seed": 5},
        row | {"recipe": RECIPE, "seed": 6, "images": 60_000},
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows))
    known = known_rows(file, 120_500, 64)
    assert list(known) == [("resnet20", 3, 0.5, "gate", repeat) for repeat in (1, 0)]
