"""Fixtures shared by all tests."""

from __future__ import annotations

import os
import sys
from pathlib import Path

# Scikit-learn, NumPy and PyTorch each bring a thread pool; tiny tensors only lose time in them.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch

# For the package `benchmarks`. Last, so that an installed pfs_fast is found before the one beside it.
sys.path.append(str(Path(__file__).resolve().parents[1]))


@pytest.fixture(autouse=True)
def fixed_seed():
    """Each test starts from the same random state and leaves the global one as it found it."""
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    yield
    torch.random.set_rng_state(state)


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
