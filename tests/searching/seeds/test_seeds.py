"""Searches from several random initialisations: what a seed changes, and the sequence of their results."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from seed_searches import SEEDS, assert_same, config, network, run, same_weights
from small_nets import Frozen, batches, tiny
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pfs_fast as pfs
from pfs_fast._library import is_loaded
from pfs_fast.errors import (
    BudgetError,
    ConfigError,
    LoaderError,
    ModelError,
    NonFiniteLossError,
    StructureError,
)
from pfs_fast.searching.seeds import SearchResults, fresh_copy

BACKENDS = ["reference", pytest.param("fused", marks=pytest.mark.skipif(not is_loaded(), reason="needs the compiled operators"))]  # fmt: skip


# -- what a seed changes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_seed_is_a_plain_search_of_a_freshly_initialised_copy(backend):
    model = network()
    for seed, result in zip(SEEDS, run(model, backend=backend), strict=True):
        plain = pfs.search(
            fresh_copy(model, seed),
            batches(),
            0.5,
            config=config(backend=backend, seed=seed),
            progress=False,
        )
        assert isinstance(plain, pfs.SearchResult)
        assert_same(result, plain)


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_seeds_give_the_same_bits_whatever_the_model_holds(backend):
    other = network()
    with torch.no_grad():
        for tensor in other.state_dict().values():
            tensor.fill_(2)
    torch.manual_seed(123)
    for a, b in zip(run(backend=backend), run(other, backend=backend, seed=5), strict=True):
        assert_same(a, b)


def test_a_seed_does_not_depend_on_the_others(results):
    assert_same(run(seeds=[0])[0], results[1])
    assert [r.config.seed for r in run(seeds=range(2))] == [0, 1]


def test_seeds_differ(results):
    for a, b in itertools.combinations(results, 2):
        assert not torch.equal(a.flat_gates, b.flat_gates)
        assert not same_weights(a.model, b.model)


def test_the_users_model_and_random_state_are_left_alone():
    model = network()
    model(torch.zeros(2, 3, 6, 6)).sum().backward()
    frozen, state = Frozen(model), torch.random.get_rng_state()
    run(model)
    frozen.check()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_every_result_knows_the_weights_that_it_was_found_on(results):
    for seed, result in zip(SEEDS, results, strict=True):
        assert same_weights(result.model, fresh_copy(network(), seed))
    kept = list(results[0].structure.layers["0.0"])
    inherited = results[0].slim(weights="inherit")[0][0].weight
    assert torch.equal(inherited, fresh_copy(network(), SEEDS[0])[0][0].weight[kept])


def test_fresh_copy_starts_batch_norms_anew():
    model = network()
    model(torch.randn(4, 3, 6, 6))
    assert model[0][1].running_mean.any()
    assert not fresh_copy(model, 0)[0][1].running_mean.any()


def test_a_shuffling_data_loader_is_seeded_too():
    images = TensorDataset(torch.randn(12, 3, 6, 6), torch.arange(12) % 4)
    a, b = (run(loader=DataLoader(images, 4, shuffle=True)) for _ in range(2))
    for x, y in zip(a, b, strict=True):
        assert_same(x, y)


def test_progress_names_the_seed(capsys):
    pfs.search(network(), batches(), 0.5, config=config(), seeds=[4, 2])
    shown = capsys.readouterr().err
    assert "seed 4 (1/2)" in shown
    assert "seed 2 (2/2)" in shown


class Odd(nn.Module):
    """A parameter that nobody knows how to draw."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((1,), 0.7))
        self.rest = tiny()

    def forward(self, x):
        return self.rest(x) * self.scale


def test_parameters_without_an_initialiser_are_named():
    with pytest.warns(UserWarning, match=r"search: no initialiser is known for scale; they keep"):
        (result,) = run(Odd(), seeds=[1])
    assert float(result.model.scale.detach()) == pytest.approx(0.7)


def test_a_model_that_cannot_be_drawn_anew_is_an_error():
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3))

        def forward(self, x):
            return x.mean((2, 3)) @ self.weight.T

    with pytest.raises(ModelError, match=r"search: model must have weights .* for weight; give"):
        run(Fixed())


