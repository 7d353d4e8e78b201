"""Blocks kept from step to step: reused, bounded, given back, and without any effect on results."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import pfs_fast as pfs
from pfs_fast import _library
from pfs_fast.errors import NonFiniteLossError
from pfs_fast.searching.kept_memory import KeptMemory, kept_bytes, kept_memory
from pfs_fast.searching.plan import prepare

pytestmark = pytest.mark.skipif(
    not _library.backends().cpu, reason=f"no compiled operators: {_library.backends().cpu_reason}"
)
LARGE = (8, 16, 64, 64)  # 2 MiB of float32
CPU = torch.device("cpu")


@pytest.fixture
def memory():
    assert kept_bytes() == (0, 0)
    kept = KeptMemory()
    yield kept
    kept.close()
    assert kept_bytes() == (0, 0)


def norm(x: Tensor) -> Tensor:
    return pfs.ops.bn_gate_act(x, None, None, None, training=True, act="relu")


def test_a_block_serves_again(memory):
    x = torch.randn(LARGE)
    with memory:
        y = norm(x)
        first, wanted = y.data_ptr(), y.clone()
        in_use = kept_bytes()[0]
        assert in_use >= y.nbytes
        del y
        assert kept_bytes() == (0, in_use)
        y = norm(x)
        assert y.data_ptr() == first
        assert torch.equal(y, wanted)
        assert kept_bytes()[1] == 0
        del y


def test_a_smaller_tensor_takes_no_much_larger_block(memory):
    with memory:
        y = norm(torch.randn(LARGE))
        first = y.data_ptr()
        del y
        half = norm(torch.randn(4, 16, 64, 64))
        assert half.data_ptr() != first
        del half


def test_nothing_is_kept_outside_or_of_small_tensors(memory):
    y = norm(torch.randn(LARGE))
    assert kept_bytes() == (0, 0)
    with memory:
        small = norm(torch.randn(2, 4, 8, 8))
        assert kept_bytes() == (0, 0)
    del y, small


def test_tensors_outlive_the_memory():
    memory = KeptMemory()
    x = torch.randn(LARGE)
    with memory:
        y = norm(x)
    memory.close()
    assert kept_bytes()[0] >= y.nbytes
    assert torch.equal(y, norm(x))
    view = y[1:]
    del y
    assert kept_bytes()[0] > 0
    del view
    assert kept_bytes() == (0, 0)


def test_two_memories_share_and_the_last_one_gives_back():
    first, second = KeptMemory(), KeptMemory()
    with first:
        norm(torch.randn(LARGE))
    free = kept_bytes()[1]
    first.close()
    assert kept_bytes() == (0, free)
    with second:
        y = norm(torch.randn(LARGE))
        assert kept_bytes()[1] < free
    second.close()
    del y
    assert kept_bytes() == (0, 0)


def test_held_memory_is_bounded(memory):
    most = 0
    with memory:
        for channels in range(8, 72, 4):  # each too large for the blocks before
            y = norm(torch.randn(8, channels, 32, 32))
            most = max(most, kept_bytes()[0])
            del y
            assert sum(kept_bytes()) <= 1.5 * most


@pytest.mark.parametrize(
    "shape", [(8, 1, 128, 128), (8, 24, 64, 64), (64, 520, 2, 2), (1, 64, 64, 64)]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_have_the_same_values_and_strides(memory, shape, layout):
    def run() -> list[Tensor]:
        torch.manual_seed(0)
        x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
        residual = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
        gate = torch.rand(shape[1]).requires_grad_()
        y = pfs.ops.bn_gate_act(x, gate, None, None, residual, training=True, act="relu")
        weight = torch.randn(16, shape[1], 3, 3)
        z = pfs.ops.winograd_conv(y, weight, None, (1, 1), tile=2)
        grads = torch.autograd.grad(z.square().sum(), [x, residual, gate])
        return [y.detach(), z.detach(), *grads]

    plain = run()
    with memory:
        kept = run()
        again = run()  # out of blocks that hold old values
    for a, b, c in zip(plain, kept, again, strict=True):
        assert a.stride() == b.stride() == c.stride()
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    del plain, kept, again, a, b, c


def test_later_steps_of_a_search_take_no_new_memory():
    torch.manual_seed(0)
    images = torch.randn(32, 3, 32, 32)
    labels = torch.randint(10, (32,))
    config = pfs.SearchConfig(compact=False, precision="fp32")
    loop = prepare(pfs.models.resnet20(), images, pfs.Budget(0.5), config, device=CPU).loop
    with kept_memory(CPU):
        loop.step(images, labels)
        held = sum(kept_bytes())
        assert held > 2**20
        for _ in range(3):
            loop.step(images, labels)
            assert sum(kept_bytes()) == held
    assert kept_bytes() == (0, 0)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_search_gives_all_back(workers):
    data = TensorDataset(torch.randn(64, 3, 32, 32), torch.randint(10, (64,)))
    loader = DataLoader(data, batch_size=32, num_workers=workers)
    config = pfs.SearchConfig(max_steps=3, precision="fp32", epochs=2)
    pfs.search(pfs.models.resnet20(), loader, 0.5, config=config, progress=False, device="cpu")
    assert kept_bytes() == (0, 0)


def test_a_search_that_fails_gives_all_back():
    images = torch.randn(32, 3, 32, 32)
    images[5, 0, 0, 0] = torch.nan
    loader = [
        (torch.randn(32, 3, 32, 32), torch.zeros(32, dtype=torch.int64)),
        (images, torch.zeros(32, dtype=torch.int64)),
    ]
    config = pfs.SearchConfig(epochs=1, precision="fp32")
    with pytest.raises(NonFiniteLossError):
        pfs.search(pfs.models.resnet20(), loader, 0.5, config=config, progress=False, device="cpu")
    assert kept_bytes() == (0, 0)


def test_the_profiler_sees_its_allocations(memory):
    x = torch.randn(LARGE)
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile, memory:
        y = norm(x)
        del y
    records = [
        e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"
    ]
    assert records.count(x.nbytes) == 1
    assert records.count(-x.nbytes) == 1
