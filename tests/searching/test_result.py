"""What a search gives, and its file."""

from __future__ import annotations

import json

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from small_nets import batches, cbr, head, tiny
from structure_cases import chain
from torch import nn

import pfs_fast as pfs
from pfs_fast.errors import (
    BudgetError,
    ConfigError,
    FileFormatError,
    FileWriteError,
    InfeasibleBudgetError,
    ModelError,
)

EXAMPLE = torch.zeros(1, 3, 6, 6)
OTHER = pfs.Structure.from_keep(chain(2), np.ones(2, dtype=bool)).to_json()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return nn.Sequential(cbr(3, 6), cbr(6, 6, groups=2), cbr(6, 9), head(9))


@pytest.fixture(scope="module")
def result(model):
    config = pfs.SearchConfig(
        epochs=8, backend="reference", precision="fp64", lr=0.1, gamma=1.0, target=0.3, log_every=2
    )
    return pfs.search(model, batches(4), 0.5, config=config, progress=False)


@pytest.fixture
def path(result, tmp_path):
    result.save(tmp_path / "result.safetensors")
    return tmp_path / "result.safetensors"


def test_gates_are_one_tensor_a_group(result):
    assert {name: len(gate) for name, gate in result.gates.items()} == {
        "0.0": 3,
        "1.0": 3,
        "2.0": 9,
    }
    assert torch.equal(torch.cat(list(result.gates.values())), result.flat_gates)
    assert (result.flat_gates == 0).any()
    assert ((result.died_at >= 0) == (result.flat_gates == 0)).all()


def test_structure_is_that_of_the_budget(result):
    assert result.structure is result.structure
    assert (
        result.structure == result.structure_for(0.5) == result.structure_for(pfs.Budget(macs=0.5))
    )
    assert result.structure.macs <= 0.5 * result.structure.base_macs


def test_structures_of_other_budgets_nest(result):
    small, large = result.structure_for(0.3), result.structure_for(0.8)
    assert small.macs < large.macs
    for name, kept in small.kept.items():
        assert set(kept) <= set(large.kept[name])


def test_structure_keeps_the_largest_gates(result):
    structure = result.structure_for(0.7)
    for name, gate in result.gates.items():
        kept = np.zeros(len(gate), bool)
        kept[list(structure.kept[name])] = True
        if kept.any() and not kept.all():
            assert gate[torch.from_numpy(kept)].min() >= gate[torch.from_numpy(~kept)].max()


def test_structure_of_another_ranking_spends_the_same_budget_otherwise(result):
    by_gates, uniform = result.structure_for(0.4), result.structure_for(0.4, ranking="uniform")
    assert result.structure_for(0.4, ranking="gates") == by_gates != uniform
    shares = [
        len(kept) / result.groups.groups[i].size for i, kept in enumerate(uniform.kept.values())
    ]
    assert max(shares) - min(shares) <= 1 / 3 + 1e-9  # a channel of the narrowest
    for name, gate in result.gates.items():  # the same channels of a group come first
        few, many = sorted((set(by_gates.kept[name]), set(uniform.kept[name])), key=len)
        assert few <= many, gate


def test_structure_for_refuses_an_unknown_ranking(result):
    with pytest.raises(ConfigError, match=r"ranking must be one of .*'layerwise'.*, got 'best'"):
        result.structure_for(0.5, ranking="best")


def test_structure_for_refuses_bad_budgets(result):
    with pytest.raises(BudgetError):
        result.structure_for(1.5)
    with pytest.raises(InfeasibleBudgetError, match=r"macs must be in \[[\d,]+, [\d,]+\]"):
        result.structure_for(10)


def test_pareto_rises_with_the_share(result):
    curve = result.pareto()
    macs = [s.macs for s in curve]
    assert macs == sorted(macs)
    assert macs[-1] == result.structure.base_macs
    assert [s.macs for s in result.pareto([0.5, 1.0])] == [result.structure.macs, macs[-1]]


