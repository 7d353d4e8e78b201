"""A folder with a small network, small images and, where asked for, a finished search."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from commands import search

TINY_NETWORK = '''
"""A small network in the user's folder."""
from torch import nn

def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

def make(num_classes=3, width=8):
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*block(3, width), *block(width, 2 * width), *pool, nn.Linear(2 * width, num_classes))

def make_three():
    return make(3)

not_a_factory = 3
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a small network and small images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PFS_FAST_CIFAR10", raising=False)
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)
    (tmp_path / "tiny_network.py").write_text(TINY_NETWORK)
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    images = rng.integers(0, 60, (48, 8, 8, 3), dtype=np.uint8)
    images[np.arange(48), :, :, labels] += 150
    np.savez(
        tmp_path / "images.npz",
        x_train=images,
        y_train=labels,
        x_test=images[:15],
        y_test=labels[:15],
    )
    np.savez(tmp_path / "no_test.npz", images=images, labels=labels)
    np.savez(tmp_path / "wrong.npz", pictures=images)
    return tmp_path


@pytest.fixture
def searched(folder):
    """A finished search in runs/tiny."""
    assert search() == 0
    return folder / "runs" / "tiny"
