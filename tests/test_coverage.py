"""The script of the coverage table, on networks that take little time."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import nn

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"
sys.path.insert(0, str(SCRIPTS))

import coverage_check  # noqa: E402
import coverage_networks  # noqa: E402
import coverage_table  # noqa: E402
from coverage_networks import Network  # noqa: E402


def network(name: str, suite: str) -> Network:
    return next(n for n in coverage_networks.networks((suite,)) if n.name == name)


def custom(build) -> Network:
    return Network("net", "1-d", "own", build, (3, 8, 8))


@pytest.mark.parametrize(
    ("suite", "name"),
    [
        ("torchvision", "shufflenet_v2_x0_5"),
        ("torchvision", "mobilenet_v3_small"),
        ("1-d", "fcn_1d"),
    ],
)
def test_networks_are_cut_exactly_to_half(suite, name):
    record = coverage_check.check(network(name, suite))
    assert (record.status, record.reason, record.norms) == ("exact", "", [])
    assert record.error <= 1e-9 and 0.4 < record.got <= record.asked == 0.5
    assert record.prunable > 0 and record.groups > 0


def test_networks_of_timm_are_cut_exactly():
    pytest.importorskip("timm", reason="needs timm for its networks")
    record = coverage_check.check(network("resnet10t", "timm"))
    assert (record.status, record.reason, record.family) == ("exact", "", "resnet")


def test_all_suites_are_listed_once():
    pytest.importorskip("timm", reason="needs timm for its networks")
    every = list(coverage_networks.networks())
    assert len({n.key for n in every}) == len(every)
    timm = [n for n in every if n.suite == "timm"]
    assert len(timm) >= 100 and len({n.family for n in timm}) >= 40
    assert sum(n.suite == "torchvision" for n in every) == 80


def test_errors_name_files_by_their_package(monkeypatch):
    def check(*_):
        raise ValueError(
            "not traced (/opt/env/lib/python3.11/site-packages/timm/layers/x.py:3: if y:)"
        )

    monkeypatch.setattr(coverage_check, "_check", check)
    record = coverage_check.check(network("resnet18", "torchvision"))
    assert record.reason == "ValueError: not traced (timm/layers/x.py:3: if y:)"


def test_failures_end_in_the_record():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.conv(x) if x.sum() > 0 else x

    record = coverage_check.check(custom(Branch))
    assert (record.status, record.step) == ("failed", "trace") and "TraceError" in record.reason
    record = coverage_check.check(custom(lambda: nn.Sequential(nn.Conv2d(3, 4, 1))))
    assert record.status == "whole" and "output of the network" in record.reason


def test_wrong_cuts_are_told_from_those_that_a_norm_explains(monkeypatch):
    """A cut that drops the wrong inputs is a bug in one network and cannot be told in the other."""

    def plain() -> nn.Module:
        layers = [nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 1)]
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))

    verify = coverage_check.verify

    def broken(model, narrow, structure, *args, **kwargs):
        structure.inputs["2"] = structure.inputs["2"][::-1]
        return verify(model, narrow, structure, *args, **kwargs)

    monkeypatch.setattr(coverage_check, "verify", broken)
    record = coverage_check.check(custom(plain))
    assert record.status == "wrong" and "layer 2" in record.reason


def test_script_goes_on_where_it_was_stopped_and_limits_each_network(tmp_path):
    records = tmp_path / "records.jsonl"
    names = ["1-d/fcn_1d", "1-d/resnet_1d"]
    command = [
        sys.executable,
        str(SCRIPTS / "coverage.py"),
        "run",
        "--suite",
        "1-d",
        "--records",
        str(records),
    ]

    def run(*more: str) -> list[dict]:
        subprocess.run(
            [*command, *more], check=True, capture_output=True, timeout=200, env=_environment()
        )
        return [json.loads(line) for line in records.read_text().splitlines()]

    assert [(r["name"], r["status"]) for r in run(names[0])] == [("fcn_1d", "exact")]
    found = run(*names, "--seconds", "0.01")  # too short for the one that is left
    assert [(r["name"], r["status"], r["step"]) for r in found[1:]] == [
        ("resnet_1d", "failed", "limit")
    ]
    assert len(run(*names)) == 2
    found = run(*names, "--retry")
    assert [(r["name"], r["status"]) for r in found[2:]] == [("resnet_1d", "exact")]
    rows = {f"{r['suite']}/{r['name']}": r for r in found}
    text = coverage_table.render(rows, Counter({"1-d": 3}))
    assert "| fcn_1d | 3x128 | 3/4 | 3 | 50 % |" in text
    assert "| 1-d | 2 | 0 | 0 | 0 | 0 | 1 | 3 | 1 |" in text


def _environment() -> dict[str, str]:
    """The package under test, wherever this process found it."""
    import os

    import pfs_fast

    return {**os.environ, "PYTHONPATH": str(Path(pfs_fast.__file__).resolve().parents[1])}