def test_slim_is_of_the_budget_and_seeded(result):
    slim = result.slim(seed=3)
    assert pfs.count(slim, EXAMPLE).macs == result.structure.macs
    assert pfs.count(result.slim(0.8), EXAMPLE).macs == result.structure_for(0.8).macs
    again = result.slim(seed=3)
    assert all(
        torch.equal(a, b) for a, b in zip(slim.parameters(), again.parameters(), strict=True)
    )


def test_slim_inherits_the_models_weights(result, model):
    slim = result.slim(weights="inherit")
    kept = torch.tensor(result.structure.layers["0.0"])
    torch.testing.assert_close(slim[0][0].weight, model[0][0].weight[kept])


def test_report_lists_groups_and_what_is_held_whole(result):
    report = result.report()
    assert str(result.structure) in report
    assert "3.2: it is an output of the network" in report


def test_file_gives_back_everything_but_the_model(result, path):
    loaded = pfs.SearchResult.load(path)
    assert torch.equal(loaded.flat_gates, result.flat_gates)
    assert loaded.flat_gates.dtype == torch.float64
    assert torch.equal(loaded.died_at, result.died_at)
    assert loaded.structure == result.structure
    assert loaded.structure_for(0.8) == result.structure_for(0.8)
    for name in ("budget", "reference", "config", "history"):
        assert getattr(loaded, name) == getattr(result, name), name
    assert loaded.report() == result.report()
    assert loaded.groups.groups == result.groups.groups
    assert loaded.model is None


def test_loaded_result_needs_a_model_for_slim(result, path, model):
    with pytest.raises(
        ModelError,
        match=r"the result must know its model, got a loaded one; use load\(path, model\)",
    ):
        pfs.SearchResult.load(path).slim()
    slim = pfs.SearchResult.load(path, model).slim(weights="inherit")
    for a, b in zip(slim.parameters(), result.slim(weights="inherit").parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "other",
    [
        lambda: tiny(),
        lambda: nn.Sequential(cbr(3, 6), cbr(6, 6, groups=2), cbr(6, 8), head(8)),
        lambda: nn.Linear(3, 4),
    ],
)
def test_load_refuses_another_model(path, other):
    with pytest.raises(
        FileFormatError,
        match=r"SearchResult\.load: model must be the one that was searched, got .* at '\d",
    ):
        pfs.SearchResult.load(path, other())


def test_file_is_safetensors_with_json_and_no_code(path):
    tensors = safetensors.torch.load_file(path)
    assert {"gates", "died_at"} <= set(tensors)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["pfs_fast"])
    assert (metadata["format"], metadata["version"]) == ("pfs_fast.search", 3)
    assert metadata["config"]["lr"] == 0.1


def rewrite(path, change) -> None:
    tensors = safetensors.torch.load_file(path)
    with safe_open(path, "pt") as file:
        metadata = json.loads(file.metadata()["pfs_fast"])
    change(tensors, metadata)
    safetensors.torch.save_file(tensors, path, metadata={"pfs_fast": json.dumps(metadata)})


def test_file_of_the_first_version_still_loads(result, path):
    names = ("macs", "params", "latency_ms", "peak_activation_bytes", "multiple_of", "min_channels")

    def as_first_version(tensors, metadata):
        metadata["version"] = 1
        metadata["budget"] = {name: metadata["budget"][name] for name in names}

    rewrite(path, as_first_version)
    loaded = pfs.SearchResult.load(path)
    assert loaded.budget == result.budget
    assert loaded.structure == result.structure


def test_file_of_before_the_rankings_is_cut_as_it_was_then(tmp_path):
    torch.manual_seed(0)
    config = pfs.SearchConfig(epochs=2, backend="reference", precision="fp64", scope="all", lr=0.1)
    found = pfs.search(tiny(), batches(4), 0.5, config=config, progress=False)
    assert found.structure == found.structure_for(0.5, ranking="layerwise")
    path = tmp_path / "result.safetensors"
    found.save(path)
    assert pfs.SearchResult.load(path).structure == found.structure

    def as_second_version(tensors, metadata):
        metadata["version"] = 2
        del metadata["config"]["ranking"]

    rewrite(path, as_second_version)
    loaded = pfs.SearchResult.load(path)
    assert loaded.structure == found.structure_for(0.5, ranking="gates")


