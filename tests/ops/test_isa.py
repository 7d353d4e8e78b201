"""Each instruction set gives the same results, and its object file keeps to itself."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pfs_fast import _library

if not _library.is_loaded():
    pytest.skip("needs the compiled operators", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
RANK = {"baseline": 0, "avx2": 1, "avx512": 2}
SCRIPT = """
import sys
import torch
sys.path.insert(0, sys.argv[1])
from cases import ACTS, CASES, Case, make, run
from pfs_fast import _library, ops

assert _library.backends().cpu_isa == sys.argv[2], _library.backends()
results = []
for case in CASES[::2]:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for residual in (False, True):
            torch.manual_seed(1)
            results.append(run(ops.bn_gate_act, make(case, dtype, "cpu", residual), act="relu"))
for act in ACTS:
    for layout in ("contiguous", "channels_last"):
        torch.manual_seed(2)
        problem = make(Case((3, 21, 5, 7), layout), torch.float32, "cpu", True)
        results.append(run(ops.bn_gate_act, problem, act=act))
for c_in, c_out, size in ((3, 5, 7), (17, 20, 9), (40, 33, 4), (300, 352, 3)):
    for tile in (2, 4):
        torch.manual_seed(3)
        x, weight = torch.randn(3, c_in, size, size), torch.randn(c_out, c_in, 3, 3)
        y = ops.winograd_conv(x, weight, torch.randn(c_out), tile=tile)
        grad = torch.ops.pfs_fast._winograd_conv_backward(torch.randn_like(y), weight, [1, 1], tile)
        results.append({"y": y, "grad_x": grad})
for c_in, c_out, kernel, stride in ((3, 20, 3, 1), (17, 9, 3, 2), (40, 33, 1, 2), (5, 70, 2, 3)):
    torch.manual_seed(5)
    x = torch.randn(3, c_in, 9, 10).contiguous(memory_format=torch.channels_last)
    weight, options = torch.randn(c_out, c_in, kernel, kernel), ([stride] * 2, [0, 0], [1, 1], 1)
    y = torch.ops.pfs_fast.frozen_conv(x, weight, None, *options)
    grad = torch.ops.pfs_fast._frozen_conv_backward(torch.randn_like(y), weight, x.shape, *options)
    results.append({"y": y, "grad_x": grad})
for channels in (3, 17, 80):
    torch.manual_seed(6)
    x, weight = torch.randn(3, 20, 9, 10, requires_grad=True), torch.randn(channels, 20, 3, 3)
    y = ops.conv_bn_gate_act(x, weight, residual=torch.randn(3, channels, 9, 10), act="silu")
    (grad,) = torch.autograd.grad(y, x, torch.randn_like(y))
    results.append({"y": y.detach(), "grad_x": grad})
for channels in (3, 17, 80):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        torch.manual_seed(4)
        x = torch.randn(2, channels, 9, 8).to(dtype).contiguous(memory_format=torch.channels_last)
        y, offsets = torch.ops.pfs_fast.max_pool(x, [3, 2], [2, 1], [1, 0])
        options = (x.shape, [3, 2], [2, 1], [1, 0])
        grad = torch.ops.pfs_fast._max_pool_backward(torch.randn(y.shape).to(dtype), offsets, *options)
        results.append({"y": y, "grad_x": grad, "offsets": offsets.double()})
torch.save(results, sys.argv[3])
"""


def run_with(isa: str, script: str, *arguments: str) -> subprocess.CompletedProcess:
    # The package under test, which need not be that of the source tree.
    package = str(Path(_library.__file__).parents[1])
    env = {**os.environ, "PFS_FAST_CPU_ISA": isa, "OMP_NUM_THREADS": "1", "PYTHONPATH": package}
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def skip_unless_it_runs_here(isa: str) -> None:
    if isa != "baseline" and platform.machine().lower() not in ("x86_64", "amd64"):
        pytest.skip(f"{isa} exists on x86-64 only")
    here = torch.backends.cpu.get_cpu_capability().lower()
    if RANK.get(here.split("_")[0], 0) < RANK[isa]:
        pytest.skip(f"the processor has no {isa} ({here})")


@pytest.fixture(scope="module")
def baseline(tmp_path_factory):
    path = tmp_path_factory.mktemp("isa") / "baseline.pt"
    done = run_with("baseline", SCRIPT, str(Path(__file__).parent), "baseline", str(path))
    assert done.returncode == 0, done.stderr
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_forced_instruction_set_agrees_with_baseline(isa, baseline, tmp_path):
    skip_unless_it_runs_here(isa)
    path = tmp_path / "results.pt"
    done = run_with(isa, SCRIPT, str(Path(__file__).parent), isa, str(path))
    assert done.returncode == 0, done.stderr
    for one, other in zip(torch.load(path, weights_only=True), baseline, strict=True):
        for name, value in one.items():
            # Another order of summation, and one more rounding of the result in bfloat16.
            tol = {torch.float64: 1e-11, torch.float32: 2e-4, torch.bfloat16: 2**-7}[value.dtype]
            scale = max(1.0, other[name].double().abs().max().item())
            torch.testing.assert_close(value, other[name], rtol=tol, atol=tol * scale)


@pytest.mark.parametrize(
    ("isa", "message"),
    [("sse9", "must be one of baseline, avx2, avx512"), ("avx512", "this processor has")],
)
def test_instruction_set_that_cannot_run_is_refused(isa, message):
    if isa == "avx512" and torch.backends.cpu.get_cpu_capability().lower().startswith("avx512"):
        pytest.skip("the processor has avx512")
    done = run_with(
        isa,
        "import torch; from pfs_fast import _library, ops; print(_library.backends());"
        "ops.bn_gate_act(torch.ones(2, 3))",
    )
    assert done.returncode != 0 and message in done.stderr
    assert f"PFS_FAST_CPU_ISA={isa}" in done.stdout


def object_files() -> dict[str, Path]:
    found = {}
    for path in sorted(ROOT.glob("build/temp*/**/csrc/**/*.o")):
        if sys.implementation.cache_tag.replace("-", "") in str(path).replace("-", ""):
            found[path.stem] = path
    return found


def symbols(path: Path) -> tuple[set[str], set[str]]:
    """Symbols an object file defines: (weak, all external)."""
    listing = subprocess.run(
        ["nm", "--defined-only", "--extern-only", str(path)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    rows = [line.split() for line in listing.splitlines()]
    weak = {row[-1] for row in rows if row[-2] in "WVu"}
    return weak, {row[-1] for row in rows}


@pytest.mark.parametrize(
    "kernel", ["bn_gate_act_kernel", "gemm_kernel", "winograd_kernel", "max_pool_kernel"]
)
@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_object_file_shares_no_symbol_with_other_files(isa, kernel):
    """Of two equal inline functions the linker keeps one: if that is the AVX512 one, others crash."""
    if shutil.which("nm") is None:
        pytest.skip("needs nm of binutils")
    objects = object_files()
    own = objects.pop(f"{kernel}_{isa}", None)
    if own is None:
        pytest.skip("needs the object files of an in-place build (build/temp*)")
    weak, external = symbols(own)
    for name, path in objects.items():
        shared = (weak & symbols(path)[1]) | (external & symbols(path)[0])
        assert not shared, f"{own.name} and {name}.o both define {sorted(shared)[:5]}"
