"""Early stop: how change is measured, when a search ends by it, and that it resumes bit by bit."""

from __future__ import annotations

import argparse

import numpy as np
import pytest
import torch
from small_nets import batches, tiny
from test_checkpoint import Interrupted, Interrupting, assert_equal, device_loader

import pfs_fast as pfs
from pfs_fast.budgets.cost import CostModel
from pfs_fast.cli import search as cli_search
from pfs_fast.cli.options import data_spec
from pfs_fast.errors import ConfigError, StructureError
from pfs_fast.gating.scope import gated_groups
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.searching.compare import structure_distance
from pfs_fast.searching.stability import Change, StabilityWatch, order_change, structure_change


def run(model=None, loader=None, budget=0.6, checkpoint=None, **options):
    config = pfs.SearchConfig(
        **{"epochs": 40, "backend": "reference", "precision": "fp64", "log_every": 7, **options}
    )
    model, loader = tiny() if model is None else model, batches() if loader is None else loader
    return pfs.search(model, loader, budget, config=config, checkpoint=checkpoint, progress=False)


# -- measures ------------------------------------------------------------------------------------------------------


def test_structure_change_is_the_share_of_channels_that_only_one_keeps():
    a, b = np.array([1, 1, 1, 0, 0], bool), np.array([1, 0, 1, 1, 1], bool)
    assert structure_change(a, b) == structure_change(b, a) == 3 / 7
    assert structure_change(a, a) == 0
    assert structure_change(a, ~a) == 1
    assert structure_change(np.zeros(3, bool), np.zeros(3, bool)) == 0


def test_order_change_is_one_minus_spearmans_correlation():
    generator = np.random.default_rng(0)
    a, b = generator.permutation(50), generator.permutation(50)
    assert order_change(a, b) == pytest.approx(1 - np.corrcoef(a, b)[0, 1], abs=1e-12)
    assert order_change(a, a) == 0
    assert order_change(a, 49 - a) == pytest.approx(2)
    assert order_change(a[:1], b[:1]) == 0


# -- the watch -----------------------------------------------------------------------------------------------------


def watch(patience=20, tolerance=0.0, budget=0.6) -> StabilityWatch:
    model = tiny()
    groups = gated_groups(channel_graph(model, (torch.zeros(1, 3, 6, 6),)), model, "paper")
    model_cost = CostModel(groups)
    limits = pfs.Budget(macs=budget, multiple_of=1).resolve(model_cost.base)
    return StabilityWatch(groups, limits, model_cost, patience, tolerance)


UP = torch.linspace(0.1, 0.9, 8)
NEVER = torch.full((8,), -1, dtype=torch.int32)


def test_watch_is_stable_after_as_many_steps_without_change():
    looks = watch(patience=30)
    assert looks.every == 10
    answers = [looks.look(step, UP, NEVER) for step in (10, 20, 30, 40)]
    assert answers == [False, False, False, True]
    assert looks.last == Change(0.0, 0.0)


def test_watch_sees_a_change_of_the_order_alone():
    looks = watch(patience=10)
    swapped = UP[[1, 0, 2, 3, 4, 5, 6, 7]]  # the two smallest, which no structure keeps
    assert not looks.look(10, UP, NEVER)
    assert not looks.look(20, swapped, NEVER)
    assert looks.last.structure == 0
    assert looks.last.order == pytest.approx(6 * 2 / (8 * 63))
    assert looks.look(30, swapped, NEVER)


def test_watch_is_not_fooled_by_a_structure_that_swings():
    looks = watch(patience=20)
    for step in range(10, 80, 10):  # after 20 steps the same again, after 10 another one
        assert not looks.look(step, UP if step % 20 else UP.flip(0), NEVER)


def test_watch_forgets_what_is_older_than_its_patience():
    looks = watch(patience=20)
    looks.look(10, UP.flip(0), NEVER)
    answers = [looks.look(step, UP, NEVER) for step in (20, 30, 40, 50)]
    assert answers == [False, False, True, True]


def test_watch_breaks_ties_as_the_solver_does():
    """Dead gates are ordered by their step: another order of death is another order."""
    looks, gates = watch(patience=10), UP.clone()
    gates[:3] = 0
    died = NEVER.clone()
    died[:3] = torch.tensor([5, 6, 7], dtype=torch.int32)
    looks.look(10, gates, died)
    assert looks.look(20, gates, died)
    died[:3] = torch.tensor([7, 6, 5], dtype=torch.int32)
    assert not looks.look(30, gates, died)


def test_watch_takes_a_tolerance():
    swapped = UP[[1, 0, 2, 3, 4, 5, 6, 7]]
    strict, loose = watch(patience=10, tolerance=0.02), watch(patience=10, tolerance=0.03)
    for looks in (strict, loose):
        looks.look(10, UP, NEVER)
    assert not strict.look(20, swapped, NEVER)
    assert loose.look(20, swapped, NEVER)


def test_watch_is_never_stable_with_gates_that_are_not_finite():
    looks = watch(patience=10)
    gates = UP.clone()
    gates[0] = float("nan")
    assert not any(looks.look(step, gates, NEVER) for step in (10, 20, 30))
    assert looks.last is None


@pytest.mark.parametrize(("patience", "every"), [(1, 10), (100, 10), (205, 20), (1000, 100)])
def test_watch_looks_ten_times_in_its_patience(patience, every):
    looks = watch(patience)
    assert looks.every == every
    assert [s for s in range(1, 3 * every) if looks.due(s)] == [every, 2 * every]


# -- the search ----------------------------------------------------------------------------------------------------

SETTLED = {"lr": 0.2, "gamma": 20.0, "target": 0.4, "patience": 30, "tolerance": 0.2}


