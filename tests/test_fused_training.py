"""Training by the operators of a search: the same function and the same gradients as the plain modules."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import pfs_fast as pfs
from benchmarks.experiments.fused_training import fused
from pfs_fast._library import is_loaded
from pfs_fast.training.onednn import unsafe_weight_gradients

pytestmark = pytest.mark.skipif(not is_loaded(), reason="needs the compiled operators")


@pytest.mark.parametrize(
    ("name", "expansion"), [("resnet20", 0.25), ("resnet20", 0.6), ("vgg16", 0.15)]
)
def test_fused_network_has_the_gradients_of_its_modules(name: str, expansion: float):
    torch.manual_seed(0)
    plain = pfs.models.get(name, num_classes=10, expansion=expansion).double()
    twin = fused(copy.deepcopy(plain))
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8)
    losses = [F.cross_entropy(model(images), labels) for model in (plain, twin)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)
    gradients = dict(twin.named_parameters())
    for key, value in plain.named_parameters():
        torch.testing.assert_close(gradients[key].grad, value.grad, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(dict(twin.named_buffers()), dict(plain.named_buffers()))


def test_fused_network_in_float32_convolves_by_tiles():
    torch.manual_seed(0)
    plain = pfs.models.get("resnet20", num_classes=10, expansion=1.0)
    twin = fused(copy.deepcopy(plain)).to(memory_format=torch.channels_last)
    images = torch.randn(4, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        outputs = twin(images)
    calls = {event.key: event.count for event in profile.key_averages()}
    assert calls["pfs_fast::winograd_conv"] == 16
    torch.testing.assert_close(outputs, plain(images), rtol=1e-3, atol=1e-3)


def test_fused_network_trains_in_channels_last():
    network = pfs.models.get("resnet20", num_classes=10, expansion=0.25)
    assert unsafe_weight_gradients(network)  # `train` would lay the plain one out as NCHW
    assert unsafe_weight_gradients(fused(network)) == []


def test_fused_network_refuses_other_activations():
    with pytest.raises(ValueError, match=r"fused: model must have ReLUs.*got 'stem'"):
        fused(pfs.models.get("mobilenet_v2", num_classes=10, expansion=0.25))
