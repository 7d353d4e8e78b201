"""Commands show the slim network beside the dense one, unless they are told not to."""

from __future__ import annotations

import pytest
from commands import TINY

from pfs_fast.cli import main
from pfs_fast.measuring import comparison
from pfs_fast.measuring.timing import Timing


@pytest.fixture(autouse=True)
def scripted(monkeypatch):
    """Dense networks take 4 ms, slim ones 2 ms."""

    def timer(tasks, samples):
        for task in tasks:
            task.run()
        return [Timing(ms, 0.01, ms) for ms in (4.0, 2.0)]

    monkeypatch.setattr(comparison, "DeviceTimer", lambda device, threads: timer)
    monkeypatch.setattr(comparison, "installed", lambda: ("eager", "folded"))


def shown(capsys, *argv: str) -> str:
    assert main(list(argv)) == 0
    return capsys.readouterr().out


SEARCH = [
    "search",
    "--data",
    "images.npz",
    "--backend",
    "reference",
    "--batch-size",
    "16",
    "--epochs",
    "1",
]


def test_search_and_train_show_the_speed_of_the_slim_network(folder, capsys):
    out = shown(capsys, *SEARCH, *TINY, "--out", "runs/tiny")
    assert "ms, folded" in out and "dense / slim" in out
    train = ["train", "runs/tiny", *TINY, "--epochs", "1", "--batch-size", "16"]
    assert "ms, eager" in shown(capsys, *train)
    assert "ms, eager" not in shown(capsys, *train, "--no-speed", "--overwrite")


def test_info_measures_on_demand(folder, capsys):
    network = ["--model", "resnet20"]
    shown(capsys, *SEARCH, *network, "--max-steps", "1", "--out", "runs/r", "--no-speed", "--quiet")
    assert "ms, eager" not in shown(capsys, "info", "runs/r")
    assert "ms, eager" in shown(capsys, "info", "runs/r", "--speed")
    assert main(["info", "runs/r/structure.json", "--speed"]) == 2
    assert "--speed needs the folder of a search" in capsys.readouterr().err