def test_search_stops_when_stable_and_says_so():
    model = tiny()
    result = run(model, **SETTLED)
    whole = run(model, **{**SETTLED, "patience": None})
    assert result.ended == "stable"
    assert result.steps % 10 == 0
    assert 30 < result.steps < whole.steps == 120
    last = result.history[-1]
    assert last["step"] == result.steps
    assert max(last["structure_change"], last["order_change"]) <= 0.2
    assert f"ended after {result.steps} steps, stable: over the last 30 steps" in result.report()
    # up to there it is the same search
    cut = run(model, **{**SETTLED, "patience": None, "max_steps": result.steps})
    assert torch.equal(cut.flat_gates, result.flat_gates)
    assert torch.equal(cut.died_at, result.died_at)


def test_search_that_never_settles_ends_by_its_steps():
    result = run(epochs=14, patience=30, tolerance=0.0)
    assert (result.ended, result.steps) == ("steps", 42)
    assert result.history[-1]["order_change"] > 0
    assert "ended after 42 steps, not yet stable: over the last 30 steps" in result.report()


def test_search_shorter_than_its_patience_says_so():
    result = run(**SETTLED, epochs=2)
    assert (result.ended, result.steps) == ("steps", 6)
    assert result.history[-1]["structure_change"] is None
    assert "not yet stable: shorter than the patience of 30 steps" in result.report()


def test_search_without_patience_knows_nothing_of_it():
    result = run(epochs=1)
    assert (result.ended, result.steps) == ("steps", 3)
    assert "ended" not in result.history[-1]
    assert "ended after" not in result.report()


def test_result_keeps_how_it_ended_in_its_file(tmp_path):
    result = run(**SETTLED)
    result.save(tmp_path / "search")
    loaded = pfs.SearchResult.load(tmp_path / "search")
    assert (loaded.ended, loaded.steps) == (result.ended, result.steps)
    assert loaded.config.patience == 30
    assert loaded.report() == result.report()


@pytest.mark.parametrize("passes", [3, 8, 12])
def test_search_with_patience_resumes_bit_by_bit(tmp_path, passes):
    model, path = tiny(), tmp_path / "search.ckpt"
    straight = run(model, device_loader(), **SETTLED)
    assert straight.ended == "stable"
    assert straight.steps > 3 * passes
    with pytest.raises(Interrupted):
        run(model, Interrupting(device_loader(), passes), checkpoint=path, **SETTLED)
    assert_equal(run(model, device_loader(), checkpoint=path, **SETTLED), straight)


def test_search_that_ended_early_is_not_run_again(tmp_path):
    model, path = tiny(), tmp_path / "search.ckpt"
    straight = run(model, device_loader(), checkpoint=path, **SETTLED)
    again = run(model, Interrupting(device_loader(), 1), checkpoint=path, **SETTLED)
    assert_equal(again, straight)
    assert again.ended == "stable"


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        ({"patience": 0}, "patience must be a whole number of at least 1"),
        ({"patience": 2.5}, "patience must be a whole number of at least 1"),
        ({"patience": True}, "patience must be a whole number of at least 1"),
        ({"tolerance": -0.1}, "tolerance must be a finite number at least 0 and at most 1"),
        ({"tolerance": float("nan")}, "tolerance must be a finite number at least 0 and at most 1"),
        ({"tolerance": None}, "tolerance must be a finite number at least 0 and at most 1"),
    ],
)
def test_config_refuses_bad_patience_and_tolerance(options, rule):
    with pytest.raises(ConfigError, match=f"SearchConfig: {rule}, got "):
        pfs.SearchConfig(**options)


# -- two results ---------------------------------------------------------------------------------------------------


def structure(kept: dict[str, tuple[int, ...]], size: int = 4) -> pfs.Structure:
    return pfs.Structure(kept, dict.fromkeys(kept, size), {}, {}, {}, 1, 1, 2, 2)


def test_structure_distance_counts_channels_and_widths():
    a = structure({"x": (0, 1), "y": (0,), "z": (0, 1, 2)})
    b = structure({"x": (0, 2), "y": (0, 1), "z": (1, 2, 3)})
    distance = structure_distance(a, b)
    assert distance.channels == 5 / 13
    assert distance.widths == 1 / 13
    assert distance.width_correlation == pytest.approx(np.corrcoef([2, 1, 3], [2, 2, 3])[0, 1])
    assert str(distance) == "38.5% of the channels differ, 7.7% in number; correlation of the widths 0.8660"  # fmt: skip
    assert structure_distance(a, a).width_correlation == 1
    flat = structure({"x": (0,), "y": (0,), "z": (0,)})
    assert structure_distance(a, flat).width_correlation == 0


def test_structure_distance_of_results_takes_a_budget():
    model = tiny()
    early, late = run(model, epochs=2), run(model, epochs=20)
    assert structure_distance(early, early).channels == 0
    expected = structure_distance(early.structure_for(0.8), late.structure_for(0.8))
    assert structure_distance(early, late, 0.8) == expected
    assert structure_distance(early, late) == structure_distance(early.structure, late.structure)


def test_structure_distance_refuses_structures_of_different_networks():
    with pytest.raises(StructureError, match=r"of the same groups, got others in \['y'\]"):
        structure_distance(structure({"x": (0,)}), structure({"x": (0,), "y": (1,)}))


# -- command line --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [([], (None, 0.1)), (["--patience", "200", "--tolerance", "0.05"], (200, 0.05))],
)
def test_command_line_takes_patience_and_tolerance(words, expected):
    parser = argparse.ArgumentParser()
    cli_search.add_arguments(parser)
    arguments = parser.parse_args(words)
    config = cli_search._config(arguments, data_spec(arguments))
    assert (config.patience, config.tolerance) == expected
