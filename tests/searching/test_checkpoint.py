"""Interrupted after any epoch and resumed, a search ends as if it had never stopped."""

from __future__ import annotations

import os

import pytest
import torch
from small_nets import Frozen, batches, cbr, head, tiny
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import pfs_fast as pfs
from pfs_fast.errors import FileFormatError, FileWriteError
from pfs_fast.searching.search import COMPACT_EVERY

IMAGES = torch.randint(
    0, 256, (22, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)
LABELS = torch.arange(22) % 4
EPOCHS = 4


class Interrupted(Exception):
    pass


class Interrupting:
    """Another loader that fails at the start (or within) a pass."""

    def __init__(self, loader, passes: int, batches: int = 0) -> None:
        self.loader, self.passes, self.batches = loader, passes, batches

    def __iter__(self):
        for i, batch in enumerate(self.loader):
            if self.passes == 0 and i == self.batches:
                raise Interrupted
            yield batch
        self.passes -= 1

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.loader, "set_epoch"):
            self.loader.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.loader)


def device_loader() -> pfs.data.DeviceLoader:
    return pfs.data.DeviceLoader(IMAGES, LABELS, batch_size=8, train=True)


def data_loader() -> DataLoader:
    return DataLoader(TensorDataset(IMAGES.float() / 255, LABELS), batch_size=8, shuffle=True)


def dropping() -> nn.Module:
    return nn.Sequential(cbr(3, 3), nn.Dropout(0.3), cbr(3, 5), head(5))


def run(model, loader, budget=0.6, checkpoint=None, **options):
    val_loader = options.pop("val_loader", None)
    config = pfs.SearchConfig(
        **{"epochs": EPOCHS, "backend": "reference", "precision": "fp32", "log_every": 2, **options}
    )
    return pfs.search(
        model,
        loader,
        budget,
        config=config,
        checkpoint=checkpoint,
        progress=False,
        val_loader=val_loader,
    )


def without_time(history):
    return [{k: v for k, v in entry.items() if k != "seconds"} for entry in history]


def assert_equal(a: pfs.SearchResult, b: pfs.SearchResult) -> None:
    assert torch.equal(a.flat_gates, b.flat_gates)
    assert torch.equal(a.died_at, b.died_at)
    assert without_time(a.history) == without_time(b.history)
    assert a.structure == b.structure
    assert a.config == b.config


@pytest.mark.parametrize("make", [device_loader, data_loader])
@pytest.mark.parametrize(("passes", "inside"), [(1, 0), (2, 0), (3, 0), (2, 2)])
def test_resumed_search_equals_an_uninterrupted_one(tmp_path, make, passes, inside):
    """After 1, 2 and 3 epochs, and within the third: bit by bit, dropout and shuffling included."""
    model, path = dropping(), tmp_path / "search.ckpt"
    straight = run(model, make())
    with pytest.raises(Interrupted):
        run(model, Interrupting(make(), passes, inside), checkpoint=path)
    frozen = Frozen(model)
    assert_equal(run(model, make(), checkpoint=path), straight)
    frozen.check()


def test_resumed_search_keeps_the_best_epoch_and_running_statistics(tmp_path):
    model, path = dropping(), tmp_path / "search.ckpt"
    options = {"select": "best", "target": 1.0, "val_loader": batches(2, seed=9)}
    straight = run(model, device_loader(), **options)
    with pytest.raises(Interrupted):
        run(model, Interrupting(device_loader(), 2), checkpoint=path, **options)
    assert_equal(run(model, device_loader(), checkpoint=path, **options), straight)


def test_resumed_search_with_dead_and_left_out_channels_equals_an_uninterrupted_one(
    tmp_path, monkeypatch
):
    monkeypatch.setattr("pfs_fast.gating.compaction.MIN_STEPS_SAVED", 0.5)
    monkeypatch.setitem(COMPACT_EVERY, "cpu", 3)
    model, path = pfs.models.resnet20(4, expansion=0.5), tmp_path / "search.ckpt"
    options = {"lr": 0.1, "gamma": 5.0, "target": 0.1, "epochs": 6}
    straight = run(model, batches(4, images=(3, 8, 8)), **options)
    with pytest.raises(Interrupted):
        run(model, Interrupting(batches(4, images=(3, 8, 8)), 4), checkpoint=path, **options)
    resumed = run(model, batches(4, images=(3, 8, 8)), checkpoint=path, **options)
    assert resumed.history[-1]["channels"] < len(resumed.flat_gates)
    assert_equal(resumed, straight)


