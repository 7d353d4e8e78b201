"""Training: what a run does, keeps and reports."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from small_training import CPU, Net, assert_same, batches, fit, state_of
from torch import Tensor, nn

from pfs_fast.errors import LoaderError, ModelError
from pfs_fast.training.batches import LabelWatch
from pfs_fast.training.evaluation import unwrap
from pfs_fast.training.onednn import unsafe_weight_gradients
from pfs_fast.training.train import TrainConfig, evaluate, train

# The loop


def test_training_equals_a_plain_loop():
    """The whole recipe in float64 against torch's own optimiser and scheduler."""
    net = Net().double()
    twin = copy.deepcopy(net)
    data = [(images.double(), labels) for images, labels in batches()]
    config = TrainConfig(epochs=4, lr=0.1, weight_decay=0.01, nesterov=True, label_smoothing=0.1)
    train(net, data, config=config, progress=False)

    optimizer = torch.optim.SGD(
        twin.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [2, 3])
    for _ in range(4):
        for images, labels in data:
            optimizer.zero_grad()
            F.cross_entropy(twin(images), labels, label_smoothing=0.1).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(
        dict(net.state_dict()), dict(twin.state_dict()), rtol=1e-9, atol=1e-12, check_stride=False
    )


def test_network_learns_and_history_is_complete():
    net = Net()
    result = fit(net, val_loader=batches(1), epochs=8)
    assert result.accuracy == 1.0 and result.best_accuracy == 1.0 and result.epochs == 8
    assert [row["epoch"] for row in result.history] == list(range(1, 9))
    expected = {"epoch", "lr", "loss", "accuracy", "val_loss", "val_accuracy", "seconds"}
    assert all(set(row) == expected for row in result.history)
    assert result.history[-1]["loss"] < result.history[0]["loss"] / 2
    assert "8 epochs" in str(result) and "best 100.00 %" in str(result)
    assert net.pfs_input_shape == (2, 4, 4)


def test_history_means_are_over_images():
    net = Net()
    data = batches(2) + batches(1, size=3)
    before = state_of(net)
    result = fit(net, data, epochs=1, lr=0.0, momentum=0.0, weight_decay=0.0)
    net.load_state_dict(before)
    with torch.no_grad():
        losses = [F.cross_entropy(net(x), labels, reduction="sum").item() for x, labels in data]
    assert result.history[0]["loss"] == pytest.approx(sum(losses) / 19, rel=1e-5)


def test_mode_is_kept_and_gradients_are_freed():
    net = Net().eval()
    net.bn.train()
    fit(net, val_loader=batches(1))
    assert not net.training and not net.conv.training and net.bn.training
    assert all(parameter.grad is None for parameter in net.parameters())


def test_frozen_parameters_stay():
    net = Net()
    net.conv.requires_grad_(False)
    before = net.conv.weight.clone()
    fit(net)
    assert torch.equal(net.conv.weight, before)


def test_model_without_trainable_parameters_is_refused():
    with pytest.raises(ModelError, match=r"train: model must have .*requires_grad_\(True\)"):
        fit(Net().requires_grad_(False))


def test_model_on_two_devices_is_refused():
    net = Net()
    net.fc.to("meta")
    with pytest.raises(ModelError, match="must be on one device, got cpu, meta"):
        fit(net)


def test_same_seed_same_result_and_global_generator_untouched():
    start = Net(dropout=0.5)
    generator_before = torch.random.get_rng_state()
    dataset = [(images[0], labels[0]) for images, labels in batches(16, size=1)]
    states = []
    for seed in (3, 3, 4):
        net = copy.deepcopy(start)
        loader = torch.utils.data.DataLoader(dataset, batch_size=4, shuffle=True)
        fit(net, loader, seed=seed)
        states.append(state_of(net))
    assert_same(states[0], states[1])
    assert not torch.equal(states[0]["fc.weight"], states[2]["fc.weight"])
    assert torch.equal(torch.random.get_rng_state(), generator_before)


def test_seed_none_uses_the_global_generator():
    states = []
    for seed in (1, 2):
        torch.manual_seed(0)
        net = Net(dropout=0.5)
        torch.manual_seed(seed)
        fit(net, seed=None)
        states.append(state_of(net))
    assert not torch.equal(states[0]["fc.weight"], states[1]["fc.weight"])


