"""What is seen before a capture, with stand-ins for the device: what waits for it, and what a graph could not read again."""

from __future__ import annotations

import warnings

import pytest
import torch

from pfs_fast.searching.graphs import CudaGraphs

NOTICE = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"


@pytest.fixture
def debug_mode(monkeypatch):
    """PyTorch's switch with its notice, which comes with the first call of a process."""
    modes = [0]

    def switch(mode):
        if len(modes) == 1:
            warnings.warn(NOTICE, UserWarning, stacklevel=2)
        modes.append(mode)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", switch)
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: modes[-1])
    return modes


class MetaGraphs(CudaGraphs):
    """The device of the stand-in holds no values, but takes every operation."""

    device_type = "meta"


def ask(work) -> str | None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return MetaGraphs().waits(work)


def test_the_notice_of_the_debug_mode_is_no_warning(debug_mode):
    assert ask(lambda: None) is None
    assert debug_mode == [0, "warn", 0]


def test_waits_are_told_and_other_warnings_go_on(debug_mode):
    def work():
        warnings.warn("called a synchronizing CUDA operation", UserWarning, stacklevel=1)

    assert "synchronizing CUDA operation" in ask(work)
    with pytest.raises(UserWarning, match="on purpose"):
        ask(lambda: warnings.warn("on purpose", UserWarning, stacklevel=1))
    assert debug_mode[-1] == 0


def test_mode_is_put_back_after_an_error(debug_mode):
    with pytest.raises(KeyError):
        ask(lambda: {}["on purpose"])
    assert debug_mode[-1] == 0


def test_the_tests_own_filter_lets_the_notice_pass():
    warnings.warn(NOTICE, UserWarning, stacklevel=1)


ON_DEVICE = torch.ones(3, device="meta")


@pytest.mark.parametrize(
    "work",
    [
        lambda: ON_DEVICE.clone().copy_(torch.ones(3)),
        lambda: torch.ones(3).to("meta", non_blocking=True),
        lambda: ON_DEVICE[torch.tensor([0, 2])],
        lambda: torch.cat([ON_DEVICE, torch.ones(3, device="meta")]).index_put_(
            (torch.tensor([1]),), torch.tensor(0.5)
        ),
    ],
)
def test_values_of_the_host_are_refused(debug_mode, work):
    """A replay would read them where they were, or not at all."""
    assert "a tensor of shape" in ask(work) and "on the CPU" in ask(work)


@pytest.mark.parametrize(
    "work",
    [
        lambda: ON_DEVICE * 2.0 + torch.tensor(3.0),  # a number is part of the launch
        lambda: torch.ones(3) + torch.ones(3),
        lambda: torch.cat([ON_DEVICE, ON_DEVICE]).sum(),
    ],
)
def test_work_of_the_device_alone_is_not(debug_mode, work):
    assert ask(work) is None


def test_values_of_the_host_are_refused_in_the_backward_pass(debug_mode):
    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad.clone().copy_(torch.ones(3))

    def work():
        Late.apply(ON_DEVICE.clone().requires_grad_()).sum().backward()

    assert "aten.copy_" in ask(work)
