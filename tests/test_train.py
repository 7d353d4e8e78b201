"""Training: recipes, schedules, states, and what happens when loader, loss or user fail."""

from __future__ import annotations

import copy
import itertools
import math
from collections import namedtuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pfs_fast.batches import LabelWatch, split_outputs
from pfs_fast.errors import ConfigError, LoaderError, ModelError, NonFiniteLossError
from pfs_fast.evaluation import Accuracy, unwrap
from pfs_fast.onednn import unsafe_weight_gradients
from pfs_fast.recipes import autocast_dtype
from pfs_fast.train import TrainConfig, TrainResult, evaluate, scratch_b_epochs, train
from pfs_fast.weights import parameter_groups

CPU = torch.device("cpu")


class Net(nn.Module):
    def __init__(self, classes: int = 2, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.depthwise = nn.Conv2d(4, 4, 3, groups=4)
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(4, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(self.dropout(self.depthwise(x).mean((2, 3))))


def batches(count: int = 3, size: int = 8, classes: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Images whose brightness tells the class."""
    generator = torch.Generator().manual_seed(1)
    result = []
    for _ in range(count):
        labels = torch.randint(classes, (size,), generator=generator)
        noise = 0.1 * torch.randn(size, 2, 4, 4, generator=generator)
        result.append((noise + labels.view(-1, 1, 1, 1), labels))
    return result


def fit(model: nn.Module, loader=None, val_loader=None, **options) -> TrainResult:
    options = {"epochs": 3, "lr": 0.05} | options
    loader = batches() if loader is None else loader
    return train(model, loader, val_loader, TrainConfig(**options), progress=False)


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0, check_stride=False)


# Recipes


def test_defaults_are_the_papers_cifar_recipe():
    config = TrainConfig()
    assert config == TrainConfig.cifar()
    assert (config.epochs, config.lr, config.momentum, config.weight_decay) == (160, 0.1, 0.9, 1e-4)
    assert not config.nesterov and config.decay_bn_bias and config.label_smoothing == 0
    rates = [config.lr_at(epoch) for epoch in (0, 79, 80, 119, 120, 159)]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_a_run_of_one_epoch_starts_at_the_full_rate():
    assert TrainConfig(epochs=1).lr_at(0) == 0.1
    assert TrainConfig(epochs=2, milestones=(0.0, 0.1)).lr_at(0) == pytest.approx(0.01)


def test_imagenet_recipes():
    resnet = TrainConfig.imagenet_resnet50(batch=512, label_smoothing=0.1)
    assert (resnet.epochs, resnet.lr, resnet.nesterov) == (150, 0.1, True)
    assert resnet.weight_decay == 4e-5 and not resnet.decay_bn_bias
    rates = [resnet.lr_at(epoch) for epoch in (44, 45, 90, 135)]
    assert rates == pytest.approx([0.1, 0.01, 0.001, 0.0001])
    assert resnet.label_smoothing == 0.1
    mobile = TrainConfig.imagenet_mobilenet(scratch_b=True)
    assert (mobile.epochs, mobile.lr, mobile.schedule) == (300, 0.05, "cosine")
    assert TrainConfig.imagenet_resnet50(scratch_b=True).epochs == 200


def test_cosine_equals_torch():
    config = TrainConfig(epochs=7, schedule="cosine", lr=0.3)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 7)
    for epoch in range(7):
        assert config.lr_at(epoch) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    ("epochs", "share", "expected"),
    [(160, 0.5, 320), (160, 1 - 0.7, 533), (160, 1.0, 160), (150, 0.3, 500), (160, 0.1, 1600)],
)
def test_scratch_b_epochs(epochs: int, share: float, expected: int):
    assert scratch_b_epochs(epochs, share) == expected
    assert TrainConfig(epochs=epochs, budget_training=share).total_epochs == expected


def test_schedule_is_spread_over_the_epochs_that_run():
    config = TrainConfig(budget_training=0.5, max_epochs=200)
    assert config.total_epochs == 200
    assert config.lr_at(99) == pytest.approx(0.1) and config.lr_at(100) == pytest.approx(0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"epochs": 1.5}, "epochs must be an integer"),
        ({"lr": math.nan}, "lr must be a finite number"),
        ({"lr": -0.1}, "lr must be a finite number"),
        ({"lr": math.inf}, "lr must be a finite number"),
        ({"milestones": (0.5, 80)}, r"milestones must be a finite number in \[0, 1\], got 80"),
        ({"schedule": "step"}, "schedule must be one of multistep, cosine, constant, got 'step'"),
        ({"amp": "fp8"}, "amp must be one of"),
        ({"restore": "first"}, "restore must be one of"),
        ({"ema": 1.5}, "ema must be"),
        ({"eval_every": 0}, "eval_every must be"),
        ({"max_epochs": 0}, "max_epochs must be"),
        ({"budget_training": 0.0}, "share must be in"),
        ({"budget_training": 2.0}, "share must be in"),
        ({"nesterov": True, "momentum": 0}, "nesterov must come with a momentum"),
    ],
)
def test_bad_option_is_refused(options: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**options)


def test_decay_spares_bn_bias_and_depthwise_where_asked():
    net = Net()
    decayed, spared = parameter_groups(net, 0.1, decay_bn_bias=False)
    names = {parameter: name for name, parameter in net.named_parameters()}
    assert {names[p] for p in decayed["params"]} == {"conv.weight", "fc.weight"}
    assert len(spared["params"]) == 6 and spared["weight_decay"] == 0
    (everything,) = parameter_groups(net, 0.1, decay_bn_bias=True)
    assert len(everything["params"]) == 8 and everything["weight_decay"] == 0.1


def test_auto_precision_never_picks_fp16_on_the_cpu():
    assert autocast_dtype("auto", CPU) in (None, torch.bfloat16)
    assert autocast_dtype("off", CPU) is None


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


# Failures


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


def test_diverging_training_is_found_by_the_loss_log():
    """What a device would find late: the log names the first bad step, not the one of the read."""
    from pfs_fast.evaluation import Forward
    from pfs_fast.train import _StepLog

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


# Outputs

Google = namedtuple("Google", ["logits", "aux_logits2", "aux_logits1"])
Inception = namedtuple("Inception", ["logits", "aux_logits"])
LOGITS, FIRST, SECOND = (torch.full((4, 2), float(value)) for value in range(3))


@pytest.mark.parametrize(
    ("outputs", "auxiliary"),
    [
        (LOGITS, []),
        ((LOGITS, FIRST), []),
        ([LOGITS], []),
        ({"aux": FIRST, "out": LOGITS}, []),
        ({"hidden": FIRST, "logits": LOGITS}, []),
        ({"scores": LOGITS}, []),
        (Google(LOGITS, FIRST, SECOND), [FIRST, SECOND]),
        (Google(LOGITS, None, None), []),
        (Inception(LOGITS, FIRST), [FIRST]),
    ],
)
def test_logits_are_found(outputs, auxiliary):
    logits, others = split_outputs(outputs, 4, "train")
    assert logits is LOGITS and [id(x) for x in others] == [id(x) for x in auxiliary]


@pytest.mark.parametrize(
    ("outputs", "got"),
    [
        (torch.zeros(4, 2, 1, 1), r"\[4, 2, 1, 1\]"),
        (torch.zeros(3, 2), r"\[3, 2\]"),
        ((), "NoneType"),
        ({}, "NoneType"),
        ("text", "str"),
        ({"logits": None}, "NoneType"),
    ],
)
def test_outputs_without_logits_are_refused(outputs, got: str):
    with pytest.raises(ModelError, match=f"must return logits of shape .* got {got}"):
        split_outputs(outputs, 4, "train")


@pytest.mark.parametrize(("kind", "weights"), [(Inception, (0.4,)), (Google, (0.3, 0.3))])
def test_auxiliary_losses_join_in_training_only(kind, weights):
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.heads = nn.ModuleList(nn.Linear(32, 2) for _ in range(1 + len(weights)))

        def forward(self, x: Tensor):
            outputs = [head(x.flatten(1)) for head in self.heads]
            return kind(*outputs) if self.training else outputs[0]

    net = Auxiliary()
    data = batches(1)
    with torch.no_grad():
        losses = [F.cross_entropy(output, data[0][1]).item() for output in net(data[0][0])]
    result = fit(net, data, data, epochs=1, lr=0.0, weight_decay=0.0)
    expected = losses[0] + sum(w * loss for w, loss in zip(weights, losses[1:], strict=True))
    assert result.history[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert result.history[0]["val_loss"] == pytest.approx(losses[0], rel=1e-5)


# Evaluation


def test_evaluate_counts_images_and_keeps_the_mode():
    net = Net().train()
    before = state_of(net)
    data = batches(2) + batches(1, size=3)
    accuracy = evaluate(net, data)
    assert net.training and accuracy.n == 19
    assert_same(before, state_of(net))
    net.eval()
    images, labels = (torch.cat(part) for part in zip(*data, strict=True))
    logits = net(images)
    assert accuracy.top1 == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    assert accuracy.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-6)
    assert str(Accuracy(0.5, 1.0, 4)) == "top-1 50.00 %, loss 1.0000 on 4 images"


def test_evaluate_refuses_bad_input():
    with pytest.raises(LoaderError, match="evaluate: loader must yield at least one batch"):
        evaluate(Net(), [])
    with pytest.raises(ConfigError, match="evaluate: amp must be one of"):
        evaluate(Net(), batches(), amp="int8")
    with pytest.raises(LoaderError, match="evaluate: labels must be in"):
        evaluate(Net(), batches(classes=3, size=64))


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