def test_set_epoch_is_called():
    class Loader(list):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)

    epochs: list[int] = []
    fit(Net(), Loader(batches()))
    assert epochs == [0, 1, 2]


def test_channels_last_moves_the_weights():
    net, plain = Net(), Net()
    fit(net)
    fit(plain, channels_last=False)
    assert net.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert plain.conv.weight.is_contiguous()


def test_networks_of_3d_convolutions_are_trained():
    net = nn.Sequential(
        nn.Conv3d(2, 3, 3), nn.BatchNorm3d(3), nn.Flatten(), nn.Linear(3 * 2 * 2 * 2, 2)
    )
    loader = [(torch.randn(4, 2, 4, 4, 4), torch.tensor([0, 1, 1, 0]))]
    before = state_of(net)
    fit(net, loader)
    assert not torch.equal(net[0].weight, before["0.weight"])


class Shortcut(nn.Module):
    """A strided 1x1 convolution of a few channels, as shortcuts of slim networks have."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.short = nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 7, 1, stride=2)
        self.fc = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.layouts = (x.is_contiguous(), self.short.weight.is_contiguous())
        return self.fc(self.short(self.stem(x)).mean((2, 3)))


def test_layers_whose_weight_gradient_overruns_are_trained_in_nchw():
    net = Shortcut().to(memory_format=torch.channels_last)
    images = torch.randn(8, 3, 16, 16).contiguous(memory_format=torch.channels_last)
    loader = [(images, torch.arange(8) % 2)]
    with pytest.warns(
        UserWarning, match=r"channels_last must be False on a CPU for 'short' \(1 such"
    ):
        fit(net, loader)
    assert net.layouts == (True, True)
    fit(net, loader, channels_last=False)  # as asked for: no warning
    assert net.layouts == (True, True)


@pytest.mark.parametrize(
    ("layer", "unsafe"),
    [
        (nn.Conv2d(15, 8, 1, stride=2), True),
        (nn.Conv2d(16, 8, 1, stride=2), False),
        (nn.Conv2d(32, 8, 1, stride=2, groups=4), True),
        (nn.Conv2d(4, 8, 1), False),
        (nn.Conv2d(4, 8, 3, stride=2), False),
        (nn.Conv2d(4, 8, 1, stride=2).requires_grad_(False), False),
    ],
)
def test_unsafe_weight_gradients_are_those_of_narrow_strided_1x1(layer: nn.Module, unsafe: bool):
    assert unsafe_weight_gradients(nn.Sequential(layer)) == (["0"] if unsafe else [])


@pytest.mark.parametrize("amp", ["bf16", "fp16", "auto"])
def test_amp_trains_and_keeps_the_weights_in_fp32(amp: str):
    net = Net()
    result = fit(net, val_loader=batches(1), amp=amp, epochs=8)
    assert net.conv.weight.dtype == torch.float32
    assert result.accuracy == 1.0


# States


def test_last_and_best_states_are_the_evaluated_ones():
    net = Net()
    data, validation = batches(), batches(2)
    result = fit(net, data, validation, lr=0.5, epochs=6)
    assert_same(result.last_state, state_of(net))
    net.load_state_dict(result.best_state)
    assert evaluate(net, validation).top1 == result.best_accuracy
    first = next(r["epoch"] for r in result.history if r["val_accuracy"] == result.best_accuracy)
    assert result.best_epoch == first
    assert all(tensor.device == CPU for tensor in result.best_state.values())


def test_restore_best_ends_in_the_best_state():
    validation = batches(2)
    # With the labels exchanged, validation is best before training has gone far.
    wrong = [(images, 1 - labels) for images, labels in validation]
    net = Net()
    result = fit(net, val_loader=wrong, restore="best", epochs=10, lr=0.2)
    assert result.best_epoch < 10 and result.accuracy < result.best_accuracy
    assert_same(result.best_state, state_of(net))
    assert not torch.equal(result.best_state["fc.weight"], result.last_state["fc.weight"])


def test_without_validation_there_is_no_best():
    result = fit(Net())
    assert result.accuracy is result.best_accuracy is result.best_epoch is result.best_state is None
    assert "val_loss" not in result.history[0]


def test_eval_every_evaluates_the_last_epoch_too():
    result = fit(Net(), val_loader=batches(1), epochs=5, eval_every=2)
    assert [row["epoch"] for row in result.history if "val_loss" in row] == [2, 4, 5]


def test_ema_is_the_weighted_mean_of_the_steps():
    net = Net().double()
    data = [(images.double(), labels) for images, labels in batches(4)]
    seen = []

    class Watched(list):
        def __iter__(self):
            for item in list.__iter__(self):
                seen.append(state_of(net))
                yield item
            seen.append(state_of(net))

    result = fit(net, Watched(data), epochs=1, ema=0.3)
    average = seen[0]["fc.weight"]
    for step, state in enumerate(seen[1:], start=1):
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * state["fc.weight"]
    torch.testing.assert_close(net.fc.weight.detach(), average, rtol=1e-12, atol=1e-12)
    assert_same(result.last_state, state_of(net))


def test_ema_does_not_change_the_trained_weights():
    """Training goes on from the weights, not from the average that is evaluated in between."""
    seen: list[list[Tensor]] = []
    start = Net()
    for ema in (None, 0.9):
        net, weights = copy.deepcopy(start), []

        class Watched(list):
            def __iter__(self, net=net, weights=weights):
                for item in list.__iter__(self):
                    weights.append(net.fc.weight.detach().clone())
                    yield item

        fit(net, Watched(batches()), batches(1), ema=ema)
        seen.append(weights)
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_labels_of_any_integer_type_and_soft_labels_train():
    images, labels = batches(1)[0]
    for form in (labels.int(), labels.to(torch.uint8), F.one_hot(labels).float()):
        result = fit(Net(), [(images, form)], [(images, labels)])
        assert result.history[-1]["accuracy"] >= 0


def test_label_watch_on_a_device_clamps_and_reports():
    """The path of labels that live on a device, with tensors that only claim to be there."""

    class OnDevice(Tensor):
        @property
        def device(self):
            return torch.device("cuda", 0)

    watch = LabelWatch(CPU, "train")
    good = watch.checked(torch.tensor([0, 1]).as_subclass(OnDevice), 3)
    bad = watch.checked(torch.tensor([1, 7]).as_subclass(OnDevice), 3)
    assert good.tolist() == [0, 1] and bad.tolist() == [1, 2]
    with pytest.raises(LoaderError, match=r"labels must be in \[0, 2\], .* got 7"):
        watch.read()
    watch.checked(torch.tensor([-1, 1]).as_subclass(OnDevice), 3)
    with pytest.raises(LoaderError, match="got -1"):
        watch.read()
    watch.checked(torch.tensor([0, 2]).as_subclass(OnDevice), 3)
    watch.read()


def test_wrapped_models_train_by_their_inner_module():
    net = Net()
    assert unwrap(nn.DataParallel(net)) is net
    result = fit(nn.DataParallel(net), val_loader=batches(1), epochs=1)
    assert_same(result.last_state, state_of(net))


def test_progress_line_shows_the_run(capsys: pytest.CaptureFixture[str]):
    train(Net(), batches(), batches(1), TrainConfig(epochs=2, lr=0.05))
    text = capsys.readouterr().err
    for part in ("train: 6/6 (100 %)", "epoch 2/2", "loss ", "acc ", "val_acc ", "best ", "lr 0.0"):
        assert part in text, text


def test_loader_without_length_trains():
    class Endless:
        def __iter__(self):
            return itertools.islice(itertools.cycle(batches()), 4)

    assert fit(Net(), Endless()).epochs == 3


class Stream(torch.utils.data.IterableDataset):
    """Images one by one, of a number that nobody knows."""

    def __iter__(self):
        for images, labels in batches():
            yield from zip(images, labels, strict=True)


def test_iterable_data_set_trains_with_progress(capsys: pytest.CaptureFixture[str]):
    loader = torch.utils.data.DataLoader(Stream(), batch_size=8)
    net, twin = Net(), Net()
    twin.load_state_dict(net.state_dict())
    train(net, loader, loader, TrainConfig(epochs=2, lr=0.05))
    assert "train: 6 steps" in capsys.readouterr().err
    fit(twin, batches(), batches(), epochs=2)
    assert_same(state_of(net), state_of(twin))
