"""Every operator test runs on each device, and needs the compiled library."""

from __future__ import annotations

import os

import pytest
import torch

from pfs_fast import _library
from pfs_fast._cuda_settings import cuda_settings

if not _library.is_loaded() and os.environ.get("PFS_FAST_REQUIRE_EXT") == "1":
    _library.require_ops()


def pytest_collection_modifyitems(items):
    if _library.is_loaded():
        return
    reason = f"needs the compiled operators: {_library.backends().cpu_reason}"
    for item in items:
        if "tests/ops" in item.path.as_posix() and "reference" not in item.name:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def exact_float32():
    """Tolerances are of float32; by PyTorch's default a GPU's convolutions multiply numbers of ten bits."""
    with cuda_settings(torch.device("cuda"), repeatable=True):
        yield


@pytest.fixture(params=["cpu", "cuda"])
def device(request):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        if not _library.backends().cuda_compiled:
            pytest.skip(f"needs the CUDA operators: {_library.backends().cuda_reason}")
    return request.param
