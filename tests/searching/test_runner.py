"""Recorded steps: the same search as step by step, captured anew when it must be, and never silently given up.

``StandInGraphs`` stands in for CUDA graphs; numbers are read late, as on CUDA.
"""

from __future__ import annotations

import pytest
import torch
from small_nets import Net, batches, cbr, conv, head, tiny
from stand_in_graphs import StandInGraphs
from test_checkpoint import Interrupted, Interrupting, assert_equal, without_time
from torch import nn

import pfs_fast as pfs
from pfs_fast.data.feed import DeviceFeed
from pfs_fast.errors import LoaderError, NonFiniteLossError
from pfs_fast.searching import runner as runners
from pfs_fast.searching.search import COMPACT_EVERY
from pfs_fast.searching.step_meter import DeviceMeter, HostMeter
from pfs_fast.training.batches import note_labels

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

IMAGES = torch.randint(
    0, 256, (62, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def device_loader(**options) -> pfs.data.DeviceLoader:
    """15 full batches and one of two images in an epoch."""
    options = {"batch_size": 4, "train": True, "crop_padding": 1, **options}
    return pfs.data.DeviceLoader(IMAGES, torch.arange(62) % 4, **options)


def uneven() -> list:
    return [*batches(5), *batches(1, size=3, seed=1)]


@pytest.fixture
def graphs(monkeypatch) -> StandInGraphs:
    """Everything as on CUDA, on the CPU."""
    stand_in = StandInGraphs()
    monkeypatch.setattr("pfs_fast.searching.loop.DEFERRED", frozenset({"cpu"}))
    monkeypatch.setattr(
        runners, "_graphs", lambda loop: stand_in if loop.config.cuda_graph else None
    )
    return stand_in


def run(model, loader, checkpoint=None, **options):
    options = {"epochs": 4, "backend": "reference", "precision": "fp64", "log_every": 7, **options}
    config = pfs.SearchConfig(**options)
    return pfs.search(model, loader, 0.6, config=config, checkpoint=checkpoint, progress=False)


def assert_same_search(a: pfs.SearchResult, b: pfs.SearchResult) -> None:
    assert torch.equal(a.flat_gates, b.flat_gates)
    assert torch.equal(a.died_at, b.died_at)
    assert without_time(a.history) == without_time(b.history)


def dropping() -> nn.Module:
    return nn.Sequential(cbr(3, 3), nn.Dropout(0.3), cbr(3, 5), head(5))


# -- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [uneven, device_loader])
@pytest.mark.parametrize("net", [tiny, dropping])
def test_replayed_search_equals_one_step_by_step(graphs, make, net):
    model = net()
    replayed = run(model, make(), compact=False)
    assert graphs.log.count("replay") > 4
    count = len(graphs.log)
    assert_same_search(run(model, make(), compact=False, cuda_graph=False), replayed)
    assert len(graphs.log) == count


@pytest.mark.parametrize("make", [uneven, device_loader])
def test_reading_late_changes_nothing(monkeypatch, make):
    model = tiny()
    at_once = run(model, make(), compact=False)
    monkeypatch.setattr("pfs_fast.searching.loop.DEFERRED", frozenset({"cpu"}))
    assert_same_search(run(model, make(), compact=False), at_once)


def test_each_shape_is_captured_once_after_its_warm_up(graphs):
    run(tiny(), uneven(), epochs=5, compact=False)
    # 25 batches of four images and 5 of three: three of each are stepped, the others replayed.
    assert graphs.log.count("capture") == 2
    assert graphs.log.count("replay") == 22 + 2


def test_shapes_beyond_the_most_are_stepped(graphs, monkeypatch):
    monkeypatch.setattr(runners, "MAX_SHAPES", 1)
    model = tiny()
    result = run(model, uneven(), epochs=5, compact=False)
    assert graphs.log.count("capture") == 1
    assert_same_search(run(model, uneven(), epochs=5, compact=False, cuda_graph=False), result)


def test_feed_takes_several_steps_in_one_replay_and_stops_where_the_search_looks(
    graphs, monkeypatch
):
    run(tiny(), device_loader(), epochs=2, log_every=12, compact=False)
    # steps 1-3 warm up; looks at 10 (compaction), 12, 16 (end of epoch: one stepped), 20, 24, 30, 32
    singles = [10 - 3, 12 - 10, 15 - 12, 20 - 16, 24 - 20, 30 - 24, 31 - 30]
    assert graphs.log.count("replay") == sum(n // 8 + n % 8 for n in singles)
    graphs.log.clear()
    monkeypatch.setitem(COMPACT_EVERY, "cpu", 50)
    model = tiny()
    result = run(model, device_loader(), epochs=2, log_every=50, compact=False)
    # 12 steps after the warm-up, then 15 of the second epoch
    assert graphs.log.count("capture") == 2
    assert graphs.log.count("replay") == (1 + 4) + (1 + 7)
    stepped = run(model, device_loader(), epochs=2, log_every=50, compact=False, cuda_graph=False)
    assert_same_search(result, stepped)


def test_feed_gives_the_batches_of_its_loader_and_moves_it_along():
    loader, feed = device_loader(), DeviceFeed(device_loader())
    for epoch in range(2):
        feed.start(epoch)
        for images, labels in loader:
            if feed.full_left:
                made = feed.make()
                feed.count(1)
            else:
                made = feed.rest()
            assert torch.equal(made[0], images)
            assert torch.equal(made[1], labels)
            assert feed._loader.state_dict() == loader.state_dict()


def test_feed_serves_training_device_loaders_alone():
    cpu = torch.device("cpu")

    class Other(pfs.data.DeviceLoader):
        pass

    assert DeviceFeed.serves(device_loader(), cpu)
    assert not DeviceFeed.serves(device_loader(train=False), cpu)
    assert not DeviceFeed.serves(device_loader(), torch.device("cuda", 0))
    assert not DeviceFeed.serves(Other(IMAGES, torch.arange(62) % 4, train=True), cpu)
    assert not DeviceFeed.serves(batches(), cpu)


# -- compaction and resume -----------------------------------------------------------------------------------------

DYING = {"lr": 0.1, "gamma": 5.0, "target": 0.1, "epochs": 6}


@pytest.fixture
def often(monkeypatch) -> None:
    monkeypatch.setattr("pfs_fast.gating.compaction.MIN_STEPS_SAVED", 0.5)
    monkeypatch.setattr(runners, "RECAPTURE_STEPS", 0.0)
    monkeypatch.setitem(COMPACT_EVERY, "cpu", 6)


def narrow() -> nn.Module:
    return pfs.models.resnet20(4, expansion=0.5)


def test_step_is_captured_anew_after_channels_have_left(graphs, often):
    model, loader = narrow(), batches(5, images=(3, 8, 8))
    replayed = run(model, loader, **DYING)
    assert replayed.history[-1]["channels"] < len(replayed.flat_gates)
    first = graphs.log.index("reset")
    assert "capture" in graphs.log[:first]
    assert "capture" in graphs.log[first:]
    assert_same_search(run(model, loader, **DYING, cuda_graph=False), replayed)


@pytest.mark.filterwarnings("ignore:solve. all")
def test_resumed_search_that_reads_late_equals_an_uninterrupted_one(graphs, often, tmp_path):
    """What the next look will decide by is known again after a restart."""
    model, path = narrow(), tmp_path / "search.ckpt"
    loader = batches(5, images=(3, 8, 8))
    straight = run(model, loader, **DYING)
    assert straight.history[-1]["channels"] < len(straight.flat_gates)
    for passes in (2, 4):
        path.unlink(missing_ok=True)
        with pytest.raises(Interrupted):
            run(model, Interrupting(loader, passes), checkpoint=path, **DYING)
        assert_equal(run(model, loader, checkpoint=path, **DYING), straight)


def test_search_that_replays_stops_when_stable(graphs):
    options = {"lr": 0.2, "gamma": 20.0, "target": 0.4, "patience": 30, "tolerance": 0.2}
    model = tiny()
    result = run(model, device_loader(), epochs=12, **options)
    assert result.ended == "stable"
    assert_same_search(run(model, device_loader(), epochs=12, **options, cuda_graph=False), result)


def test_recorded_steps_count_towards_max_steps(graphs):
    model = tiny()
    result = run(model, device_loader(), max_steps=13, compact=False)
    assert result.steps == 13
    assert_same_search(
        run(model, device_loader(), max_steps=13, compact=False, cuda_graph=False), result
    )


# -- giving up and errors ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [uneven, device_loader])
@pytest.mark.parametrize("where", ["waits", "capture"])
def test_step_that_cannot_be_captured_is_reported_and_taken_without(
    graphs, monkeypatch, make, where
):
    model = tiny()
    expected = run(model, make(), compact=False, cuda_graph=False)

    def refuse(work):
        raise RuntimeError("on purpose")

    def waits(work):
        work()
        return "on purpose"

    monkeypatch.setattr(graphs, where, refuse if where == "capture" else waits)
    with pytest.warns(RuntimeWarning, match=r"search: the step must be capturable.*on purpose; going on without one") as caught:  # fmt: skip
        result = run(model, make(), compact=False)
    assert len(caught) == 1
    assert "replay" not in graphs.log
    assert_same_search(result, expected)


@pytest.mark.parametrize("make", [uneven, device_loader])
def test_a_wait_that_is_seen_once_is_another_threads(graphs, monkeypatch, make):
    model, waits, looks = tiny(), graphs.waits, []

    def waits_once(work):
        looks.append(waits(work))
        return "on purpose" if len(looks) == 1 else looks[-1]

    monkeypatch.setattr(graphs, "waits", waits_once)
    result = run(model, make(), compact=False)
    assert "replay" in graphs.log
    assert_same_search(run(model, make(), compact=False, cuda_graph=False), result)


def hooked() -> tuple[nn.Module, list[int]]:
    calls: list[int] = []
    model = tiny()
    model[2][1].register_forward_hook(lambda *_: calls.append(1))
    return model, calls


@pytest.mark.parametrize("make", [uneven, device_loader])
def test_networks_with_python_of_the_users_are_never_captured(graphs, make):
    model, calls = hooked()
    result = run(model, make(), epochs=2, compact=False)
    assert graphs.log == []
    assert len(calls) >= result.steps


class NotedTransfer:
    """Notes whether batches come in a stream of their own."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.beside = True

    def send(self, images):
        self.log.append("beside" if self.beside else "in stream")
        return images.clone()

    def pin(self, labels):
        return labels

    def stay_in_stream(self) -> None:
        self.beside = False

    def mark(self):
        return self

    def synchronize(self) -> None:
        pass


def test_batches_are_not_copied_beside_the_step_after_a_capture_that_failed(graphs, monkeypatch):
    transfer = NotedTransfer()

    def refuse(work):
        raise RuntimeError("on purpose")

    monkeypatch.setattr(graphs, "capture", refuse)
    monkeypatch.setattr(
        "pfs_fast.searching.search.make_runner",
        lambda loop, loader: runners.GraphRunner(loop, graphs, transfer),
    )
    with pytest.warns(RuntimeWarning, match="on purpose; going on without one"):
        run(tiny(), batches(8), epochs=1, compact=False)
    assert transfer.log == ["beside"] * 4 + ["in stream"] * 4


def test_stand_in_refuses_what_a_graph_refuses():
    stand_in = StandInGraphs()
    with pytest.raises(RuntimeError, match="capturing"):
        stand_in.capture(lambda: torch.ones(1).item())
    assert stand_in.waits(lambda: torch.ones(1).item()) is not None


def test_label_outside_the_classes_is_found_before_a_replay(graphs):
    loader = batches(8)
    loader[6][1][0] = 4
    with pytest.raises(
        LoaderError, match=r"labels must be in \[0, 3\], the model's outputs, got 4"
    ):
        run(tiny(), loader)
    assert "replay" in graphs.log


def test_non_finite_loss_of_a_replayed_step_is_named_at_the_next_entry(graphs):
    model, loader = tiny(), batches(20)
    loader[12][0][0, 0, 0, 0] = float("nan")
    with pytest.raises(
        NonFiniteLossError, match=r"search: loss must be finite, got nan at step 13"
    ) as caught:
        run(model, loader, compact=False)
    result = caught.value.result
    assert [e["step"] for e in result.history] == [7]
    assert torch.equal(result.flat_gates, run(model, loader[:7], epochs=1).flat_gates)


def test_model_without_batch_norm_and_soft_labels_are_replayed(graphs):
    model = Net(lambda m, x: m.fc(torch.relu(m.a(x))), a=conv(3, 4), fc=head(4))
    loader = [(x, torch.nn.functional.one_hot(y, 4).double()) for x, y in batches(6)]
    replayed = run(model, loader, compact=False, scope="all")
    assert "replay" in graphs.log
    assert_same_search(run(model, loader, compact=False, scope="all", cuda_graph=False), replayed)


# -- meters --------------------------------------------------------------------------------------------------------


def test_meters_measure_the_same():
    gates = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    host, device = HostMeter(), DeviceMeter(torch.device("cpu"))
    losses = [0.1, 2.5, float("inf"), float("nan"), 1.0]
    for step, loss in enumerate(losses):
        for meter in (host, device):
            meter.add(torch.tensor(loss), torch.tensor(step), torch.tensor([step]), None)
            meter.count(4)
        if step == 1:
            assert host.take(gates).get() == device.take(gates).get()
    a, b = host.take(gates).get(), device.take(gates).get()
    assert (a.bad_step, a.bad_loss, a.correct, a.images, a.steps) == (3, float("inf"), 9, 12, 3)
    assert (b.bad_step, b.bad_loss, b.correct, b.images, b.steps) == (3, float("inf"), 9, 12, 3)
    assert (a.gate_sum, a.alive, a.finite) == (b.gate_sum, b.alive, b.finite) == (1.5, 2, True)


def test_device_meter_keeps_what_was_noted_of_labels():
    meter = DeviceMeter(torch.device("cpu"))
    rows = torch.tensor([[1.0, 1.0, 0.0]])
    for labels in (torch.tensor([0, 2]), torch.tensor([7, -5]), rows, torch.tensor([1])):
        noted = note_labels(labels, 3, "search")[1]
        meter.add(torch.tensor(0.0), torch.tensor(0), torch.tensor([0]), noted)
    assert meter.take(torch.ones(2)).get().labels == (5.0, 7.0, 1.0)
    assert meter.take(torch.ones(2)).get().labels == (5.0, 7.0, 1.0)


class OnDevice(torch.Tensor):
    """A tensor that only claims to be on a device."""

    @property
    def device(self):
        return torch.device("cuda", 0)

    def to(self, *args, **options):
        return self


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, 1, 2, 4]), r"labels must be in \[0, 3\], .* got 4"),
        (torch.tensor([0, 1, 2, -3]), r"labels must be in \[0, 3\], .* got -3"),
        (torch.ones(4, 4), "a sum of 1 in each row, got a row that misses this by 3"),
        (torch.full((4, 4), torch.nan), "got a row that misses this by nan"),
    ],
)
def test_labels_on_a_device_are_refused_at_the_next_entry(monkeypatch, labels, message):
    """In steps and in the validation; nothing is read from the labels before."""
    monkeypatch.setattr("pfs_fast.searching.loop.DEFERRED", frozenset({"cpu"}))
    images = torch.randn(4, 3, 6, 6)
    bad = [(images, labels.as_subclass(OnDevice))]
    with pytest.raises(LoaderError, match=f"search: .*{message}"):
        run(tiny(), bad, cuda_graph=False)
    with pytest.raises(LoaderError, match=f"search: .*{message}"):
        config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp64")
        pfs.search(tiny(), batches(), 0.6, config=config, val_loader=bad, progress=False)


# -- on a GPU ------------------------------------------------------------------------------------------------------


@needs_cuda
@pytest.mark.parametrize("make", [uneven, device_loader])
@pytest.mark.parametrize("net", [tiny, dropping, narrow])
def test_search_on_cuda_is_the_same_with_and_without_graphs(make, net):
    images = (3, 8, 8) if net is narrow else (3, 6, 6)
    loader = make() if make is device_loader else batches(6, images=images)
    if make is device_loader:
        loader = device_loader(device="cuda")
    options = {"device": "cuda", "progress": False}
    model, found = net(), []
    for cuda_graph in (True, False):
        config = pfs.SearchConfig(epochs=4, precision="fp32", log_every=7, cuda_graph=cuda_graph)
        found.append(pfs.search(model, loader, 0.6, config=config, **options))
    torch.testing.assert_close(found[0].flat_gates, found[1].flat_gates, rtol=0, atol=0)


@needs_cuda
def test_replays_on_cuda_wait_for_nothing(recwarn):
    model = tiny()
    config = pfs.SearchConfig(epochs=6, log_every=7)
    torch.cuda.set_sync_debug_mode("default")
    pfs.search(
        model, device_loader(device="cuda"), 0.6, config=config, device="cuda", progress=False
    )
    assert not [w for w in recwarn if "capturable" in str(w.message)]
