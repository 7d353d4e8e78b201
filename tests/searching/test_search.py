"""The search as users call it: what it returns, leaves alone, repeats and records."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_nets import Frozen, Net, batches, cbr, conv, head, tiny
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import pfs_fast as pfs
from pfs_fast import _library


def config(**options) -> pfs.SearchConfig:
    return pfs.SearchConfig(**{"epochs": 2, "backend": "reference", "precision": "fp32", **options})


def run(model=None, loader=None, budget=0.6, **options):
    arguments = {
        k: options.pop(k)
        for k in ("val_loader", "reference", "example_input", "device", "progress")
        if k in options
    }
    arguments.setdefault("progress", False)
    return pfs.search(
        tiny() if model is None else model,
        batches() if loader is None else loader,
        budget,
        config=config(**options),
        **arguments,
    )


def equal(a: pfs.SearchResult, b: pfs.SearchResult) -> bool:
    return torch.equal(a.flat_gates, b.flat_gates) and torch.equal(a.died_at, b.died_at)


# -- the user's model ----------------------------------------------------------------------------------------------


def marked() -> nn.Module:
    """A model with every kind of state that a careless search would change."""
    model = tiny().train()
    model[0].eval()
    model[1][0].weight.requires_grad_(False)
    model[0][0].weight.grad = torch.ones_like(model[0][0].weight)
    model[1].register_forward_hook(lambda *_: None)
    model.note = {"key": [1]}
    return model.to(memory_format=torch.channels_last)


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_search_and_its_result_leave_the_model_bit_identical():
    model = marked()
    frozen = Frozen(model)
    result = run(model, val_loader=batches(1), select="best")
    frozen.check()
    for call in (
        lambda: result.structure,
        lambda: result.slim(),
        lambda: result.slim(weights="inherit"),
        lambda: result.pareto(),
        lambda: pfs.slim(model, result.structure),
        lambda: pfs.count(model, torch.zeros(1, 3, 6, 6)),
        lambda: pfs.verify(model, None, result.structure, torch.zeros(1, 3, 6, 6)),
    ):
        call()
        frozen.check()


def test_search_takes_a_frozen_model():
    model = tiny().requires_grad_(False)
    frozen = Frozen(model)
    assert equal(run(model), run(_thawed(model)))
    frozen.check()


def _thawed(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).requires_grad_(True)


def test_search_leaves_the_global_random_state_alone():
    model, loader = tiny(), batches()
    state = torch.random.get_rng_state()
    run(model, loader)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("switch", [torch.no_grad, torch.inference_mode])
def test_search_works_whatever_the_caller_has_switched_off(switch):
    model, loader = tiny(), batches()
    expected = run(model, loader)
    with switch():
        assert equal(run(model, loader), expected)


# -- repetition ----------------------------------------------------------------------------------------------------

IMAGES = torch.randint(
    0, 256, (22, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = torch.arange(22) % 4


def device_loader(**options) -> pfs.data.DeviceLoader:
    return pfs.data.DeviceLoader(IMAGES, LABELS, batch_size=8, train=True, **options)


def data_loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES.float() / 255, LABELS), batch_size=8, shuffle=True)


@pytest.mark.parametrize("make", [device_loader, data_loader])
def test_search_with_the_same_seed_gives_the_same_gates(make):
    model = nn.Sequential(cbr(3, 3), nn.Dropout(0.3), cbr(3, 5), head(5))
    first = run(model, make(), epochs=3)
    torch.rand(7)  # the global random state does not matter
    assert equal(run(model, make(), epochs=3), first)
    if make is data_loader:
        assert not equal(run(model, make(), epochs=3, seed=1), first)
    else:
        assert not equal(run(model, make(seed=1), epochs=3), first)


def test_search_with_a_loader_that_was_used_before_gives_the_same_gates():
    """Epochs count from 0 in every search, wherever the loader stands."""
    model, loader = tiny(), device_loader()
    first = run(model, loader, epochs=2)
    next(iter(loader))
    assert equal(run(model, loader, epochs=2), first)


def test_search_tells_a_distributed_sampler_its_epoch():
    epochs = []

    class Sampler(DistributedSampler):
        def set_epoch(self, epoch):
            epochs.append(epoch)
            super().set_epoch(epoch)

    dataset = TensorDataset(torch.randn(8, 3, 6, 6), torch.arange(8) % 4)
    loader = DataLoader(dataset, 4, sampler=Sampler(dataset, num_replicas=1, rank=0))
    run(loader=loader, epochs=3)
    assert epochs == [0, 1, 2]


def test_search_with_compaction_repeats_bit_by_bit(monkeypatch):
    monkeypatch.setattr("pfs_fast.gating.compaction.MIN_STEPS_SAVED", 0.5)
    model = pfs.models.resnet20(4, expansion=0.5)
    loader = batches(8, images=(3, 8, 8))
    options = {"epochs": 4, "lr": 0.1, "gamma": 5.0, "target": 0.1}
    first = run(model, loader, **options)
    assert first.history[-1]["channels"] < len(first.flat_gates)
    assert equal(run(model, loader, **options), first)


@pytest.mark.skipif(
    not _library.backends().cpu, reason=f"no compiled operators: {_library.backends().cpu_reason}"
)
def test_search_fused_repeats_bit_by_bit_and_is_near_the_reference():
    model = tiny()
    first = run(model, backend="fused")
    assert first.config.backend == "fused"
    assert equal(run(model, backend="fused"), first)
    torch.testing.assert_close(first.flat_gates, run(model).flat_gates, rtol=0, atol=1e-3)
    assert run(model, backend="auto").config.backend == "fused"


# -- length and history --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"epochs": 1}, 3),
        ({"epochs": 4}, 12),
        ({"epochs": 4, "max_steps": 12}, 12),
        ({"epochs": 4, "max_steps": 7}, 7),
        ({"epochs": 4, "max_steps": 3}, 3),
        ({"epochs": 1, "max_steps": 100}, 3),
        ({"epochs": 1, "max_steps": 1}, 1),
    ],
)
def test_search_ends_after_epochs_or_max_steps(options, steps):
    assert run(**options).history[-1]["step"] == steps


def test_search_of_max_steps_equals_one_over_as_many_batches():
    model, loader = tiny(), batches(4)
    short = run(model, loader, epochs=3, max_steps=6)
    assert equal(short, run(model, [*loader, *loader[:2]], epochs=1))


def test_history_has_an_entry_every_log_every_steps_and_at_each_epochs_end():
    history = run(loader=batches(5), epochs=2, log_every=2).history
    assert [(e["epoch"], e["step"]) for e in history] == [
        (0, 2),
        (0, 4),
        (0, 5),
        (1, 6),
        (1, 8),
        (1, 10),
    ]


def test_history_entries_have_their_fields():
    entry = run(epochs=1).history[-1]
    assert set(entry) == {
        "step",
        "epoch",
        "loss",
        "accuracy",
        "mean_gate",
        "alive",
        "channels",
        "seconds",
    }
    assert 0 < entry["mean_gate"] < 1
    assert entry["alive"] == 1.0
    assert entry["channels"] == 8
    assert 0 <= entry["accuracy"] <= 1


def test_history_loss_is_the_mean_cross_entropy_since_the_last_entry():
    model, loader = tiny(), batches(2)
    history = run(model, loader, epochs=1, precision="fp64", log_every=1).history
    first = F.cross_entropy(_thawed(model).double().train()(loader[0][0].double()), loader[0][1])
    assert history[0]["loss"] == pytest.approx(first.item(), rel=1e-12)
    both = run(model, loader, epochs=1, precision="fp64", log_every=2).history
    assert both[0]["loss"] == pytest.approx(
        (history[0]["loss"] + history[1]["loss"]) / 2, rel=1e-12
    )


def test_history_mean_gate_is_that_of_the_result():
    result = run()
    assert result.history[-1]["mean_gate"] == pytest.approx(
        result.flat_gates.mean().item(), rel=1e-6
    )


# -- target and reference ------------------------------------------------------------------------------------------


def test_target_defaults_to_the_budgets_share():
    assert run(budget=0.6).config.target == pytest.approx(0.6, abs=1e-3)
    assert run(budget=0.6, target=0.3).config.target == 0.3
    base = run().structure.base_macs
    assert run(budget=base // 2).config.target == pytest.approx(0.5, abs=1e-3)
    assert run(budget=10 * base).config.target == 1.0
    params = pfs.Budget(params=0.7)
    assert run(budget=params).config.target == pytest.approx(0.7, abs=0.01)


def test_target_pulls_the_mean_gate_both_ways():
    low = run(epochs=10, lr=0.05, gamma=50.0, gate_init=0.5, target=0.1).flat_gates.mean()
    high = run(epochs=10, lr=0.05, gamma=50.0, gate_init=0.5, target=0.9).flat_gates.mean()
    assert low < 0.2
    assert high > 0.8


def test_reference_changes_what_a_share_means():
    wide = nn.Sequential(cbr(3, 6), cbr(6, 10), head(10))
    base = pfs.count(tiny(), torch.zeros(1, 3, 6, 6))
    by_module = run(wide, budget=0.6, reference=tiny())
    by_number = run(wide, budget=0.6, reference=base.macs)
    assert by_module.reference == (base.macs, base.params)
    assert by_module.structure.macs <= 0.6 * base.macs < run(wide, budget=0.6).structure.macs
    assert by_number.structure == by_module.structure
    assert by_module.config.target == pytest.approx(0.6, abs=1e-3)


@pytest.mark.parametrize("reference", [0, -5, True, "resnet", float("nan")])
def test_reference_must_be_a_module_or_a_number(reference):
    with pytest.raises(
        pfs.errors.BudgetError, match="search: reference must be a module or a number of MACs"
    ):
        run(reference=reference)


def test_reference_for_a_share_of_parameters_must_be_a_module():
    with pytest.raises(
        pfs.errors.BudgetError, match="reference must be a module for a share of parameters"
    ):
        run(budget=pfs.Budget(params=0.5), reference=10_000)


# -- selection and validation --------------------------------------------------------------------------------------


def test_validation_accuracy_is_recorded_each_epoch_and_changes_nothing():
    model = tiny()
    plain, checked = run(model), run(model, val_loader=batches(2, seed=5))
    assert torch.equal(plain.flat_gates, checked.flat_gates)
    assert [("val_accuracy" in e) for e in checked.history] == [True, True]
    assert all(0 <= e["val_accuracy"] <= 1 for e in checked.history)
    assert not any("val_accuracy" in e for e in plain.history)


def test_select_best_needs_a_val_loader():
    with pytest.raises(
        pfs.errors.ConfigError, match="val_loader must be given with select='best', got None"
    ):
        run(select="best")


class Scripted:
    """Stands in for the evaluation of a loop: accuracies as given, gates as set."""

    def __init__(self, monkeypatch, accuracies, alive):
        accuracies, self.gates = iter(accuracies), []
        total = 8

        def evaluate(loop, loader):
            values = loop.state.gates.values
            values.fill_(0.5)
            values[: total - alive[len(self.gates)]] = 0.0
            values[-1] = 0.1 * (1 + len(self.gates))
            self.gates.append(values.clone())
            return next(accuracies)

        monkeypatch.setattr("pfs_fast.searching.loop.SearchLoop.evaluate", evaluate)


@pytest.mark.parametrize(
    ("accuracies", "alive", "winner"),
    [
        ([0.3, 0.9, 0.5], [4, 4, 4], 1),  # the best accuracy
        ([0.9, 0.3, 0.5], [5, 4, 4], 2),  # a share of non-zero gates above r is not admissible
        ([0.5, 0.5, 0.5], [4, 4, 4], 0),  # the first of equals
        ([0.9, 0.8, 0.1], [8, 7, 6], 2),  # none admissible: the last
    ],
)
@pytest.mark.filterwarnings("ignore:solve. all")
def test_select_best_follows_the_official_rule(monkeypatch, accuracies, alive, winner):
    script = Scripted(monkeypatch, accuracies, alive)
    result = run(
        epochs=3, select="best", target=0.5, val_loader=batches(1), compact=False, budget=0.6
    )
    assert torch.equal(result.flat_gates, script.gates[winner])
    assert [e["val_accuracy"] for e in result.history] == accuracies


def test_select_last_ignores_accuracies(monkeypatch):
    script = Scripted(monkeypatch, [0.9, 0.1], [4, 4])
    result = run(epochs=2, target=0.5, val_loader=batches(1), compact=False)
    assert torch.equal(result.flat_gates, script.gates[-1])


# -- devices, precisions, forms of models and loaders --------------------------------------------------------------


@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("fp64", torch.float64), ("fp32", torch.float32), ("bf16", torch.float32)],
)
def test_gates_have_at_least_float32(precision, dtype):
    result = run(precision=precision)
    assert result.flat_gates.dtype == dtype
    assert result.config.precision == precision
    assert bool(torch.isfinite(result.flat_gates).all())


def test_precision_auto_is_resolved_in_the_result():
    assert run(precision="auto").config.precision in ("fp32", "bf16")


@pytest.mark.parametrize("channels_last", [True, False])
def test_layout_does_not_change_the_search(channels_last):
    model = tiny()
    found = run(model, precision="fp64", channels_last=channels_last)
    torch.testing.assert_close(
        found.flat_gates, run(model, precision="fp64").flat_gates, rtol=0, atol=1e-10
    )


MODELS = {
    "convolutions without batch norm": (nn.Sequential(conv(3, 4), nn.ReLU(), conv(4, 5), nn.ReLU(), head(5)), (3, 6, 6)),
    "linear layers only": (nn.Sequential(nn.Linear(7, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)), (7,)),
    "one dimension": (nn.Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 4)), (3, 8)),
    "three dimensions": (
        nn.Sequential(nn.Conv3d(1, 4, 2), nn.BatchNorm3d(4), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)),
        (1, 3, 3, 3),
    ),
    "dict of outputs": (
        Net(lambda m, x: {"features": m.a(x), "logits": m.fc(m.b(x))}, a=cbr(3, 4), b=cbr(3, 5), fc=head(5)),
        (3, 6, 6),
    ),
    "half precision weights": (tiny().bfloat16(), (3, 6, 6)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_search_takes_many_forms_of_models(name):
    model, images = MODELS[name]
    frozen = Frozen(model)
    result = run(model, batches(images=images), budget=0.8)
    assert result.structure.macs <= 0.8 * result.structure.base_macs
    assert (result.flat_gates < 1).any()
    result.slim()(torch.zeros(2, *images, dtype=next(model.parameters()).dtype))
    frozen.check()


def test_search_takes_soft_labels():
    model, loader = tiny(), batches()
    soft = [(x, F.one_hot(y, 4).float()) for x, y in loader]
    torch.testing.assert_close(run(model, soft).flat_gates, run(model, loader).flat_gates)


def test_search_takes_a_generator_for_one_pass():
    model, loader = tiny(), batches()
    assert equal(run(model, (b for b in loader), epochs=1), run(model, loader, epochs=1))


def test_search_takes_batches_of_changing_size():
    loader = [*batches(2), *batches(1, size=7), *batches(1, images=(3, 9, 9))]
    assert run(loader=loader).history[-1]["step"] == 8


def test_search_traces_the_example_input():
    result = run(example_input=torch.zeros(1, 3, 12, 12))
    assert result.structure.base_macs == pfs.count(tiny(), torch.zeros(1, 3, 12, 12)).macs


def test_search_result_says_what_is_held_whole():
    result = run()
    assert "held whole:\n  2.2: it is an output of the network" in result.report()
    assert list(result.gates) == ["0.0", "1.0"]


def test_search_shows_progress_only_when_asked(capsys):
    run(progress=True)
    assert "search" in capsys.readouterr().err
    run(progress=False)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9, 1.0])
def test_search_keeps_its_budget(share):
    result = run(nn.Sequential(cbr(3, 8), cbr(8, 9), head(9)), budget=share)
    macs = pfs.count(result.slim(), torch.zeros(1, 3, 6, 6)).macs
    assert macs == result.structure.macs <= share * result.structure.base_macs
