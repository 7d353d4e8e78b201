"""Recipes of training: defaults, schedules, Scratch-B, weight decay, precision."""

from __future__ import annotations

import math

import pytest
import torch
from small_training import CPU, Net
from torch import nn

from pfs_fast.errors import ConfigError
from pfs_fast.training.recipes import autocast_dtype
from pfs_fast.training.train import TrainConfig, scratch_b_epochs
from pfs_fast.training.weights import parameter_groups


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
