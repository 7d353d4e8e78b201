"""Training that fails: losses and gradients that are not finite, interrupts, bad loaders."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from small_training import CPU, Net, assert_same, batches, fit, state_of
from torch import Tensor

from pfs_fast.errors import ConfigError, LoaderError, NonFiniteLossError
from pfs_fast.training.train import TrainConfig, train


def test_nan_loss_stops_at_the_step_with_the_last_good_state():
    data = batches(3)
    good = Net()
    bad = copy.deepcopy(good)
    config = TrainConfig(epochs=4, schedule="constant", lr=0.05)

    class Spoiled(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for index, (images, labels) in enumerate(list.__iter__(self)):
                nan = self.passes == 3 and index == 1
                yield images * math.nan if nan else images, labels

    with pytest.raises(NonFiniteLossError, match=r"got nan at step 8;.*Try a lower lr"):
        train(bad, Spoiled(data), config=config, progress=False)
    fit(good, data, epochs=2, schedule="constant")
    assert_same(state_of(good), state_of(bad))


def test_nan_loss_in_the_first_epoch_gives_the_model_back():
    net = Net()
    before = state_of(net)
    with pytest.raises(NonFiniteLossError, match="at step 1"):
        fit(net, [(torch.full((4, 2, 4, 4), math.inf), torch.zeros(4, dtype=torch.long))])
    assert_same(before, state_of(net))


def test_nan_gradient_of_an_epochs_last_step_does_not_reach_the_kept_state():
    data = batches(1)
    net = Net()
    reference = copy.deepcopy(net)
    gradients = []

    def spoil(grad: Tensor) -> Tensor:
        gradients.append(grad)
        return grad * math.nan if len(gradients) == 2 else grad

    net.fc.weight.register_hook(spoil)
    with pytest.raises(NonFiniteLossError, match="weights must stay finite, got nan at step 2"):
        fit(net, data, data, schedule="constant")
    fit(reference, data, epochs=1, schedule="constant")
    assert_same(state_of(reference), state_of(net))


def test_statistics_that_overflow_are_no_result():
    """Batch norm hides the size of its input from the loss, not from the statistics of the eval mode."""
    net = Net()
    before = state_of(net)
    huge = [(images * 1e30, labels) for images, labels in batches()]
    with pytest.raises(
        NonFiniteLossError, match=r"bn\.running_var must .* got inf at step 3;.*normalise"
    ):
        fit(net, huge)
    assert_same(before, state_of(net))


def test_infinity_that_a_buffer_holds_on_purpose_stays():
    net = Net()
    net.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    fit(net)
    assert net.mask.tolist() == [0.0, -math.inf]


def test_validation_with_a_loss_that_is_not_finite_gives_the_model_back():
    net = Net()
    before = state_of(net)
    images, labels = batches(1)[0]
    with pytest.raises(NonFiniteLossError, match="train: loss of the evaluation must be finite"):
        fit(net, val_loader=[(images * math.nan, labels)])
    assert_same(before, state_of(net))


def test_best_state_without_validation_is_refused():
    with pytest.raises(ConfigError, match="train: val_loader must be given with restore='best'"):
        fit(Net(), restore="best")
    fit(Net(), restore="last")
    fit(Net(), val_loader=batches(1), restore="best")


def test_diverging_training_is_found_by_the_loss_log():
    """What a device would find late: the log names the first bad step, not the one of the read."""
    from pfs_fast.training.evaluation import Forward
    from pfs_fast.training.train import _StepLog

    log = _StepLog(Forward(Net(), CPU, None, None), first_step=10)
    for loss in (1.0, 2.0, math.inf, math.nan):
        log.add(torch.tensor(loss), torch.tensor(1), 4)
    with pytest.raises(NonFiniteLossError, match="got inf at step 13"):
        log.read()


def test_interrupt_leaves_the_last_complete_epoch():
    data = batches(3)
    net = Net()
    reference = copy.deepcopy(net)

    class Interrupted(list):
        passes = 0

        def __iter__(self):
            self.passes += 1
            for index, item in enumerate(list.__iter__(self)):
                if self.passes == 2 and index == 2:
                    raise KeyboardInterrupt
                yield item

    with pytest.raises(KeyboardInterrupt):
        fit(net, Interrupted(data), epochs=5, schedule="constant")
    fit(reference, data, epochs=1, schedule="constant")
    assert_same(state_of(reference), state_of(net))
    assert net.training and all(parameter.grad is None for parameter in net.parameters())


IMAGES = torch.zeros(4, 2, 4, 4)
LABELS = torch.zeros(4, dtype=torch.long)

BAD_LOADERS = {
    "empty": ([], "loader must yield at least one batch, got none"),
    "no iterable": (3, "loader must be an iterable of .* got int"),
    "images alone": ([IMAGES], r"must yield pairs \(images, labels\), got Tensor"),
    "three parts": ([(IMAGES, LABELS, LABELS)], "must yield pairs .* got tuple of 3"),
    "dict": ([{"image": IMAGES}], "must yield pairs .* got dict"),
    "arrays": ([(IMAGES.numpy(), LABELS.numpy())], "must yield tensors, got ndarray"),
    "uint8 images": ([(IMAGES.byte(), LABELS)], "got torch.uint8; convert .*DeviceLoader"),
    "scalar image": ([(torch.zeros(()), LABELS)], r"images must have shape \[N, C"),
    "empty batch": ([(IMAGES[:0], LABELS[:0])], "with N >= 1, got"),
    "float labels": ([(IMAGES, LABELS.float())], "labels must be integers .* torch.float32"),
    "column labels": ([(IMAGES, LABELS[:, None])], r"labels must be integers .*\[4, 1\]; use"),
    "fewer labels": ([(IMAGES, LABELS[:3])], "labels must be as many as images, got 3"),
    "label too large": ([(IMAGES, LABELS + 2)], r"labels must be in \[0, 1\], .* got 2; number"),
    "negative label": ([(IMAGES, LABELS - 100)], r"labels must be in \[0, 1\], .* got -100"),
    "wide soft labels": ([(IMAGES, torch.ones(4, 3))], r"one column per class \(2\), got 3"),
    "other channels": ([(IMAGES[:, :1], LABELS)], r"images must fit the model, got shape \[4, 1"),
    "a generator": ((pair for pair in batches()), "re-iterable for 3 passes, got a generator"),
    "an iterator": (iter(batches()), r"re-iterable, got no batch in pass 2"),
}


@pytest.mark.parametrize("case", BAD_LOADERS)
def test_bad_loader_is_refused(case: str):
    loader, message = BAD_LOADERS[case]
    net = Net()
    with pytest.raises(LoaderError, match=f"^train: .*{message}"):
        fit(net, loader)
    if case != "an iterator":  # its first epoch was complete, and stays
        fresh = {"conv.weight": net.conv.weight.detach().clone()}
        torch.manual_seed(0)
        assert_same(fresh, {"conv.weight": Net().conv.weight.detach()})


def test_generator_is_enough_for_one_epoch():
    assert fit(Net(), (pair for pair in batches()), epochs=1).epochs == 1


def test_bad_validation_loader_is_named():
    with pytest.raises(LoaderError, match="train: val_loader must yield at least one batch"):
        fit(Net(), val_loader=[])
    with pytest.raises(LoaderError, match="train: val_loader must be re-iterable"):
        fit(Net(), val_loader=iter(batches()))
