"""Results of several seeds in files, and their checkpoints."""

from __future__ import annotations

import copy

import pytest
import torch
from seed_searches import SEEDS, assert_same, network, run, same_weights
from small_nets import Frozen, batches, tiny

import pfs_fast as pfs
from pfs_fast.errors import (
    FileFormatError,
    FileWriteError,
)
from pfs_fast.searching.seeds import SearchResults, checkpoint_of

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
    from pfs_fast.searching import seeds as module

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
