"""What can go wrong on the command line: one clear line and an exit code."""

from __future__ import annotations

import os
import sys
import warnings

import numpy as np
import pytest
import torch
from commands import search, train

import pfs_fast as pfs
from pfs_fast.cli import main

# --- what can go wrong ------------------------------------------------------------------------------------------------

USAGE = [
    (["frobnicate"], "invalid choice"),
    (["search", "--budget", "0"], "macs must be above 0"),
    (["search", "--budget", "1.5"], "share must be in (0, 1]"),
    (["search", "--budget", "nan"], "must be a number"),
    (["search", "--budget", "flops=1M"], "key must be one of"),
    (["search", "--budget", "latency_ms=50%"], "latency_ms must be in milliseconds, never a share"),
    (["search", "--budget", "latency_ms=5,device=abacus"], "device must be 'cpu', 'cuda'"),
    (["search", "--budget", "0.5,batch=0"], "batch must be a whole number"),
    (["search", "--width", "layer3"], "must be LAYERS=LEAST:MOST such as layer3.*=8:64"),
    (["search", "--width", "layer3=8"], "must be LAYERS=LEAST:MOST"),
    (["search", "--width", "layer3=a:b"], "must have channels or shares beside the colon"),
    (["train", "runs/tiny", "--ignore", "fc"], "--width and --ignore need --budget"),
    (["search", "--reference", "0.5"], "must be model, base or a number of MACs"),
    (["search", "--epochs", "many"], "invalid int value"),
    (["search", "--scope", "some"], "invalid choice"),
    (["search", "--device", "abacus"], "must be cpu, cuda or cuda:<index>"),
    (["search", "--model-arg", "width"], "must be KEY=VALUE"),
    (["search", "--data", "cifar10", "a", "b"], "--data must be SOURCE or SOURCE PATH"),
    (["search", "--data", "images.npz", "--validate"], "has none; add --val N"),
    (["search", "--data", "images.npz", "--select", "best"], "has none; add --val N"),
    (["train"], "required: RUN"),
    (["train", "structure.json"], "--model and --data must be given"),
    (["train", "x", "--restore", "best"], "add --hold-out"),
    (["info", "--input", "32x32"], "must be channels x height x width"),
]

ERRORS = [
    (["search", "--model", "resnet21"], "did you mean"),
    (["search", "--model", "torchvision:resnet19"], "did you mean torchvision:resnet18"),
    (["search", "--model", "no_such_module:make"], "importable module"),
    (["search", "--model", "tiny_network:not_a_factory"], "must end in a callable"),
    (["search", "--model", "tiny_network:make", "--expansion", "2"], "expansion"),
    (["search", "--data", "digit"], "did you mean digits?"),
    (["search", "--data", "missing.npz"], "existing .npz file"),
    (["search", "--data", "wrong.npz"], "x_train"),
    (["search", "--data", "images.npz", "--size", "16"], "size of their own"),
    (["search", "--data", "imagefolder"], "must come with a folder"),
    (["search", "--data", "imagefolder", "missing"], "missing"),
    (["search", "--data", "digits", "somewhere"], "a path must belong to"),
    (["search", "--data", "cifar10"], "PFS_FAST_CIFAR10"),
    (["search", "--epochs", "0"], "epochs must be"),
    (["search", "--gamma", "-1"], "gamma must be"),
    (["search", "--seed", "-1"], "seed must be"),
    (["search", "--budget", "macs=1K"], "1,000"),
    (["search", "--budget", "latency_ms=5,device=cuda:99"], "device must be there, got 'cuda:99'"),
    (
        ["search", "--width", "layer3=:1.5"],
        "whole numbers of channels or shares in (0, 1], got 1.5",
    ),
    (["search", "--width", "layr3=:8"], "the closest names are '0', '1', '3'"),
    (["search", "--ignore", "layr3"], "the closest names are '0', '1', '3'"),
    (["search", "--ignore", "*"], "must have a channel group that the budget does not ignore"),
    (["search", "--precision", "fp16", "--device", "cpu"], "fp16"),
    (["search", "--device", "cuda:99"], "--device must be there"),
    (["search", "--out", "images.npz"], "--out must be a folder"),
    (["train", "."], "must be the folder of a finished search"),
    (["info", "images.npz"], "pickle or a zip archive"),
    (["info", "missing.safetensors"], "no such file"),
    (["info", "missing.json"], "readable file"),
    (["info", "--model", "tiny_network:make", "--input", "1x8x8"], "example_input"),
]


