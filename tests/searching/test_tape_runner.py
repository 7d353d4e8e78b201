"""Searches on the CPU whose steps are replayed from tapes: the same gates as step by step, and nothing left out."""

from __future__ import annotations

import weakref

import pytest
import torch
from small_nets import Net, batches, cbr, conv, head, tiny
from test_checkpoint import Interrupted, Interrupting
from test_runner import DYING, assert_same_search, device_loader, dropping, narrow, run, uneven
from torch import fx, nn

import pfs_fast as pfs
from pfs_fast import _library
from pfs_fast.errors import LoaderError
from pfs_fast.gating.compaction import Compaction
from pfs_fast.searching import runner as runners
from pfs_fast.searching.search import COMPACT_EVERY
from pfs_fast.searching.tape import NotRecordedError, Tape

pytestmark = pytest.mark.skipif(
    not _library.backends().cpu, reason=f"no compiled library: {_library.backends().cpu_reason}"
)
FUSED = {"backend": "fused", "precision": "fp32"}


class Log:
    def __init__(self) -> None:
        self.recorded = self.replayed = self.refused = 0


@pytest.fixture
def log(monkeypatch) -> Log:
    """Counts recordings and replays."""
    log, record, replay = Log(), runners.record, Tape.replay

    def recording(*args):
        outputs, found = record(*args)
        log.recorded += isinstance(found, Tape)
        log.refused += isinstance(found, NotRecordedError)
        return outputs, found

    def replaying(tape, *inputs):
        log.replayed += 1
        return replay(tape, *inputs)

    monkeypatch.setattr(runners, "record", recording)
    monkeypatch.setattr(Tape, "replay", replaying)
    return log


def no_norm() -> nn.Module:
    return Net(lambda m, x: m.fc(torch.relu(m.a(x))), a=conv(3, 4), fc=head(4))


@pytest.mark.parametrize("make", [uneven, device_loader])
@pytest.mark.parametrize("net", [tiny, dropping])
@pytest.mark.parametrize("options", [{}, FUSED])
def test_replayed_search_equals_one_step_by_step(log, make, net, options):
    model = net()
    replayed = run(model, make(), compact=False, **options)
    # Two shapes; the first step of all tells the number of classes.
    assert (log.recorded, log.replayed, log.refused) == (2, replayed.steps - 3, 0)
    assert_same_search(run(model, make(), compact=False, cpu_graph=False, **options), replayed)
    assert log.recorded == 2


def test_model_without_norms_and_soft_labels_are_replayed(log):
    loader = [(x, torch.nn.functional.one_hot(y, 4).double()) for x, y in batches(6)]
    model = no_norm()
    replayed = run(model, loader, compact=False, scope="all")
    assert log.replayed > 4
    assert_same_search(run(model, loader, compact=False, scope="all", cpu_graph=False), replayed)


@pytest.mark.parametrize("options", [{}, FUSED])
def test_step_is_recorded_anew_after_channels_have_left(log, monkeypatch, options):
    monkeypatch.setattr("pfs_fast.gating.compaction.MIN_STEPS_SAVED", 0.5)
    monkeypatch.setitem(COMPACT_EVERY, "cpu", 6)
    model, loader = narrow(), batches(5, images=(3, 8, 8))
    replayed = run(model, loader, **DYING, **options)
    assert replayed.history[-1]["channels"] < len(replayed.flat_gates)
    assert log.recorded > 1
    assert log.replayed == replayed.steps - log.recorded - 1
    assert_same_search(run(model, loader, **DYING, cpu_graph=False, **options), replayed)


def test_tape_lets_go_of_weights_before_narrower_ones_are_made(monkeypatch):
    monkeypatch.setattr("pfs_fast.gating.compaction.MIN_STEPS_SAVED", 0.5)
    monkeypatch.setitem(COMPACT_EVERY, "cpu", 6)
    found, made, leave_out = [], [], Compaction.leave_out

    def record(*args):
        outputs, tape = recording(*args)
        made.append(weakref.ref(tape))
        return outputs, tape

    def leaving(compaction, keep):
        found.append([ref() for ref in made])
        return leave_out(compaction, keep)

    recording = runners.record
    monkeypatch.setattr(runners, "record", record)
    monkeypatch.setattr(Compaction, "leave_out", leaving)
    run(narrow(), batches(5, images=(3, 8, 8)), **DYING)
    assert found and found[0]
    assert all(tape is None for tapes in found for tape in tapes)


