"""bf16 convolutions that are wrong on the CPU: found in all that computes with them, and run in float32."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from small_training import Net, batches, fit
from torch import nn

import pfs_fast as pfs
from pfs_fast import _library
from pfs_fast.training import bf16_convs
from pfs_fast.training.bf16_convs import SoundConvs

LAST = torch.channels_last
BACKENDS = [
    "reference",
    pytest.param(
        "fused",
        marks=pytest.mark.skipif(not _library.is_loaded(), reason="needs the compiled operators"),
    ),
]


@pytest.fixture(autouse=True)
def no_form_is_known(monkeypatch):
    monkeypatch.setattr(bf16_convs, "_wrong", {})


def planted(monkeypatch, wrong, spoil=lambda y: y * torch.nan) -> list:
    """Makes all bf16 calls that ``wrong`` says wrong, as a faulty library would; returns what was called in bf16."""
    calls = []

    def call(func, args, kwargs):
        result = func(*args, **kwargs)
        x = args[0] if args else None
        if bf16_convs._is_conv(func) and bf16_convs._is_bf16(args, kwargs):
            calls.append(func)
            return spoil(result) if wrong(x, args[1]) else result
        return result

    monkeypatch.setattr(bf16_convs, "_call", call)
    return calls


def always_float32(monkeypatch, wrong) -> None:
    monkeypatch.setattr(bf16_convs, "_differs", lambda func, args, kwargs: wrong(*args[:2]))


def is_conv_layer(x, weight):
    return weight.shape[1:] == (2, 3, 3)  # `conv` of the training network, whatever its width


def one_warning(record) -> str:
    texts = [str(w.message) for w in record if issubclass(w.category, RuntimeWarning)]
    assert len(texts) == 1, texts
    return texts[0]


# -- what processors are known to compute wrongly -------------------------------------------------------------------

KNOWN = [  # images, in, out, size, kernel, stride, padding, dilation, groups
    (2, 16, 16, (16, 5), (3, 3), (3, 3), (1, 0), (1, 1), 1),
    (8, 8, 16, (3, 3), (5, 5), (4, 4), (2, 2), (1, 1), 1),
    (2, 32, 24, (1, 1), (3, 3), (2, 2), (1, 1), (1, 1), 1),
    (2, 8, 8, (31, 2), (2, 3), (1, 4), (1, 2), (2, 1), 1),
    (8, 8, 8, (31, 31), (2, 2), (1, 1), (0, 0), (2, 2), 8),
    (4, 8, 8, (9, 9), (3, 3), (1, 1), (1, 1), (1, 1), 1),
]


@pytest.mark.parametrize("form", KNOWN, ids=str)
@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
@pytest.mark.filterwarnings("ignore:train. bf16 convolutions must give:RuntimeWarning")
def test_every_form_has_the_output_and_gradients_of_float32(form, layout):
    images, inputs, outputs, size, kernel, *options, groups = form
    values = torch.randn(images, inputs, *size).bfloat16().float().contiguous(memory_format=layout)
    weights = torch.randn(outputs, inputs // groups, *kernel).bfloat16().float()
    sound, results, direction = SoundConvs(nn.Module(), True), [], None
    for lowered in (False, True):
        x = values.clone().requires_grad_()
        weight = weights.contiguous(memory_format=layout).requires_grad_()
        bf16_convs._fill_free_memory()
        with torch.autocast("cpu", torch.bfloat16, enabled=lowered), sound("train"):
            y = F.conv2d(x, weight, None, *options, groups)
        direction = torch.randn_like(y).bfloat16().float() if direction is None else direction
        bf16_convs._fill_free_memory()
        y.backward(direction.to(y.dtype))
        results.append((y.detach().float(), x.grad, weight.grad))
    for exact, got in zip(*results, strict=True):
        assert float((got - exact).abs().max() / exact.abs().max()) < 0.02


# -- a planted fault ------------------------------------------------------------------------------------------------


def test_training_runs_a_wrong_layer_in_float32_and_names_it_once(monkeypatch):
    states = []
    for plant in (always_float32, planted):
        bf16_convs._wrong.clear()
        with monkeypatch.context() as patch, pytest.warns(RuntimeWarning) as record:
            plant(patch, is_conv_layer)
            torch.manual_seed(3)
            states.append(fit(Net(), val_loader=batches(), amp="bf16", seed=0).last_state)
        text = one_warning(record)
        rule = "train: bf16 convolutions must give what float32 gives, which layer 'conv' does not"
        assert text.startswith(rule) and "weight [4, 2, 3, 3]" in text and "slower" in text
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


class _SpoiltGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y):
        return y.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * 3


def test_wrong_gradient_alone_is_found_and_only_where_it_is_taken(monkeypatch):
    planted(monkeypatch, is_conv_layer, _SpoiltGradient.apply)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pfs.evaluate(Net(), batches(), amp="bf16")
    with pytest.warns(RuntimeWarning, match="train: .* layer 'conv'"):
        fit(Net(), amp="bf16")


def test_evaluation_runs_a_wrong_layer_in_float32(monkeypatch):
    model = Net()
    exact = pfs.evaluate(model, batches())
    planted(monkeypatch, is_conv_layer)
    with pytest.warns(RuntimeWarning, match="evaluate: .* layer 'conv'"):
        got = pfs.evaluate(model, batches(), amp="bf16")
    assert got.loss == pytest.approx(exact.loss, rel=0.02)


def test_model_in_bf16_is_checked_without_autocast(monkeypatch):
    planted(monkeypatch, is_conv_layer)
    with pytest.warns(RuntimeWarning, match="evaluate: .* layer 'conv'"):
        assert pfs.evaluate(Net().bfloat16(), batches()).loss < 10


def test_right_forms_run_in_bf16_and_are_tried_once(monkeypatch):
    tried = []
    differs = bf16_convs._differs
    monkeypatch.setattr(bf16_convs, "_differs", lambda *call: tried.append(call) or differs(*call))
    model, (images, _) = Net(), batches()[0]
    sound = SoundConvs(model, True)
    with torch.autocast("cpu", torch.bfloat16):
        plain = model(images)
        with sound("train"):
            first = model(images)
            second = model(images)
    assert torch.equal(plain, first) and torch.equal(plain, second)
    assert len(tried) == 2 == len(bf16_convs._wrong)


def test_float32_is_not_checked(monkeypatch):
    monkeypatch.setattr(bf16_convs, "_differs", lambda *_: pytest.fail("checked"))
    fit(Net(), amp="off")
    pfs.evaluate(Net(), batches())


def test_trial_leaves_the_random_state_alone():
    sound = SoundConvs(nn.Module(), True)
    x, weight = torch.randn(2, 8, 6, 6).bfloat16(), torch.randn(8, 8, 3, 3).bfloat16()
    state = torch.get_rng_state()
    with sound("train"):
        F.conv2d(x, weight)
    assert bf16_convs._wrong and torch.equal(state, torch.get_rng_state())


def test_images_without_a_batch_keep_their_channels():
    sound = SoundConvs(nn.Module(), True)
    with sound("train"):
        y = F.conv2d(torch.ones(8, 6, 6).bfloat16(), torch.ones(4, 8, 3, 3).bfloat16())
    assert y.shape == (4, 4, 4) and float(y.max()) == 72
    assert [form[3][0][0] for form in bf16_convs._wrong] == [(8, 6, 6)]


def test_compiled_network_is_trained():
    assert fit(torch.compile(Net(), backend="eager"), amp="bf16", epochs=1).epochs == 1


# -- searches -------------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two gated layers, the second of which is planted as wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.an = nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b, self.bn = nn.Conv2d(6, 8, 2, stride=2, bias=False), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.bn(self.b(torch.relu(self.an(self.a(x))))))
        return self.fc(x.mean((2, 3)))


def is_layer_b(x, weight):
    return tuple(weight.shape[2:]) == (2, 2)


def search(backend: str, **options) -> pfs.SearchResult:
    torch.manual_seed(0)
    config = pfs.SearchConfig(epochs=3, backend=backend, precision="bf16", lr=0.1, **options)
    return pfs.search(Two(), batches(), 0.6, config=config, progress=False)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("graph", [True, False])
def test_search_runs_a_wrong_layer_in_float32_and_names_it_once(monkeypatch, backend, graph):
    results = []
    for plant in (always_float32, planted):
        bf16_convs._wrong.clear()
        with monkeypatch.context() as patch, pytest.warns(RuntimeWarning) as record:
            plant(patch, is_layer_b)
            results.append(search(backend, cpu_graph=graph))
        text = one_warning(record)
        assert text.startswith(
            "search: bf16 convolutions must give what float32 gives, which layer 'b'"
        )
    assert torch.equal(results[0].flat_gates, results[1].flat_gates)


@pytest.mark.parametrize("backend", BACKENDS)
def test_search_in_other_precisions_checks_nothing(monkeypatch, backend):
    monkeypatch.setattr(bf16_convs, "_differs", lambda *_: pytest.fail("checked"))
    config = pfs.SearchConfig(epochs=1, backend=backend, precision="fp32")
    pfs.search(Two(), batches(), 0.6, config=config, progress=False)


@pytest.mark.skipif(not _library.is_loaded(), reason="needs the compiled operators")
def test_gradients_written_in_python_are_checked_too():
    model = pfs.models.resnet20(
        expansion=0.25
    )  # its shortcuts read pixels that the layer beside them passes on
    loader = [(torch.randn(4, 3, 16, 16), torch.arange(4))]
    config = pfs.SearchConfig(max_steps=2, backend="fused", precision="bf16", cpu_graph=False)
    pfs.search(model, loader, 0.6, config=config, progress=False)
    names = {str(form[0]) for form in bf16_convs._wrong}
    assert {"pfs_fast.frozen_conv", "pfs_fast._frozen_conv_backward"} <= names


def test_every_width_is_a_form_of_its_own():
    sound, x = SoundConvs(nn.Module(), True), torch.ones(4, 2, 5, 5).bfloat16()
    with sound("search"):
        for width in (8, 6, 8):
            F.conv2d(x, torch.ones(width, 2, 3, 3).bfloat16())
    assert len(bf16_convs._wrong) == 2
