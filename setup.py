"""Builds ``pfs_fast._C`` from csrc/sources.txt; metadata is in pyproject.toml.

Environment variables:
    PFS_FAST_CUDA: 0 builds without CUDA, 1 fails where CUDA cannot be built; unset builds it where
        it can be.
    PFS_FAST_REQUIRE_EXT: 1 fails where nothing can be compiled, instead of installing the package
        without kernels.
    TORCH_CUDA_ARCH_LIST: architectures; default is that of the GPUs present, without one
        "8.0;9.0+PTX".
    MAX_JOBS: number of parallel compilations.
    CC, CXX, CUDA_HOME: tools, as for any extension of PyTorch.

What was built, and why something was not, goes to pfs_fast/_build_report.json, where
``pfs_fast.backends()`` finds it.
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:  # enough for an sdist
    torch = None
    cpp_extension = None

ROOT = Path(__file__).resolve().parent
REPORT = "_build_report.json"
DEFAULT_CUDA_ARCHS = "8.0;9.0+PTX"
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden", "-Wno-unknown-pragmas"]
NVCC_FLAGS = ["-O3"]


@dataclass(frozen=True)
class Source:
    """One line of csrc/sources.txt."""

    kind: str
    path: str
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """What will be compiled; a reason is empty where the part is compiled."""

    cpp_reason: str
    cuda_reason: str
    cuda_archs: str = ""

    @property
    def cpp(self) -> bool:
        return not self.cpp_reason

    @property
    def cuda(self) -> bool:
        return self.cpp and not self.cuda_reason


def read_sources() -> list[Source]:
    """Reads csrc/sources.txt."""
    sources = []
    for line in (ROOT / "csrc" / "sources.txt").read_text(encoding="utf-8").splitlines():
        words = line.split("#")[0].split()
        if not words:
            continue
        kind, path, *flags = words
        sources.append(Source(kind, path, tuple(flags)))
    return sources


def make_plan() -> Plan:
    """Decides what to compile; stops where the environment asks for what cannot be."""
    cuda_wish = os.environ.get("PFS_FAST_CUDA", "").strip()
    if cuda_wish not in ("", "0", "1"):
        raise SystemExit(f'pfs_fast: PFS_FAST_CUDA must be 0, 1 or unset, got "{cuda_wish}"')
    cpp_reason = missing_compiler()
    if cpp_reason and os.environ.get("PFS_FAST_REQUIRE_EXT", "") == "1":
        raise SystemExit(f"pfs_fast: PFS_FAST_REQUIRE_EXT=1, but {cpp_reason}")
    if cpp_reason:
        cuda_reason = cpp_reason
    elif cuda_wish == "0":
        cuda_reason = "CUDA was switched off by PFS_FAST_CUDA=0 when the library was built"
    else:
        cuda_reason = missing_cuda()
    if cuda_wish == "1" and cuda_reason:
        raise SystemExit(f"pfs_fast: PFS_FAST_CUDA=1, but {cuda_reason}")
    return Plan(cpp_reason, cuda_reason, "" if cuda_reason else choose_cuda_archs())


def missing_compiler() -> str:
    """Why no C++ can be compiled, or "". Setuptools compiles with CC and links with CXX."""
    for variable, default in (("CC", "cc"), ("CXX", "c++")):
        configured = sysconfig.get_config_var(variable) or default
        words = shlex.split(os.environ.get(variable) or configured)
        if shutil.which(words[0]) is None:
            return f"no C++ compiler was found ({variable}: {words[0]}) when the package was built"
    return ""


def missing_cuda() -> str:
    """Why CUDA cannot be compiled, or "". Points PyTorch's tools to the toolkit that was found."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} was built without CUDA"
    home = find_cuda_home()
    if home is None:
        return "no CUDA toolkit with nvcc and headers was found (CUDA_HOME, PATH) at build time"
    release = nvcc_output(home / "bin" / "nvcc", "--version").partition("release ")[2]
    release = release.partition(",")[0]
    if release.split(".")[0] != torch.version.cuda.split(".")[0]:
        wanted = torch.version.cuda
        return f"nvcc has CUDA {release or 'unknown'}, but torch was built with CUDA {wanted}"
    cpp_extension.CUDA_HOME = str(home)
    return ""


def find_cuda_home() -> Path | None:
    """The toolkit that CUDA_HOME names, else the one of nvcc on the path, else the usual folder."""
    wish = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    candidates = [wish] if wish else [cpp_extension.CUDA_HOME]
    nvcc = shutil.which("nvcc")
    if not wish and nvcc is not None:
        # The nvcc on the path may be a link or a wrapper, with nothing of the toolkit beside it.
        listing = nvcc_output(Path(nvcc), "--dryrun", "-x", "cu", "-E", os.devnull)
        candidates.append(listing.partition("TOP=")[2].partition("\n")[0].strip())
        candidates.append("/usr/local/cuda")
    for home in (Path(candidate).resolve() for candidate in candidates if candidate):
        if (home / "bin" / "nvcc").is_file() and (home / "include" / "cuda_runtime.h").is_file():
            return home
    return None


def nvcc_output(nvcc: Path, *arguments: str) -> str:
    answer = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True, check=False)
    return answer.stdout + answer.stderr


