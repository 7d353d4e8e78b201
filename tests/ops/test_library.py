"""backends() tells what is there and why what is missing is missing."""

from __future__ import annotations

import torch

from pfs_fast import _library


def test_backends_read_as_mapping_and_print_as_table():
    told = _library.backends()
    assert told["cpu"] is True and dict(told)["torch"] == torch.__version__
    assert told.cpu_isa in ("avx512", "avx2", "baseline")
    assert f"cpu ops    yes ({told.cpu_isa})" in str(told)


def test_missing_cuda_has_a_reason():
    told = _library.backends()
    assert told.cuda != bool(told.cuda_reason)
    assert told.cuda == (told.cuda_compiled and torch.cuda.is_available())
    assert bool(told.cuda_archs) == told.cuda_compiled


def test_loaded_library_is_required_silently():
    assert _library.is_loaded()
    assert _library.require_ops() is None
