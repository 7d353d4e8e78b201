"""Memory layouts: networks that run in NCHW alone, and what a failed run leaves of the model."""

from __future__ import annotations

import copy
import math
import warnings

import pytest
import torch
from small_training import Net, assert_same, batches, fit, state_of
from torch import Tensor, nn

import pfs_fast as pfs
from pfs_fast.errors import LoaderError, ModelError, NonFiniteLossError
from pfs_fast.training.train import evaluate, train

NCHW_WARNING = "model must run in channels_last, got RuntimeError: view size is not compatible"


class LeNet(nn.Module):
    """Flattens with ``view``, as LeNet is mostly written; draws random numbers before it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout2d(0.2)
        self.fc = nn.Linear(4 * 4 * 4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.dropout(torch.relu(self.bn(self.conv(x))))
        return self.fc(x.view(x.size(0), -1))


def channels_last(loader):
    return [(x.to(memory_format=torch.channels_last), labels) for x, labels in loader]


def strides(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tensor.stride() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("options", [{}, {"ema": 0.5}, {"amp": "bf16"}])
def test_network_that_flattens_with_view_is_trained_in_nchw(options):
    net = LeNet()
    twin, before, data = copy.deepcopy(net), strides(net), batches()
    with pytest.warns(UserWarning, match=f"^train: {NCHW_WARNING}.*reshape in place of view"):
        result = fit(net, data, batches(1), **options)
    # The same run as one that asks for NCHW: statistics and random numbers of the failed forward are not kept.
    expected = fit(twin, data, batches(1), channels_last=False, **options)
    assert_same(state_of(net), state_of(twin))
    assert [row["loss"] for row in result.history] == [row["loss"] for row in expected.history]
    assert strides(net) == before
    net(data[0][0])


def test_images_in_channels_last_are_laid_out_for_a_network_with_view():
    data = channels_last(batches())
    net = LeNet()
    with pytest.warns(UserWarning, match=f"^train: {NCHW_WARNING}"):
        fit(net, data, data, channels_last=False)
    before = strides(net)
    with pytest.warns(UserWarning, match=f"^evaluate: {NCHW_WARNING}"):
        found = evaluate(net, data)
    assert found == evaluate(net, batches())
    assert strides(net) == before


def test_choice_of_the_layout_is_told_once():
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit(LeNet(), epochs=3, val_loader=channels_last(batches(2)))
    assert [str(w.message).startswith(f"train: {NCHW_WARNING}") for w in told] == [True]


def test_network_that_runs_in_channels_last_is_called_once_a_batch():
    net, calls = Net(), []
    net.conv.register_forward_hook(lambda *_: calls.append(1))
    fit(net, batches(3), epochs=2)
    assert len(calls) == 6


def test_hooks_and_mode_stay_after_the_choice():
    net, calls = LeNet(), []
    handle = net.fc.register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match=NCHW_WARNING):
        fit(net, batches(3), epochs=2)
    assert len(calls) == 6 and net.training and list(net.fc._forward_hooks) == [handle.id]


def test_slim_lenet_of_a_search_is_trained_and_evaluated():
    """From search to evaluation with the loaders of this package, whose images are in channels_last."""

    class Digits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.features = nn.Sequential(
                nn.Conv2d(3, 6, 3, padding=1),
                nn.ReLU(),
                nn.MaxPool2d(2),
                nn.Conv2d(6, 8, 3),
                nn.ReLU(),
            )
            self.classifier = nn.Sequential(nn.Linear(8 * 4, 16), nn.ReLU(), nn.Linear(16, 10))

        def forward(self, x: Tensor) -> Tensor:
            x = self.features(x)
            return self.classifier(x.view(x.size(0), -1))

    whole = pfs.data.digits(size=8)
    images = pfs.data.ImageSet(whole.train.images[:64], whole.train.labels[:64])
    splits = pfs.data.Splits(images, images, images, 10, whole.mean, whole.std, "few")
    train_loader, val_loader, _ = splits.loaders(batch_size=16)
    config = pfs.SearchConfig(epochs=1, backend="reference", precision="fp32")
    slim = pfs.search(
        Digits(), train_loader, 0.5, config=config, device="cpu", progress=False
    ).slim()
    with pytest.warns(UserWarning, match=f"^train: {NCHW_WARNING}"):
        fit(slim, train_loader, val_loader)
    slim(next(iter(splits.loaders(channels_last=False).train))[0])
    with pytest.warns(UserWarning, match=f"^evaluate: {NCHW_WARNING}"):
        assert evaluate(slim, val_loader).n == 64


class ViewInEval(LeNet):
    """Cannot be found out by the first step."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn(self.conv(x)))
        return self.fc(x.flatten(1) if self.training else x.view(x.size(0), -1))


