"""The CUDA kernels, run on the host by an emulation of blocks and barriers: no GPU needed."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["test_cuda_kernels", "test_cuda_max_pool"])
def test_cuda_kernels_agree_with_float64_in_emulation(name, tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    program = tmp_path / name
    include = Path(torch.__file__).parent / "include"
    source = ROOT / "tests" / "csrc" / f"{name}.cpp"
    options = ["-std=c++20", "-w", f"-I{include}", str(source), "-o", str(program)]
    subprocess.run([*compiler.split(), *options], check=True)
    run = subprocess.run([str(program)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
