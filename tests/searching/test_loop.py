"""The loop as a state machine: what one step, one entry and one evaluation do."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from small_nets import Net, batches, cbr, conv, head, tiny
from torch import nn

import pfs_fast as pfs
from pfs_fast.errors import LoaderError, NonFiniteLossError
from pfs_fast.searching.plan import prepare

CPU = torch.device("cpu")


def make_loop(model=None, images=(3, 6, 6), track_stats=False, **options):
    config = pfs.SearchConfig(
        **{"backend": "reference", "precision": "fp64", "target": 0.5, **options}
    )
    return prepare(
        tiny() if model is None else model,
        torch.zeros(1, *images),
        pfs.Budget(macs=1.0),
        config,
        device=CPU,
        track_stats=track_stats,
    ).loop


def test_step_changes_gates_and_nothing_else():
    loop = make_loop()
    weights = {k: v.clone() for k, v in loop.network.state_dict().items()}
    loop.step(*batches(1)[0])
    assert loop.state.steps == 1
    assert loop.state.gates.step.item() == 1
    assert (loop.state.gates.values < 1).any()
    assert all(torch.equal(v, weights[k]) for k, v in loop.network.state_dict().items())
    assert all(p.grad is None for p in loop.network.parameters())


def test_step_gradients_do_not_pile_up():
    loop, batch = make_loop(), batches(1)[0]
    loop.step(*batch)
    first = loop.bank.grad.clone()
    loop.state.gates.values.fill_(1.0)
    loop.step(*batch)
    torch.testing.assert_close(loop.bank.grad, first, rtol=1e-12, atol=0)


def test_entry_resets_its_window_and_is_not_doubled():
    model, data = tiny(), batches(3)
    loop, every = make_loop(model), make_loop(model)
    for batch in data:
        every.step(*batch)
        every.entry()
    for batch in data[:2]:
        loop.step(*batch)
    first = loop.entry()
    assert loop.entry() is first
    loop.step(*data[2])
    second = loop.entry()
    assert loop.state.history == [first, second]
    assert (first["step"], second["step"]) == (2, 3)
    losses = [entry["loss"] for entry in every.state.history]
    assert first["loss"] == pytest.approx((losses[0] + losses[1]) / 2, rel=1e-12)
    assert second["loss"] == losses[2]


def test_metrics_show_the_latest_step():
    loop = make_loop()
    (images, labels), *_ = batches(1)
    loop.step(images, labels)
    metrics = {k: v() if callable(v) else float(v) for k, v in loop.metrics().items()}
    assert set(metrics) == {"loss", "acc", "gate", "alive"}
    assert metrics["gate"] == pytest.approx(loop.state.gates.values.mean().item())
    assert metrics["loss"] == loop.entry()["loss"]


def test_evaluate_uses_running_statistics_and_returns_to_train_mode():
    model, data = tiny(), batches(6, seed=3)
    loop = make_loop(
        model, track_stats=True, lr=1e-12
    )  # gates stay at 1 in all but the last digits
    oracle = copy.deepcopy(model).double().train()
    for images, labels in data:
        loop.step(images, labels)
        oracle(images.double())
    oracle.eval()
    with torch.no_grad():
        expected = sum((oracle(x.double()).argmax(1) == y).sum().item() for x, y in data) / 24
    statistics = dict(loop.network.root.named_buffers())
    torch.testing.assert_close(
        statistics["1.1.running_var"], oracle[1][1].running_var, rtol=1e-9, atol=0
    )
    assert loop.evaluate(data) == pytest.approx(expected)
    assert loop.network.training
    assert loop.state.steps == 6


def test_evaluate_refuses_nan_logits():
    """The largest of NaN logits is the first: with label 0 each image would count as right."""
    images, labels = batches(1)[0]
    with pytest.raises(NonFiniteLossError, match="search: logits of val_loader must be numbers"):
        make_loop(track_stats=True).evaluate([(images * float("nan"), 0 * labels)])


def test_evaluate_takes_soft_labels():
    loop = make_loop(track_stats=True)
    data = batches(2)
    soft = [(x, F.one_hot(y, 4).float()) for x, y in data]
    assert loop.evaluate(soft) == loop.evaluate(data)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_loss_stops_at_its_step_with_the_last_good_gates(bad):
    model, data = tiny(), batches(7)
    data[5][0][0, 0, 0, 0] = bad
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32", log_every=2)
    with pytest.raises(NonFiniteLossError, match=r"search: loss must be finite, got nan at step 6; check the images for NaN.*lower lr \(0\.01\).*now fp32") as caught:  # fmt: skip
        pfs.search(model, data, 0.6, config=config, progress=False)
    result = caught.value.result
    assert [e["step"] for e in result.history] == [2, 4]
    good = pfs.search(model, data[:4], 0.6, config=config, progress=False)
    assert torch.equal(result.flat_gates, good.flat_gates)
    assert result.structure == good.structure


def _zero_by_sqrt(m, x):
    y = m.a(x)
    return m.fc(y + torch.sqrt(torch.square(y - y)))


def test_non_finite_gradient_of_a_finite_loss_is_found_too():
    """The gradient of sqrt at 0 is infinite, and 0 times it NaN: only the gates show it."""
    model = Net(_zero_by_sqrt, a=cbr(3, 4), fc=head(4))
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32", scope="all")
    with pytest.raises(NonFiniteLossError, match=r"gates must be finite, got NaN by step 1 though the loss was finite") as caught:  # fmt: skip
        pfs.search(model, batches(1), 0.6, config=config, progress=False)
    assert caught.value.result.flat_gates.tolist() == [1.0] * 4


def test_error_of_the_model_in_a_known_shape_is_not_blamed_on_the_images():
    model = Net(lambda m, x: m.fc(_fail_later(m.b(m.a(x)))), a=cbr(3, 4), b=cbr(4, 4), fc=head(4))
    _CALLS.clear()
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32")
    with pytest.raises(RuntimeError, match=r"^on purpose$"):
        pfs.search(model, batches(4), 1.0, config=config, progress=False)


_CALLS: list[int] = []


@torch.fx.wrap
def _fail_later(x):
    if not isinstance(x, torch._subclasses.FakeTensor):
        _CALLS.append(1)
        if len(_CALLS) == 3:
            raise RuntimeError("on purpose")
    return x


def test_batch_too_small_for_batch_statistics_is_explained():
    model = nn.Sequential(conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), conv(4, 5, 1), nn.BatchNorm2d(5), nn.ReLU(), head(5))  # fmt: skip
    data = [*batches(2), *batches(1, size=1)]
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32")
    with pytest.raises(
        LoaderError,
        match=r"images must fit the model in every batch, got shape \[1, 3, 6, 6\]: .*more than 1 value per channel.*drop_last",
    ):
        pfs.search(model, data, 0.9, config=config, progress=False)
