"""The script for a GPU machine, as far as a machine without one can tell: it parses, ends in time, and runs what is there."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "benchmarks/gpu_check.sh"
BUDGET_S = 480
if shutil.which("bash") is None or not SCRIPT.is_file():
    pytest.skip("needs bash and the source tree", allow_module_level=True)


def check(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def stages(mode: str) -> dict[str, tuple[int, list[str]]]:
    """Seconds at most and command of each stage, by name and in order."""
    done = check(mode, "--list")
    assert done.returncode == 0, done.stderr
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    return {name: (int(limit), shlex.split(command)) for name, limit, command in lines}


@pytest.mark.parametrize("mode", ["tests", "bench"])
def test_stages_of_a_mode_end_in_time(mode):
    found = stages(mode)
    assert sum(limit for limit, _ in found.values()) <= BUDGET_S
    assert str(BUDGET_S) in re.search(r"BUDGET_S=\d+", SCRIPT.read_text()).group()


def test_what_matters_most_comes_first():
    assert list(stages("tests")) == ["wheels", "build", "op-tests", "gpu-tests", "memcheck", "racecheck"]  # fmt: skip
    benchmarks = list(stages("bench"))
    assert benchmarks[:3] == ["build", "bench-step", "bench-search"]
    assert benchmarks[-1] == "bench-compile"


@pytest.mark.parametrize("mode", ["tests", "bench"])
def test_stages_name_what_there_is(mode):
    from benchmarks.command import SUITES
    from benchmarks.settings import NETWORKS

    for name, (_, command) in stages(mode).items():
        words = " ".join(command).split()
        for word in words:
            assert not re.match(r"(tests|benchmarks|setup\.py)(/|$)", word) or (ROOT / word).exists(), (name, word)  # fmt: skip
        if "--suite" in words:
            assert words[words.index("--suite") + 1] in SUITES
        if "--network" in words:
            assert words[words.index("--network") + 1] in NETWORKS


@pytest.mark.parametrize("arguments", [(), ("all",), ("tests", "quickly")])
def test_other_arguments_are_refused(arguments):
    done = check(*arguments)
    assert done.returncode == 2
    assert "usage: benchmarks/gpu_check.sh tests|bench [--list]" in done.stderr
