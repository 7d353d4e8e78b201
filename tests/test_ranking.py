"""Which channels enter a structure first: the order of all gates, or shares of each group."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from small_nets import cbr, head
from torch import nn

import pfs_fast as pfs
from pfs_fast.analysis import analyse
from pfs_fast.cost import CostModel
from pfs_fast.ranking import POWER_OF_GATES, POWER_OF_MACS, ranked, ranking_of
from pfs_fast.solver import solve
from pfs_fast.stability import StabilityWatch

SIZES = (8, 8, 16)


def cost_model(model: nn.Module | None = None, size: int = 16) -> CostModel:
    """By default an early, expensive group; the same behind a pool; a late, cheap one."""
    if model is None:
        model = nn.Sequential(
            cbr(3, 8), nn.MaxPool2d(2), cbr(8, 8), nn.MaxPool2d(2), cbr(8, 16), head(16)
        )
    return CostModel(analyse(model, torch.zeros(1, 3, size, size)))


def cut(model: CostModel, gates: np.ndarray, share: float = 0.5, ranking: str = "shares"):
    alive = np.full(model.groups.num_units, -1)
    limits = pfs.Budget(share).resolve(model.base)
    return solve(model.groups, *ranked(ranking, model, gates, alive), limits, model)


def widths(model: CostModel, keep: np.ndarray) -> list[int]:
    return [int(keep[g.start : g.start + g.size].sum()) for g in model.groups.groups]


def means(*values: float) -> np.ndarray:
    """Gates that fall within each group, with these means."""
    spread = (np.linspace(1.1, 0.9, size) * mean for size, mean in zip(SIZES, values, strict=True))
    return np.concatenate(list(spread))


@pytest.mark.parametrize(
    ("model", "size"),
    [
        (None, 16),
        (pfs.models.resnet20(), 32),
        (pfs.models.mobilenet_v2(num_classes=10), 32),
        (pfs.models.get("resnet50"), 64),
    ],
    ids=["plain", "resnet20", "mobilenet_v2", "resnet50"],
)
def test_marginal_macs_are_what_one_channel_costs(model: nn.Module | None, size: int) -> None:
    costs = cost_model(model, size)
    for part in costs.parts[:: max(1, len(costs.parts) // 8)]:
        keep = np.ones(costs.groups.num_units, dtype=bool)
        keep[part.units[-1]] = False
        lost = costs.base[0] - costs.evaluate(keep)[0]
        # A layer that the group both writes and reads loses the crossing once.
        assert lost == pytest.approx(costs.marginal_macs[part.units[-1]], rel=2 / len(part.units))
        assert lost <= costs.marginal_macs[part.units[-1]]


def test_shares_follow_gates_and_costs() -> None:
    model = cost_model()
    gates = means(0.8, 0.4, 0.2)
    found = np.array(widths(model, cut(model, gates, 0.4)))
    macs = model.marginal_macs[[g.start for g in model.groups.groups]]
    weights = np.array([0.8, 0.4, 0.2]) ** POWER_OF_GATES / macs**POWER_OF_MACS
    # Each group keeps the same multiple of its weight, up to one channel, and at most all.
    shares = found / np.array(SIZES)
    scale = (shares / weights)[shares < 1].mean()
    assert np.all(np.abs(found - np.minimum(1, scale * weights) * SIZES) <= 1.01)


def test_a_larger_mean_gate_keeps_more() -> None:
    model = cost_model()
    low, high = (widths(model, cut(model, means(0.5, mean, 0.5)))[1] for mean in (0.2, 0.9))
    assert high > low


def test_the_scale_of_all_gates_does_not_count() -> None:
    model = cost_model()
    assert np.array_equal(cut(model, means(0.8, 0.4, 0.2)), cut(model, means(0.4, 0.2, 0.1)))


def test_within_a_group_the_largest_gates_stay() -> None:
    model = cost_model()
    gates = np.random.default_rng(0).random(sum(SIZES))
    keep = cut(model, gates)
    for group in model.groups.groups:
        span = slice(group.start, group.start + group.size)
        inside, kept = gates[span], keep[span]
        assert kept.all() or inside[kept].min() > inside[~kept].max()


def test_of_the_dead_those_that_died_last_stay_and_no_group_is_left_out() -> None:
    model = cost_model()
    gates = means(0.8, 0.4, 0.2)
    gates[8:16] = 0
    died_at = np.where(gates > 0, -1, np.arange(sum(SIZES)))
    limits = pfs.Budget(0.5).resolve(model.base)
    with pytest.warns(UserWarning, match="all 8 gates"):
        scores = ranked("shares", model, gates, died_at)
        keep = solve(model.groups, gates, died_at, limits, model)
    assert np.isfinite(scores[0]).all() and (scores[1] == -1).all()
    assert np.array_equal(np.argsort(-scores[0][8:16]), np.arange(8)[::-1])
    assert keep.any()


def test_structures_are_nested_and_within_the_budget() -> None:
    model = cost_model(pfs.models.resnet20(), 32)
    gates = np.random.default_rng(1).random(model.groups.num_units)
    smaller = None
    for share in (0.2, 0.4, 0.7, 1.0):
        keep = cut(model, gates, share)
        assert model.evaluate(keep)[0] <= share * model.base[0]
        assert smaller is None or not (smaller & ~keep).any()
        smaller = keep
    assert smaller.all()


def test_gates_is_the_order_of_all_gates() -> None:
    model = cost_model()
    gates, died_at = np.random.default_rng(2).random(sum(SIZES)), np.arange(sum(SIZES))
    scores = ranked("gates", model, gates, died_at)
    assert scores[0] is gates and scores[1] is died_at


@pytest.mark.parametrize(
    ("config", "ranking"),
    [
        (pfs.SearchConfig(), "gates"),
        (pfs.SearchConfig(scope="all"), "shares"),
        (pfs.SearchConfig(ranking="shares"), "shares"),
        (pfs.SearchConfig(scope="all", ranking="gates"), "gates"),
    ],
)
def test_auto_follows_the_scope(config: pfs.SearchConfig, ranking: str) -> None:
    assert ranking_of(config) == ranking


def test_unknown_ranking_is_refused() -> None:
    with pytest.raises(
        pfs.errors.ConfigError, match="ranking must be one of 'auto', 'gates', 'shares', got 'best'"
    ):
        pfs.SearchConfig(ranking="best")


def search(**options: object) -> pfs.SearchResult:
    torch.manual_seed(0)
    loader = [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(3)]
    config = pfs.SearchConfig(scope="all", epochs=1, precision="fp32", **options)
    return pfs.search(pfs.models.resnet20(expansion=0.5), loader, 0.4, config=config, device="cpu")


def test_a_result_cuts_by_its_ranking_and_remembers_it(tmp_path) -> None:
    shares, gates = search(), search(ranking="gates")
    assert (shares.config.ranking, gates.config.ranking) == ("shares", "gates")
    assert torch.equal(shares.flat_gates, gates.flat_gates)
    assert shares.structure.kept != gates.structure.kept
    shares.save(tmp_path / "search.safetensors")
    assert pfs.SearchResult.load(tmp_path / "search.safetensors").structure == shares.structure


def test_other_gates_are_ranked_anew() -> None:
    result = search()
    before = result.structure_for(0.4)
    result.flat_gates.copy_(torch.linspace(0.1, 1.0, len(result.flat_gates)))
    after = result.structure_for(0.4)
    assert after != before
    again = pfs.SearchResult.from_content("again", *result.content(), None)
    assert again.structure_for(0.4) == after


def test_a_file_without_a_ranking_is_cut_by_its_gates() -> None:
    result = search(ranking="gates")
    tensors, meta = result.content()
    del meta["config"]["ranking"]
    old = pfs.SearchResult.from_content("old", tensors, meta, None)
    assert old.config.ranking == "gates" and old.structure == result.structure


def test_early_stop_looks_at_the_structure_of_the_ranking() -> None:
    model = cost_model()
    limits = pfs.Budget(0.5).resolve(model.base)
    gates = torch.from_numpy(means(0.8, 0.4, 0.2))
    watch = StabilityWatch(model.groups, limits, model, 20, 0.1, ranking="shares")
    watch.look(10, gates, torch.full((sum(SIZES),), -1))
    kept = watch.state()[0]["keeps"][0].numpy()
    assert np.array_equal(kept, cut(model, gates.numpy()))