@pytest.mark.parametrize(("argv", "message"), USAGE, ids=[" ".join(argv) for argv, _ in USAGE])
def test_wrong_usage_exits_with_2(argv, message, capsys):
    assert main([*argv, *quiet(argv)]) == 2
    assert_one_clear_error(capsys, message)


@pytest.mark.parametrize(("argv", "message"), ERRORS, ids=[" ".join(argv) for argv, _ in ERRORS])
def test_errors_exit_with_1(argv, message, capsys):
    assert main([*argv, *quiet(argv)]) == 1
    assert_one_clear_error(capsys, message)


def quiet(argv: list[str]) -> list[str]:
    """Small options where a search would begin, so that each case fails for its own reason."""
    if argv[0] != "search":
        return []
    given = {"--model": ["--model", "tiny_network:make"], "--data": ["--data", "images.npz"]}
    options = [word for name, words in given.items() if name not in argv for word in words]
    return [*options, "--quiet", *([] if "--epochs" in argv else ["--epochs", "2"])]


def assert_one_clear_error(capsys, message: str) -> None:
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith(("pfs-fast", "usage:"))
    assert "Traceback" not in captured.err
    assert captured.out == ""


def test_search_refuses_to_replace_a_search(searched, capsys):
    before = (searched / "search.safetensors").read_bytes()
    assert search("--seed", "1") == 1
    assert "add --overwrite" in capsys.readouterr().err
    assert (searched / "search.safetensors").read_bytes() == before


def test_train_refuses_a_damaged_record(searched, capsys):
    (searched / "run.json").write_text('{"format": "pfs_fast.run", "version": 1}')
    assert train() == 1
    assert "must hold a whole record" in capsys.readouterr().err
    (searched / "run.json").write_text('{"format": "pfs_fa')
    assert train() == 1
    assert "must be JSON" in capsys.readouterr().err


def test_train_refuses_images_of_another_size(searched, capsys):
    images = np.zeros((6, 3, 10, 10), dtype=np.uint8)
    np.savez("large.npz", images=images, labels=np.arange(6) % 3)
    assert train("--data", "large.npz") == 1
    assert "images must have the size that was searched" in capsys.readouterr().err
    assert not (searched / "slim.safetensors").exists()


def test_train_refuses_a_structure_of_another_network(searched, capsys):
    assert train("--model", "resnet20") == 1
    assert "use the structure with the model it was made for" in capsys.readouterr().err


def test_train_finds_a_file_that_gives_back_other_weights(searched, monkeypatch, capsys):
    load = pfs.load

    def load_and_change(path, model):
        reloaded = load(path, model)
        with torch.no_grad():
            next(reloaded.parameters()).flatten()[0] += 1
        return reloaded

    monkeypatch.setattr(pfs, "load", load_and_change)
    assert train() == 1
    assert (
        "must give back the weights that were saved, got others in 0.weight"
        in capsys.readouterr().err
    )


def test_debug_shows_the_traceback(capsys):
    assert main(["info", "missing.json", "--debug"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_errors_of_the_program_itself_are_not_hidden(monkeypatch):
    monkeypatch.setattr(pfs, "backends", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        main(["info"])


def test_warnings_are_lines_without_source_code(searched, monkeypatch, capsys):
    def warn(*_):
        warnings.warn("three groups are silent", UserWarning, stacklevel=1)
        return "-"

    monkeypatch.setattr("pfs_fast.cli.info._describe", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["info", "runs/tiny"]) == 0
    assert capsys.readouterr().err == "pfs-fast: warning: three groups are silent\n"


def test_help_and_version_exit_with_0(capsys):
    for argv in (
        ["--help"],
        ["--version"],
        ["search", "--help"],
        ["train", "--help"],
        ["info", "--help"],
    ):
        assert main(argv) == 0
    assert "pfs_fast" in capsys.readouterr().out


def test_a_pipe_that_closes_early_is_no_error(monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as pipe:
        monkeypatch.setattr(sys, "stdout", pipe)
        assert main(["info"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == ""
