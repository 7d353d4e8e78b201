"""How alike the structures of several seeds are, and how one is chosen."""

from __future__ import annotations

import math

import pytest
import torch
from small_nets import Frozen, batches
from structure_cases import chain

import pfs_fast as pfs
from pfs_fast.errors import (
    ConfigError,
    LoaderError,
    StructureError,
)
from pfs_fast.proxies import PROXIES, ShortTraining
from pfs_fast.searching.compare import structure_distance
from pfs_fast.searching.seeds import SearchResults
from pfs_fast.searching.similarity import structure_similarity

MEASURES = ("width_correlation", "share_correlation", "widths", "channels")


# -- similarity ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", MEASURES)
def test_similarity_is_symmetric_with_ones_on_the_diagonal(results, measure):
    matrix = results.similarity(measure=measure)
    assert matrix.shape == (3, 3)
    assert matrix.dtype == torch.float64
    assert torch.equal(matrix, matrix.T)
    assert torch.equal(matrix.diagonal(), torch.ones(3, dtype=torch.float64))
    assert ((matrix >= -1) & (matrix <= 1)).all()
    assert (matrix < 1).any()


@pytest.mark.parametrize("measure", MEASURES)
def test_similarity_follows_the_order_of_the_seeds(results, measure):
    order = [2, 0, 1]
    other = SearchResults([results[i] for i in order])
    expected = results.similarity(0.7, measure=measure)[order][:, order]
    assert torch.equal(other.similarity(0.7, measure=measure), expected)


def test_similarity_is_the_correlation_of_the_numbers_of_kept_channels(results):
    widths = torch.tensor(
        [[len(kept) for kept in s.kept.values()] for s in results.structures_for(0.7)]
    ).double()
    torch.testing.assert_close(results.similarity(0.7), torch.corrcoef(widths))
    shares = widths / torch.tensor(list(results[0].structure.sizes.values()))
    torch.testing.assert_close(
        results.similarity(0.7, measure="share_correlation"), torch.corrcoef(shares)
    )


def test_similarity_of_channels_and_widths_is_one_minus_the_distance(results):
    a, b = results.structures_for(0.6)[:2]
    distance = structure_distance(a, b)
    assert results.similarity(0.6, measure="widths")[0, 1] == 1 - distance.widths
    assert results.similarity(0.6, measure="channels")[1, 0] == 1 - distance.channels


def structure_of(kept: dict[str, int], size: int = 10) -> pfs.Structure:
    """A structure that keeps the first channels of groups of one size."""
    counts = {name: tuple(range(count)) for name, count in kept.items()}
    sizes = dict.fromkeys(kept, size)
    return pfs.Structure(counts, sizes, {}, {}, {}, 1, 1, 1, 1)


@pytest.mark.parametrize("measure", MEASURES[:2])
def test_structures_that_do_not_vary_correlate_with_themselves_only(measure):
    flat = structure_of({"a": 3, "b": 3, "c": 3})
    wide = structure_of({"a": 7, "b": 7, "c": 7})
    steep = structure_of({"a": 1, "b": 2, "c": 3})
    against = structure_of({"a": 3, "b": 2, "c": 1})
    matrix = structure_similarity([flat, wide, steep, against, flat], measure)
    expected = [
        [1, 0, 0, 0, 1],
        [0, 1, 0, 0, 0],
        [0, 0, 1, -1, 0],
        [0, 0, -1, 1, 0],
        [1, 0, 0, 0, 1],
    ]
    torch.testing.assert_close(matrix, torch.tensor(expected).double(), rtol=0, atol=1e-12)


def test_similarity_refuses_an_unknown_measure(results):
    with pytest.raises(
        ConfigError, match=r"^similarity: measure must be one of 'width_correlation', .*, got 'l2'"
    ):
        results.similarity(measure="l2")
    with pytest.raises(ConfigError, match=r"got \['widths'\]"):
        results.similarity(measure=["widths"])


@pytest.mark.parametrize("measure", MEASURES)
def test_similarity_refuses_structures_of_different_networks(results, measure):
    other = pfs.Structure.from_keep(chain(2), torch.ones(2, dtype=torch.bool).numpy())
    with pytest.raises(StructureError, match="must be of the same groups"):
        structure_similarity([results[0].structure, other], measure)


# -- the choice ----------------------------------------------------------------------------------------------------


def test_best_is_the_largest_score_and_the_first_of_equals(results):
    wish = {3: 1.0, 0: 5.0, 7: 5.0}
    assert results.best(by=lambda r: wish[r.config.seed]) is results[1]
    assert results.scores(lambda r: torch.tensor(wish[r.config.seed])) == wish
    assert results.best(by=lambda r: -wish[r.config.seed]) is results[0]


@pytest.mark.parametrize("name", PROXIES)
def test_named_scores_are_their_functions(results, name):
    scores = results.scores(name)
    assert scores == {r.config.seed: PROXIES[name](r) for r in results}
    chosen = results.best(name)
    assert scores[chosen.config.seed] == max(scores.values())


def test_named_scores_say_what_they_say(results):
    assert results.scores("params") == {r.config.seed: r.structure.params for r in results}
    last = [entry["loss"] for entry in results[0].history[-5:]]
    assert results.scores("search_loss")[3] == pytest.approx(-sum(last) / len(last))


def test_there_is_no_choice_unasked(results):
    with pytest.raises(TypeError, match="by"):
        results.best()


@pytest.mark.parametrize("by", ["accuracy", None, 3])
def test_best_refuses_what_is_no_score(results, by):
    with pytest.raises(ConfigError, match=r"by must be one of 'params', .* or a function of"):
        results.best(by)


@pytest.mark.parametrize("score", [math.nan, None, "3", 1j, torch.zeros(2)])
def test_best_refuses_scores_that_cannot_be_compared(results, score):
    with pytest.raises(ConfigError, match=r"by must give a number .* for seed 3"):
        results.best(lambda r: score)


def test_short_training_trains_fresh_slim_networks(results):
    model, state = Frozen(results[0].model), torch.random.get_rng_state()
    short = ShortTraining(batches(), config=pfs.TrainConfig(epochs=2, lr=0.05), repeats=2)
    score = short(results[0])
    model.check()
    assert torch.equal(torch.random.get_rng_state(), state)
    losses = []
    for seed in range(2):
        slim = results[0].slim(seed=seed)
        trained = pfs.train(slim, batches(), config=short.config, progress=False)
        losses.append(trained.history[-1]["loss"])
    assert score == -sum(losses) / 2
    assert losses[0] != losses[1]


def test_short_training_takes_validation_images(results):
    short = ShortTraining(batches(), batches(5, seed=1))
    score = short(results[0])
    slim = results[0].slim(seed=0)
    pfs.train(slim, batches(), config=short.config, progress=False)
    assert score == pfs.evaluate(slim, batches(5, seed=1)).top1


def test_short_training_refuses_bad_arguments():
    with pytest.raises(ConfigError, match="repeats must be a whole number of at least 1, got 0"):
        ShortTraining(batches(), repeats=0)
    with pytest.raises(LoaderError, match="ShortTraining: loader must be re-iterable"):
        ShortTraining(b for b in batches())
    with pytest.raises(LoaderError, match="ShortTraining: val_loader must be re-iterable"):
        ShortTraining(batches(), (b for b in batches()))