# -- bad input -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seeds", "message"),
    [
        ([], r"seeds must be a sequence of at least one integer, got \[\]; write seeds="),
        (3, r"seeds must be a sequence of at least one integer, got 3; write seeds="),
        ({0, 1}, r"seeds must be a sequence of at least one integer, got \{0, 1\}"),
        ("012", r"seeds must be a sequence .*, got '012'"),
        ((s for s in (0, 1)), r"seeds must be a sequence .*, got <generator"),
        ([0, 1.0], r"seeds must be whole numbers from 0 to 2\*\*64 - 1, got 1\.0"),
        ([True], r"seeds must be whole numbers .*, got True"),
        ([-1], r"seeds must be whole numbers .*, got -1"),
        ([2**64], r"seeds must be whole numbers .*, got 18446744073709551616"),
        ([0, 2, 1, 2, 0], r"seeds must be different, got \[0, 2\] more than once"),
    ],
)
def test_bad_seeds_are_an_error_before_anything_runs(seeds, message):
    with pytest.raises(ConfigError, match=f"^search: {message}"):
        run(loader=[], seeds=seeds)


def test_a_generator_serves_one_seed_only():
    assert len(run(loader=(b for b in batches()), seeds=[0], epochs=1)) == 1
    with pytest.raises(LoaderError, match="re-iterable for 2 passes, got a generator"):
        run(loader=(b for b in batches()), seeds=[0, 1], epochs=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": [0, 1], "epochs": 1}, "val_loader must be re-iterable for 2 passes, got a gen"),
        ({"seeds": None, "epochs": 2}, "val_loader must be re-iterable for 2 passes, got a gen"),
    ],
)
def test_validation_batches_must_last_for_all_passes(options, message):
    with pytest.raises(LoaderError, match=f"^search: {message}"):
        run(loader=[], val_loader=(b for b in batches()), **options)


def test_validation_batches_must_be_iterable():
    with pytest.raises(LoaderError, match=r"^search: val_loader must be an iterable .*, got int"):
        run(loader=[], val_loader=3, seeds=[0])


def test_a_bad_budget_is_an_error_before_the_first_seed():
    with pytest.raises(BudgetError):
        pfs.search(network(), [], 1.5, seeds=[0, 1])


def test_a_loss_that_becomes_nan_leaves_the_seeds_before():
    class Loader:
        passes = 0

        def __iter__(self):
            self.passes += 1
            for images, labels in batches():
                yield images * (math.nan if self.passes == 6 else 1), labels

    with pytest.raises(NonFiniteLossError, match=r"\(at seed 0\)$") as caught:
        run(loader=Loader())
    assert caught.value.results.seeds == SEEDS[:1]
    assert_same(caught.value.results[0], run(seeds=SEEDS[:1])[0])
    assert caught.value.result.config.seed == 0
    Loader.passes = 5
    with pytest.raises(NonFiniteLossError, match=r"\(at seed 3\)$") as caught:
        run(loader=Loader())
    assert caught.value.results is None


# -- the sequence --------------------------------------------------------------------------------------------------


def test_results_are_a_sequence(results):
    assert isinstance(results, SearchResults)
    assert results.seeds == SEEDS
    assert len(results) == 3
    assert [r.config.seed for r in results] == list(SEEDS)
    assert results[-1] is list(results)[2]
    assert results[1] in results
    assert results.index(results[2]) == 2
    assert run(seeds=[0])[0] not in results
    assert isinstance(results[:2], SearchResults)
    assert results[:2].seeds == SEEDS[:2]
    assert repr(results) == "SearchResults(seeds=[3, 0, 7], budget=macs <= 0.5 of the reference)"
    with pytest.raises(IndexError):
        results[3]


def test_results_can_be_put_together(results):
    assert SearchResults([*results[1:], results[0]]).seeds == (0, 7, 3)
    with pytest.raises(ConfigError, match="must be at least one SearchResult, got none"):
        SearchResults([])
    with pytest.raises(ConfigError, match="must be at least one SearchResult, got str"):
        SearchResults([results[0], "another"])
    with pytest.raises(ConfigError, match=r"different config\.seed, got \[3, 3\]"):
        SearchResults([results[0], results[0]])
    with pytest.raises(StructureError, match=r"got seed 1 with other groups in \['0\.0'"):
        SearchResults([results[0], *run(tiny(), seeds=[1])])


def test_structures_are_those_of_the_results(results):
    assert results.structures_for() == [r.structure for r in results]
    assert results.structures_for(0.8) == [r.structure_for(0.8) for r in results]


def test_report_shows_every_seed(results):
    report = results.report(0.8)
    first, _, alike = report.partition("\n\n")
    rows = {line.split()[0]: line.split()[1:] for line in first.splitlines()}
    for name in results[0].gates:
        widths = [len(s.kept[name]) for s in results.structures_for(0.8)]
        assert [int(x) for x in rows[name][:3]] == widths
    assert rows["params"][:3] == [f"{s.params:,}" for s in results.structures_for(0.8)]
    value = results.similarity(0.8)[0, 2]
    assert alike.splitlines()[1].split() == [
        "seed",
        "3",
        "1.000",
        f"{results.similarity(0.8)[0, 1]:.3f}",
        f"{value:.3f}",
    ]