def test_view_of_the_eval_mode_alone_is_an_error_whose_repair_works():
    net = ViewInEval()
    before, data = state_of(net), batches()
    with pytest.raises(LoaderError, match=r"train: .* view .*; .* channels_last=False"):
        fit(net, data, data)
    assert_same(before, state_of(net))
    fit(net, data, data, channels_last=False)
    assert not torch.equal(before["fc.weight"], net.fc.weight)


def test_repair_of_a_network_with_view_in_channels_last_works():
    net = LeNet().to(memory_format=torch.channels_last)
    with pytest.raises(LoaderError, match=r"evaluate: .*memory_format=torch\.contiguous_format"):
        evaluate(net, batches())
    evaluate(net.to(memory_format=torch.contiguous_format), batches())


# After a failure


class Stopped(list):
    """Raises in a pass, counted from 1, before a batch, counted from 0."""

    def __init__(self, error: BaseException, in_pass: int, batch: int) -> None:
        super().__init__(batches())
        self.error, self.in_pass, self.batch, self.passes = error, in_pass, batch, 0

    def __iter__(self):
        self.passes += 1
        for index, pair in enumerate(list.__iter__(self)):
            if self.passes == self.in_pass and index == self.batch:
                raise self.error
            yield pair


IMAGES, LABELS = batches(1)[0]
FAILURES = {
    "error of the loader": (lambda: Stopped(OSError("disk"), 1, 0), OSError),
    "error of the loader later": (lambda: Stopped(OSError("disk"), 2, 1), OSError),
    "interrupt": (lambda: Stopped(KeyboardInterrupt(), 2, 2), KeyboardInterrupt),
    "NaN": (lambda: [*batches(), (IMAGES * math.nan, LABELS)], NonFiniteLossError),
    "bad first batch": (lambda: [(IMAGES[:, :1], LABELS)], LoaderError),
    "bad label": (lambda: [*batches(), (IMAGES, LABELS + 7)], LoaderError),
    "no batch": (list, LoaderError),
}


@pytest.mark.parametrize("make", [Net, LeNet])
@pytest.mark.parametrize("given", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("case", FAILURES)
@pytest.mark.filterwarnings("ignore:train. model must run in channels_last")
def test_model_runs_as_before_after_a_failure(make, given, case):
    make_loader, error = FAILURES[case]
    loader = make_loader()
    net = make().to(memory_format=given).eval()
    net.bn.train()
    net.fc.bias.requires_grad_(False)
    net.conv.register_forward_hook(lambda *_: None)
    before = copy.deepcopy(net)
    with pytest.raises(error):
        fit(net, loader)
    assert strides(net) == strides(before)
    assert [m.training for m in net.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in net.parameters()] == [
        p.requires_grad for p in before.parameters()
    ]
    assert len(net.conv._forward_hooks) == 1
    if getattr(loader, "in_pass", 1) == 1:
        assert_same(state_of(net), state_of(before))
        assert not hasattr(net, "pfs_input_shape")
    if make is Net or given is torch.contiguous_format:
        net(IMAGES)


def test_strides_that_no_layout_has_come_back():
    net = Net()
    net.conv.weight.data = torch.randn(3, 3, 2, 4).permute(3, 2, 0, 1)
    before = strides(net)
    with pytest.raises(LoaderError):
        fit(net, [])
    assert strides(net) == before


@pytest.mark.parametrize("run", [train, evaluate])
def test_device_without_values_is_refused_before_the_model_moves(run):
    net = Net()
    before = state_of(net)
    with pytest.raises(ModelError, match="device must hold values, got meta; choose"):
        run(net, [(IMAGES, LABELS)], device="meta")
    assert_same(before, state_of(net))
    with pytest.raises(ModelError, match=r"model must hold values, got .* meta .* torch\.device"):
        run(net.to("meta"), [(IMAGES, LABELS)], device="cpu")


def test_parts_on_meta_are_told_to_be_built_with_values():
    net = Net()
    net.fc.to("meta")
    with pytest.raises(
        ModelError, match=r"got cpu, meta; build all of it outside of torch\.device"
    ):
        fit(net)