HOSTILE = {
    "newer version": (lambda t, m: m.update(version=4), "must be of version 3 or older, got .* of version 4; update pfs_fast"),
    "other format": (lambda t, m: m.update(format="pfs_fast.model"), "must be a file of format 'pfs_fast.search'"),
    "gates missing": (lambda t, m: t.pop("gates"), "KeyError: 'gates'"),
    "units missing": (lambda t, m: t.pop("layer.0.out_units"), "must hold a whole search result"),
    "too few gates": (lambda t, m: t.update(gates=t["gates"][:-1].clone()), "must hold 15 gates, got .14. and times of death .15."),
    "gates not in a row": (lambda t, m: t.update(gates=t["gates"].view(1, -1)), "gates"),
    "gates of integers": (lambda t, m: t.update(gates=t["gates"].long()), "gates"),
    "NaN among the gates": (lambda t, m: t["gates"].fill_(float("nan")), "gates"),
    "units outside the gates": (lambda t, m: t["layer.0.out_units"].add_(1000), "units of layer 0.0 in"),
    "groups missing": (lambda t, m: m.pop("groups"), "KeyError: 'groups'"),
    "group of another size": (lambda t, m: m["groups"][0].update(size=2), "SearchResult.load: path must hold"),
    "unknown option": (lambda t, m: m["config"].update(speed=9), "unexpected keyword argument 'speed'"),
    "option outside its range": (lambda t, m: m["config"].update(lr=-1), "lr must be a finite number above 0"),
    "bad budget": (lambda t, m: m["budget"].update(macs=7.5), "macs must be a share"),
    "budget of another release": (lambda t, m: m["budget"].update(energy=1), "unexpected keyword argument 'energy'"),
    "widths of text": (lambda t, m: m["budget"].update(widths="all"), "widths must map patterns"),
    "structure of other groups": (lambda t, m: m.update(structure=OTHER), "must hold a structure of its own groups"),
    "structure of text": (lambda t, m: m.update(structure="all"), "text must be complete JSON"),
    "reference of text": (lambda t, m: m.update(reference=["a", "b"]), "must hold a whole search result"),
    "history of text": (lambda t, m: m.update(history="none"), "history"),
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_load_refuses_inconsistent_files(path, case):
    change, message = HOSTILE[case]
    rewrite(path, change)
    with pytest.raises(FileFormatError, match=message):
        pfs.SearchResult.load(path)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.999])
def test_load_refuses_truncated_files(path, share):
    data = path.read_bytes()
    path.write_bytes(data[: int(share * len(data))])
    with pytest.raises(
        FileFormatError, match=r"SearchResult\.load: path must be a whole safetensors file"
    ):
        pfs.SearchResult.load(path)


def test_load_refuses_other_files(result, tmp_path):
    pfs.save(result.slim(), tmp_path / "slim")
    (tmp_path / "structure").write_text(result.structure.to_json())
    (tmp_path / "garbage").write_bytes(bytes(range(256)) * 8)
    torch.save({}, tmp_path / "pickle")
    safetensors.torch.save_file({"gates": torch.zeros(3)}, tmp_path / "foreign")
    names = sorted(p.name for p in tmp_path.iterdir())
    for name in [*names, "missing", "."]:
        with pytest.raises(FileFormatError, match=r"SearchResult\.load: path must be"):
            pfs.SearchResult.load(tmp_path / name)


def test_save_leaves_nothing_half_written(result, path, tmp_path, monkeypatch):
    before = path.read_bytes()

    def full_disk(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(FileWriteError, match=r"SearchResult\.save: .*No space left"):
        result.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
