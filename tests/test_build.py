"""The build system: one source list, one version, PyTorch never fetched twice, clear refusals."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "setup.py").is_file():
    pytest.skip("needs the source tree", allow_module_level=True)


def load(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build():
    yield load(ROOT / "setup.py", "pfs_setup")
    del sys.modules["pfs_setup"]


@pytest.fixture(scope="module")
def backend():
    yield load(ROOT / "build_backend" / "pfs_build.py", "pfs_build")
    del sys.modules["pfs_build"]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in ("PFS_FAST_CUDA", "PFS_FAST_REQUIRE_EXT", "TORCH_CUDA_ARCH_LIST", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)


def test_source_list_names_every_translation_unit(build):
    listed = {source.path for source in build.read_sources()}
    files = {
        path.relative_to(ROOT).as_posix()
        for suffix in ("*.cpp", "*.cu")
        for path in (ROOT / "csrc").rglob(suffix)
    }
    assert listed == files


def test_only_instruction_set_files_carry_machine_flags(build):
    """Code that runs on every processor must not be compiled for one."""
    for source in build.read_sources():
        machine_flags = [flag for flag in source.flags if flag.startswith("-m")]
        assert "-march=native" not in source.flags
        assert bool(machine_flags) == (source.kind == "x86"), source.path
    assert not [flag for flag in build.CXX_FLAGS if flag.startswith("-m")]


def test_instruction_set_files_include_no_tensor_headers(build):
    """An inline function of ATen compiled for AVX512 could be linked into code for all."""
    starts = [
        ROOT / source.path
        for source in build.read_sources()
        if re.search(r"_kernel_(baseline|avx2|avx512)\.cpp$", source.path)
    ]
    assert {ROOT / source.path for source in build.read_sources() if source.kind == "x86"} < set(
        starts
    )
    seen, waiting = set(), list(starts)
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        for name in re.findall(r'#include\s+[<"]([^>"]+)[>"]', path.read_text()):
            assert not name.startswith(("ATen/", "c10/", "torch/")), f"{path.name} includes {name}"
            near, far = path.parent / name, ROOT / "csrc" / name
            waiting += [found for found in (near, far) if found.is_file()][:1]
    assert len(seen) > len(starts)


def test_source_list_defines_only_what_the_sources_read(build):
    text = "".join(
        path.read_text() for path in (ROOT / "csrc").rglob("*.*") if path.suffix != ".txt"
    )
    for source in build.read_sources():
        for flag in source.flags:
            name = flag.removeprefix("-D").partition("=")[0]
            assert not flag.startswith("-D") or name in text, f"{source.path}: {flag}"


def test_checks_of_arguments_lie_in_one_file():
    """An error text in two places says two things after a while."""
    checks = re.compile(r"TORCH_CHECK_\w+\([^;]*?,\s*op,\s*\": ")
    for path in sorted((ROOT / "csrc").rglob("*.*")):
        found = checks.findall(path.read_text())
        assert not found or path.name == "checks.h", (path.name, found)
    assert checks.search((ROOT / "csrc/checks.h").read_text())


def test_version_is_written_once():
    version = (ROOT / "version.txt").read_text().strip()
    assert re.fullmatch(r"\d+\.\d+\.\d+([.-]?\w+)?", version)
    for name in ("pyproject.toml", "setup.py", "CMakeLists.txt"):
        assert f'"{version}"' not in (ROOT / name).read_text(), name


def test_changelog_names_the_versions_of_files():
    from pfs_fast.budgets import structure
    from pfs_fast.searching import result

    text = (ROOT / "CHANGELOG.md").read_text()
    versions = re.search(r"Structure files are version (\d+) and search files version (\d+)", text)
    assert versions.groups() == (str(structure.VERSION), str(result.VERSION))


def test_cuda_can_be_switched_off(build, monkeypatch):
    monkeypatch.setattr(build, "missing_compiler", lambda: "")
    monkeypatch.setenv("PFS_FAST_CUDA", "0")
    plan = build.make_plan()
    assert plan.cpp and not plan.cuda and "PFS_FAST_CUDA=0" in plan.cuda_reason


def test_cuda_is_left_out_with_a_reason(build, monkeypatch):
    monkeypatch.setattr(build, "missing_compiler", lambda: "")
    monkeypatch.setattr(build, "find_cuda_home", lambda: None)
    monkeypatch.setattr(build.torch.version, "cuda", "13.0")
    plan = build.make_plan()
    assert plan.cpp and not plan.cuda and "no CUDA toolkit" in plan.cuda_reason


def test_cuda_of_another_version_is_left_out_with_a_reason(build, monkeypatch, tmp_path):
    monkeypatch.setattr(build, "missing_compiler", lambda: "")
    monkeypatch.setattr(build, "find_cuda_home", lambda: tmp_path)
    monkeypatch.setattr(build, "nvcc_output", lambda *_: "Cuda compilation tools, release 11.8, V")
    monkeypatch.setattr(build.torch.version, "cuda", "13.0")
    assert build.make_plan().cuda_reason == "nvcc has CUDA 11.8, but torch was built with CUDA 13.0"


def test_forced_cuda_stops_where_it_cannot_be_built(build, monkeypatch):
    monkeypatch.setattr(build, "missing_compiler", lambda: "")
    monkeypatch.setattr(build, "find_cuda_home", lambda: None)
    monkeypatch.setenv("PFS_FAST_CUDA", "1")
    with pytest.raises(SystemExit, match="PFS_FAST_CUDA=1, but "):
        build.make_plan()


def test_wrong_switch_is_refused(build, monkeypatch):
    monkeypatch.setenv("PFS_FAST_CUDA", "yes")
    with pytest.raises(SystemExit, match='PFS_FAST_CUDA must be 0, 1 or unset, got "yes"'):
        build.make_plan()


def test_missing_compiler_leaves_the_kernels_out(build, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    plan = build.make_plan()
    assert not plan.cpp and not plan.cuda
    assert "no C++ compiler was found (CXX: no-such-compiler)" in plan.cpp_reason
    assert build.extensions() == []
    monkeypatch.setenv("PFS_FAST_REQUIRE_EXT", "1")
    with pytest.raises(SystemExit, match="PFS_FAST_REQUIRE_EXT=1, but no C"):
        build.make_plan()


def test_report_tells_the_reasons(build, tmp_path):
    build.write_report(tmp_path, build.Plan("no compiler", "no nvcc"))
    report = json.loads((tmp_path / build.REPORT).read_text())
    assert report["cpp_reason"] == "no compiler" and report["cuda_reason"] == "no nvcc"


def test_architectures_follow_the_environment(build, monkeypatch):
    monkeypatch.setattr(build.torch.cuda, "is_available", lambda: False)
    assert build.choose_cuda_archs() == "8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6 9.0+PTX")
    assert build.choose_cuda_archs() == "8.6;9.0+PTX"


def test_backend_asks_for_torch_only_where_there_is_none(backend, monkeypatch):
    monkeypatch.setattr(backend, "_show_environment", lambda: None)
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: None)
    assert "torch>=2.11" in backend._missing()
    monkeypatch.setattr(backend.importlib.util, "find_spec", lambda name: object())
    assert backend._missing() == []


def test_backend_sees_the_environment_behind_the_isolation(backend, monkeypatch):
    """In build isolation only the path is another: what is installed is found again, at its end."""
    import torch

    home = str(Path(torch.__file__).parents[1])
    isolated = [entry for entry in sys.path if entry != home]
    monkeypatch.setattr(sys, "path", list(isolated))
    backend._show_environment()
    assert sys.path[: len(isolated)] == isolated
    assert home in sys.path[len(isolated) :]


def test_runtime_needs_have_no_upper_pin():
    text = (ROOT / "pyproject.toml").read_text()
    needs = ast.literal_eval(re.search(r"^dependencies = (\[.*?\])", text, re.M | re.S).group(1))
    assert "torch>=2.11" in needs
    assert not [need for need in needs if "<" in need or "==" in need]