def choose_cuda_archs() -> str:
    """TORCH_CUDA_ARCH_LIST, else the GPUs present, else a default that runs on most."""
    archs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if not archs and torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        capabilities = {torch.cuda.get_device_capability(device) for device in devices}
        archs = ";".join(f"{major}.{minor}" for major, minor in sorted(capabilities))
    return archs.replace(" ", ";") or DEFAULT_CUDA_ARCHS


def make_extension(plan: Plan, sources: list[Source]) -> Extension:
    """The extension, with the files that need no flags of their own; BuildExt adds the others."""
    kinds = {"cpp", "python"}
    if platform.machine().lower() in ("x86_64", "amd64"):
        kinds.add("x86")
    if plan.cuda:
        kinds.add("cuda")
    chosen = []
    for source in sources:
        if source.kind == "python":
            flags = [f"-DPFS_FAST_TORCH_VERSION={torch.__version__}"]
            if plan.cuda:
                flags += ["-DPFS_FAST_WITH_CUDA", f"-DPFS_FAST_CUDA_ARCHS={plan.cuda_archs}"]
            source = Source(source.kind, source.path, tuple(flags))
        if source.kind not in kinds:
            continue
        if not (ROOT / source.path).is_file():
            raise SystemExit(f"pfs_fast: csrc/sources.txt names {source.path}, which is missing")
        chosen.append(source)
    make = cpp_extension.CUDAExtension if plan.cuda else cpp_extension.CppExtension
    extension = make(
        "pfs_fast._C",
        [source.path for source in chosen if not source.flags],
        include_dirs=[str(ROOT / "csrc")],
        depends=[str(path) for path in sorted((ROOT / "csrc").rglob("*.*h"))],
        extra_compile_args={"cxx": list(CXX_FLAGS), "nvcc": list(NVCC_FLAGS)},
        extra_link_args=["-fopenmp"],
    )
    extension.flagged_sources = [source for source in chosen if source.flags]
    return extension


def write_report(folder: Path, plan: Plan) -> None:
    """Leaves beside the package what was built and why the rest was not."""
    report = {
        "torch": "" if torch is None else str(torch.__version__),
        "cpp_reason": plan.cpp_reason,
        "cuda_reason": plan.cuda_reason,
        "cuda_archs": plan.cuda_archs,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


def say(plan: Plan) -> None:
    """One line for each part."""
    with_torch = "" if torch is None else f" against torch {torch.__version__}"
    cpp = f"compiled{with_torch}" if plan.cpp else f"NOT compiled: {plan.cpp_reason}"
    cuda = f"compiled for {plan.cuda_archs}" if plan.cuda else f"NOT compiled: {plan.cuda_reason}"
    print(f"pfs_fast: CPU kernels {cpp}", file=sys.stderr)
    print(f"pfs_fast: CUDA kernels {cuda}", file=sys.stderr)


class BuildPy(build_py):
    """Adds the build report to the package."""

    def run(self) -> None:
        super().run()
        plan = make_plan() if torch is not None else missing_torch()
        in_place = getattr(self, "editable_mode", False)
        write_report((ROOT if in_place else Path(self.build_lib)) / "pfs_fast", plan)
        if not plan.cpp:
            say(plan)


def missing_torch() -> Plan:
    raise SystemExit("pfs_fast: torch must be installed to build; pip install 'torch>=2.11'")


class BuildExt(cpp_extension.BuildExtension if cpp_extension is not None else build_ext):
    """BuildExtension of PyTorch, plus files with flags of their own."""

    def run(self) -> None:
        plan = make_plan() if torch is not None else missing_torch()
        say(plan)
        if self.inplace:
            write_report(ROOT / "pfs_fast", plan)
        # An unchanged file is not compiled again (ninja), but another choice of CUDA must relink.
        self.force = True
        if plan.cuda:
            os.environ["TORCH_CUDA_ARCH_LIST"] = plan.cuda_archs
        super().run()

    def build_extension(self, ext: Extension) -> None:
        by_flags: dict[tuple[str, ...], list[str]] = {}
        for source in ext.flagged_sources:
            by_flags.setdefault(source.flags, []).append(source.path)
        objects = list(ext.extra_objects)
        for flags, paths in by_flags.items():
            # One folder for each, because ninja forgets what another build file in its folder has
            # built.
            objects += self.compiler.compile(
                paths,
                output_dir=os.path.join(self.build_temp, Path(paths[0]).stem),
                include_dirs=ext.include_dirs,
                extra_postargs={
                    kind: [*extra, *flags] for kind, extra in ext.extra_compile_args.items()
                },
                depends=ext.depends,
            )
        ext.extra_objects = objects
        super().build_extension(ext)


def extensions() -> list[Extension]:
    """What setuptools is to build; empty where nothing can be."""
    if torch is None:
        return []
    plan = make_plan()
    return [make_extension(plan, read_sources())] if plan.cpp else []


if __name__ == "__main__":
    # Ninja installed as a Python package is found only if its folder is on the path.
    os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
    setup(ext_modules=extensions(), cmdclass={"build_py": BuildPy, "build_ext": BuildExt})
