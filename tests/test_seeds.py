"""Searches from several random initialisations: what a seed changes, how alike the structures are, how one is chosen."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from small_nets import Frozen, batches, cbr, head, tiny
from structure_cases import chain
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pfs_fast as pfs
from pfs_fast._library import is_loaded
from pfs_fast.compare import structure_distance
from pfs_fast.errors import (
    BudgetError,
    ConfigError,
    FileFormatError,
    FileWriteError,
    LoaderError,
    ModelError,
    NonFiniteLossError,
    StructureError,
)
from pfs_fast.proxies import PROXIES, ShortTraining
from pfs_fast.seeds import SearchResults, checkpoint_of, fresh_copy
from pfs_fast.similarity import structure_similarity

BACKENDS = ["reference", pytest.param("fused", marks=pytest.mark.skipif(not is_loaded(), reason="needs the compiled operators"))]  # fmt: skip
SEEDS = (3, 0, 7)
MEASURES = ("width_correlation", "share_correlation", "widths", "channels")


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


@pytest.fixture(scope="module")
def results():
    return run()


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


# -- files ---------------------------------------------------------------------------------------------------------


def test_results_come_back_from_their_file(results, tmp_path):
    path = tmp_path / "searches.safetensors"
    results.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    back = SearchResults.load(path)
    assert back.seeds == SEEDS
    for a, b in zip(back, results, strict=True):
        assert_same(a, b)
        assert a.model is None
    model = network()
    frozen = Frozen(model)
    back = SearchResults.load(path, model)
    frozen.check()
    for a, b in zip(back, results, strict=True):
        assert_same(a, b)
        assert same_weights(a.slim(weights="inherit"), b.slim(weights="inherit"))
    assert torch.equal(back.similarity(0.7), results.similarity(0.7))


def test_a_file_of_another_model_is_refused(results, tmp_path):
    results.save(tmp_path / "searches")
    with pytest.raises(FileFormatError, match="model must be the one that was searched"):
        SearchResults.load(tmp_path / "searches", tiny())


def test_files_of_one_and_of_several_results_are_told_apart(results, tmp_path):
    results.save(tmp_path / "several")
    results[0].save(tmp_path / "one")
    with pytest.raises(
        FileFormatError, match=r"of format 'pfs_fast\.searches', got .*'pfs_fast\.search'"
    ):
        SearchResults.load(tmp_path / "one")
    with pytest.raises(FileFormatError, match=r"of format 'pfs_fast\.search', got"):
        pfs.SearchResult.load(tmp_path / "several")


@pytest.mark.parametrize("change", ["none", "text", "twice", "no gates", "empty"])
def test_damaged_files_are_refused(results, tmp_path, change, monkeypatch):
    from pfs_fast import seeds as module

    whole = module.write_safetensors

    def write(path, tensors, metadata, *, caller):
        entries = metadata["results"]
        if change == "none":
            del metadata["results"]
        elif change == "text":
            metadata["results"] = ["text"]
        elif change == "twice":
            entries[1]["config"]["seed"] = entries[0]["config"]["seed"]
        elif change == "empty":
            entries.clear()
        else:
            del tensors["2.gates"]
        whole(path, tensors, metadata, caller=caller)

    monkeypatch.setattr(module, "write_safetensors", write)
    results.save(tmp_path / "searches")
    with pytest.raises(FileFormatError, match=r"path must hold (a )?whole search result"):
        SearchResults.load(tmp_path / "searches")


def test_results_that_cannot_be_written_are_an_error(results, tmp_path):
    with pytest.raises(FileWriteError, match=r"^SearchResults\.save: path must lie in an existing"):
        results.save(tmp_path / "missing" / "searches")


# -- checkpoints ---------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


class Counting:
    """Batches that count their passes, and stop the search in one of them."""

    def __init__(self, last: int = 1000) -> None:
        self.passes, self.last = 0, last

    def __iter__(self):
        self.passes += 1
        if self.passes > self.last:
            raise Interrupted
        yield from batches()


def test_checkpoint_names_carry_the_seed(tmp_path):
    assert checkpoint_of("a.b/search.ckpt", 3).as_posix() == "a.b/search.seed3.ckpt"
    assert checkpoint_of(tmp_path / "state", 0) == tmp_path / "state.seed0"


def test_interrupted_seeds_go_on_where_they_were(results, tmp_path):
    path, loader = tmp_path / "search.ckpt", Counting(6)  # four passes for each seed
    with pytest.raises(Interrupted):
        run(loader=loader, checkpoint=path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["search.seed0.ckpt", "search.seed3.ckpt"]
    loader = Counting()
    for a, b in zip(run(loader=loader, checkpoint=path), results, strict=True):
        assert_same(a, b)
    assert loader.passes == 1 + (1 + 2) + 4  # one to trace where there is a checkpoint


def test_seeds_can_be_added_to_a_checkpoint(results, tmp_path):
    path = tmp_path / "search.ckpt"
    run(seeds=SEEDS[:1], checkpoint=path)
    for a, b in zip(run(checkpoint=path), results, strict=True):
        assert_same(a, b)


def test_a_checkpoint_of_another_seed_is_refused(tmp_path):
    path = tmp_path / "search.ckpt"
    run(seeds=[0], checkpoint=path)
    (tmp_path / "search.seed0.ckpt").rename(tmp_path / "search.seed1.ckpt")
    with pytest.raises(FileFormatError, match="checkpoint must be of this search"):
        run(seeds=[1], checkpoint=path)


def test_a_copy_of_the_model_is_as_good_as_the_model(results):
    for a, b in zip(run(copy.deepcopy(network()).eval()), results, strict=True):
        assert torch.equal(a.flat_gates, b.flat_gates)
