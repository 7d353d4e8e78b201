"""The CUDA kernels, run on the host by an emulation of blocks and barriers: no GPU needed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from pfs_fast import ops

ROOT = Path(__file__).resolve().parents[2]


def compile_emulation(name: str, program: Path, *flags: str) -> Path:
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    include = Path(torch.__file__).parent / "include"
    source = ROOT / "tests" / "csrc" / f"{name}.cpp"
    options = ["-std=c++20", "-w", *flags, f"-I{include}", str(source), "-o", str(program)]
    subprocess.run([*compiler.split(), *options], check=True)
    return program


@pytest.mark.parametrize("name", ["test_cuda_kernels", "test_cuda_max_pool"])
def test_cuda_kernels_agree_with_float64_in_emulation(name, tmp_path):
    program = compile_emulation(name, tmp_path / name)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def gate_step(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    program = compile_emulation(
        "cuda_gate_step", folder / "cuda_gate_step.so", "-O1", "-shared", "-fPIC"
    )
    return ctypes.CDLL(str(program))


OPTIONS = {"lr": 0.05, "betas": (0.9, 0.999), "eps": 1e-8, "gamma": 0.5, "target": 0.3}


def make_state(size: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """gates, exp_avg, exp_avg_sq, step and died_at in the middle of a search: some gates dead, some at 1, one NaN."""
    gates = (torch.rand(size, dtype=dtype) * 1.4 - 0.2).clamp_(0, 1)
    died_at = torch.where(gates == 0, 7, -1).to(torch.int32)
    gates[5:6] = torch.nan
    moments = torch.randn(size, dtype=dtype) * 0.01, torch.rand(size, dtype=dtype) * 1e-3
    return [gates, *moments, torch.full((1,), 11, dtype=torch.int64), died_at]


@pytest.mark.parametrize("reversed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
# One block, its edges, more values than one pass of the first kernel's blocks takes.
@pytest.mark.parametrize("size", [0, 1, 255, 257, 1000, 256 * 256 + 300])
def test_gate_step_of_cuda_agrees_with_the_cpu_operator_in_emulation(
    gate_step, size, dtype, reversed
):
    expected = make_state(size, dtype)
    if size != 1000:
        expected[0].nan_to_num_(0.5)  # else all sums are NaN
    found = [t.clone() for t in expected]
    num_gates = size + 9  # some have left
    function = getattr(gate_step, f"gate_step_{'float' if dtype == torch.float32 else 'double'}")
    values = [OPTIONS["lr"], *OPTIONS["betas"], OPTIONS["eps"], OPTIONS["gamma"], OPTIONS["target"]]
    for _ in range(3):
        grad = torch.randn(size, dtype=dtype) * 0.1
        gates, *state = expected
        ops.gate_step_(gates, grad, *state, num_gates=num_gates, **OPTIONS)
        gates, exp_avg, exp_avg_sq, step, died_at = found
        arrays = [t.data_ptr() for t in (gates, grad, exp_avg, exp_avg_sq, step, died_at)]
        function(
            (ctypes.c_void_p * 6)(*arrays),
            ctypes.c_int64(size),
            (ctypes.c_double * 6)(*values),
            ctypes.c_int64(num_gates),
            ctypes.c_bool(reversed),
        )
        # Another order of the sum of all gates, which is then scaled by 1 / num_gates.
        tol = 1e-6 if dtype == torch.float32 else 1e-14
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=tol, atol=tol, equal_nan=True)
    assert found[3].item() == 14
    if size > 1000:  # gates that died now, and others that were dead before
        assert (found[4] > 11).any() and (found[4] == 7).any()
