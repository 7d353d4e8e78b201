"""Batches on their way to a device: in order, bounded, with the loader's own errors, and closed at the end."""

from __future__ import annotations

import pytest
import torch
from small_nets import batches, tiny

import pfs_fast as pfs
from pfs_fast.searching.prefetch import prefetched


class Transfer:
    """Notes what is asked of it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.marks = 0

    def send(self, images):
        self.log.append("send")
        return images.clone()

    def pin(self, labels):
        return labels

    def mark(self):
        self.marks += 1
        return Mark(self.log, self.marks)


class Mark:
    def __init__(self, log, number) -> None:
        self.log, self.number = log, number

    def synchronize(self) -> None:
        self.log.append(f"wait {self.number}")


def test_prefetched_batches_are_the_loaders_in_order():
    data, transfer = batches(5), Transfer()
    for (images, labels), (x, y) in zip(prefetched(iter(data), transfer), data, strict=True):
        assert torch.equal(images, x)
        assert images is not x
        assert labels is y


def test_host_is_never_further_ahead_than_asked():
    transfer = Transfer()
    for _ in prefetched(iter(batches(5)), transfer, ahead=2):
        transfer.log.append("step")
    assert transfer.log == ["send", "step"] * 3 + ["wait 1", "send", "step", "wait 2", "send", "step", "wait 3"]  # fmt: skip


def test_batches_on_a_device_stay_as_they_are():
    data, transfer = [(torch.zeros(2, 3, device="meta"), torch.zeros(2, device="meta"))], Transfer()
    assert next(prefetched(iter(data), transfer))[0] is data[0][0]
    assert transfer.log == []


def test_errors_of_the_loader_come_through():
    def failing():
        yield batches(1)[0]
        raise KeyError("on purpose")

    iterator = prefetched(failing(), Transfer())
    next(iterator)
    with pytest.raises(KeyError, match="on purpose"):
        next(iterator)


class Watched:
    """A loader whose passes say when they are closed."""

    def __init__(self) -> None:
        self.open = 0

    def __iter__(self):
        self.open += 1
        try:
            yield from batches(6)
        finally:
            self.open -= 1


def test_closing_closes_the_loaders_pass():
    loader = Watched()
    iterator = prefetched(iter(loader), Transfer())
    next(iterator)
    assert loader.open == 1
    iterator.close()
    assert loader.open == 0


@pytest.mark.parametrize(
    "options", [{"epochs": 2}, {"epochs": 2, "max_steps": 8}, {"max_steps": 2}]
)
def test_search_leaves_no_pass_of_its_loader_open(options):
    loader = Watched()
    config = pfs.SearchConfig(backend="reference", precision="fp32", **options)
    pfs.search(tiny(), loader, 0.6, config=config, progress=False)
    assert loader.open == 0


def test_search_that_fails_leaves_no_pass_of_its_loader_open():
    loader = Watched()
    config = pfs.SearchConfig(backend="reference", precision="fp32", epochs=1)
    with pytest.raises(pfs.errors.LoaderError) as caught:
        pfs.search(tiny(classes=2), loader, 0.6, config=config, progress=False)
    assert loader.open == 0
    assert "labels must be in [0, 1]" in str(caught.value)


def test_search_does_not_close_what_the_caller_made():
    stream = (batch for batch in batches(5))
    config = pfs.SearchConfig(backend="reference", precision="fp32", epochs=1, max_steps=2)
    pfs.search(tiny(), stream, 0.6, config=config, progress=False)
    assert len(list(stream)) == 3