def test_running_statistics_are_updated_in_replays(log):
    model, loader = tiny(), batches(5)
    options = {"epochs": 3, "precision": "fp32", "log_every": 5, "seed": 0}
    found = []
    for cpu_graph in (True, False):
        config = pfs.SearchConfig(**options, cpu_graph=cpu_graph)
        result = pfs.search(
            model, loader, 0.6, config=config, val_loader=batches(3, seed=1), progress=False
        )
        found.append([entry.get("val_accuracy") for entry in result.history])
    assert log.replayed == 15 - 2
    assert found[0] == found[1]
    assert any(value is not None for value in found[0])


def test_images_of_another_size_have_a_tape_of_their_own(log):
    loader = [*batches(3), *batches(3, images=(3, 9, 7), seed=1)]
    model = tiny()
    replayed = run(model, loader, compact=False, channels_last=False)
    assert (log.recorded, log.replayed) == (2, replayed.steps - 3)
    stepped = run(model, loader, compact=False, channels_last=False, cpu_graph=False)
    assert_same_search(stepped, replayed)


def test_shapes_beyond_the_most_are_stepped(log, monkeypatch):
    monkeypatch.setattr(runners, "MAX_SHAPES", 1)
    model = tiny()
    result = run(model, uneven(), epochs=5, compact=False)
    assert log.recorded == 1
    assert log.replayed == 5 * 5 - 2
    assert_same_search(run(model, uneven(), epochs=5, compact=False, cpu_graph=False), result)


def test_label_outside_the_classes_is_found_before_a_replay(log):
    loader = batches(8)
    loader[6][1][0] = 4
    with pytest.raises(
        LoaderError, match=r"labels must be in \[0, 3\], the model's outputs, got 4"
    ):
        run(tiny(), loader)
    assert log.replayed == 4


def cumulative() -> nn.Module:
    """Its statistics are averages over all steps: the number of steps is read on the host."""
    model = tiny()
    model[0][1].momentum = None
    return model


def test_step_that_cannot_be_recorded_is_reported_once_and_taken_without(log):
    model, loader, found = cumulative(), batches(5), []
    for cpu_graph in (True, False):
        config = pfs.SearchConfig(epochs=2, precision="fp32", cpu_graph=cpu_graph)
        options = {"config": config, "val_loader": loader, "progress": False}
        if cpu_graph:
            with pytest.warns(RuntimeWarning, match=r"search: a step on the CPU must be tensor operations alone.*_local_scalar_dense.*cpu_graph=False") as caught:  # fmt: skip
                found.append(pfs.search(model, loader, 0.6, **options))
            assert len(caught) == 1
        else:
            found.append(pfs.search(model, loader, 0.6, **options))
    assert (log.recorded, log.replayed, log.refused) == (0, 0, 1)
    assert_same_search(*found)


CALLS: list[int] = []


def counted(x):
    CALLS.append(1)
    return x


fx.wrap("counted")


def test_python_of_the_user_runs_in_every_step(log):
    model = Net(lambda m, x: m.fc(m.b(counted(m.a(x)))), a=cbr(3, 4), b=cbr(4, 4), fc=head(4))
    CALLS.clear()
    result = run(model, batches(5), compact=False)
    assert log.recorded == 0
    assert len(CALLS) >= result.steps


def test_hooks_run_in_every_step(log):
    model = tiny()
    model[2][1].register_forward_hook(lambda m, x, y: CALLS.append(1))
    CALLS.clear()
    result = run(model, batches(5), compact=False)
    assert log.recorded == 0
    assert len(CALLS) >= result.steps


def test_search_goes_on_from_a_checkpoint_of_one_without_tapes(log, tmp_path):
    model, loader, path = tiny(), batches(5), tmp_path / "search.ckpt"
    straight = run(model, loader, epochs=4, compact=False)
    options = {"epochs": 4, "compact": False, "checkpoint": path}
    with pytest.raises(Interrupted):
        run(model, Interrupting(loader, 2), **options, cpu_graph=False)
    resumed = run(model, loader, **options)
    assert torch.equal(resumed.flat_gates, straight.flat_gates)
