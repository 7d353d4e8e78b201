"""The record of machine, versions and commit that goes with every figure."""

from __future__ import annotations

import os
import platform
import subprocess
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch

import pfs_fast


@dataclass(frozen=True)
class Machine:
    """What a figure depends on beside the code; goes into every CSV row."""

    device: str
    cpu: str
    cpu_isa: str
    cores: int
    threads: int
    load: str
    torch: str
    cuda: str
    python: str
    commit: str
    date: str

    @classmethod
    def here(cls, device: torch.device) -> Machine:
        """Of this process; ``load`` is the load average of the last minute where there is one."""
        is_cuda = device.type == "cuda"
        load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
        return cls(
            device=torch.cuda.get_device_name(device) if is_cuda else "cpu",
            cpu=_cpu_name(),
            cpu_isa=pfs_fast.backends().cpu_isa,
            cores=os.cpu_count() or 0,
            threads=torch.get_num_threads(),
            load=load,
            torch=torch.__version__,
            cuda=(torch.version.cuda or "") if is_cuda else "",
            python=platform.python_version(),
            commit=_commit(),
            date=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        )

    def __str__(self) -> str:
        return ", ".join(f"{key} {value}" for key, value in asdict(self).items() if value != "")


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _commit() -> str:
    """Short hash of the source tree, "+" if it has changes; outside of git that of the variable COMMIT, or ""."""
    root = Path(__file__).resolve().parent.parent

    def git(*args: str) -> str:
        command = ["git", "-C", str(root), *args]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changes = git("status", "--porcelain", "--untracked-files=no")
        return git("rev-parse", "--short", "HEAD") + ("+" if changes else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "")