def test_finished_search_is_not_run_again(tmp_path):
    model, path = tiny(), tmp_path / "search.ckpt"
    straight = run(model, device_loader(), checkpoint=path)

    class Once:
        """Gives the first batch, from which the model is traced, and no other."""

        def __iter__(self):
            yield next(iter(device_loader()))
            pytest.fail("a finished search asked for a second batch")

    assert_equal(run(model, Once(), checkpoint=path), straight)


def test_checkpoint_is_one_whole_file_after_every_epoch(tmp_path):
    model, path = tiny(), tmp_path / "search.ckpt"
    seen = []

    class Watching:
        def __iter__(self):
            seen.append(sorted(os.listdir(tmp_path)))
            return iter(batches(2))

    run(model, Watching(), checkpoint=path)
    assert seen == [[]] + [["search.ckpt"]] * (EPOCHS - 1)
    assert os.listdir(tmp_path) == ["search.ckpt"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"lr": 0.02},
        {"epochs": EPOCHS + 1},
        {"max_steps": 100},
        {"target": 0.3},
        {"scope": "all", "gamma": 0.1},
        {"precision": "fp64"},
        {"budget": 0.5},
        {"model": dropping},
        {"model": tiny},
    ],
)
def test_checkpoint_of_another_search_is_refused(tmp_path, change):
    torch.manual_seed(0)
    path = tmp_path / "search.ckpt"
    run(tiny(), batches(2), checkpoint=path)
    before = path.read_bytes()
    torch.manual_seed(0)
    change = dict(change)
    model = tiny() if "model" not in change else None
    if model is None:
        torch.manual_seed(1)  # other weights
        model = change.pop("model")()
    with pytest.raises(
        FileFormatError,
        match=r"search: checkpoint must be of this search .*search\.ckpt'; give another path, or delete",
    ):
        run(model, batches(2), checkpoint=path, **change)
    assert path.read_bytes() == before


def test_checkpoint_of_the_same_search_is_taken_whatever_the_number_of_workers_of_torch(tmp_path):
    torch.manual_seed(0)
    path = tmp_path / "search.ckpt"
    run(tiny(), batches(2), checkpoint=path)
    torch.manual_seed(0)
    run(tiny(), batches(2), checkpoint=path)


@pytest.mark.parametrize("cut", [0, 4, 100, 0.5, -1])
def test_truncated_checkpoint_is_refused(tmp_path, cut):
    model, path = tiny(), tmp_path / "search.ckpt"
    run(model, batches(2), checkpoint=path)
    data = path.read_bytes()
    path.write_bytes(data[: cut if isinstance(cut, int) else int(cut * len(data))])
    before = path.read_bytes()
    with pytest.raises(FileFormatError, match="search: path must be a whole safetensors file"):
        run(model, batches(2), checkpoint=path)
    assert path.read_bytes() == before


def test_other_files_are_refused_as_checkpoints(tmp_path):
    model = tiny()
    result = run(model, batches(2))
    result.save(tmp_path / "result")
    pfs.save(result.slim(), tmp_path / "slim")
    (tmp_path / "structure").write_text(result.structure.to_json())
    (tmp_path / "garbage").write_bytes(bytes(range(256)) * 8)
    torch.save(model.state_dict(), tmp_path / "pickle")
    for path in sorted(tmp_path.iterdir()):
        before = path.read_bytes()
        with pytest.raises(FileFormatError, match="search: path must be"):
            run(model, batches(2), checkpoint=path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("place", ["missing/search.ckpt", "."])
def test_checkpoint_place_that_cannot_be_written_is_refused_before_any_step(tmp_path, place):
    class Counting:
        served = 0

        def __iter__(self):
            for batch in batches(3):
                self.served += 1
                yield batch

    loader = Counting()
    with pytest.raises((FileWriteError, FileFormatError), match="search: "):
        run(tiny(), loader, checkpoint=tmp_path / place)
    assert loader.served == 1  # the batch that the model is traced with
    assert os.listdir(tmp_path) == []
