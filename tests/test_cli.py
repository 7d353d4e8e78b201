"""The command line, run in this process: main(argv) gives the exit code."""

from __future__ import annotations

import io
import json
import os
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import pfs_fast as pfs
from pfs_fast._library import is_loaded
from pfs_fast.cli import main
from pfs_fast.cli.inputs import DataSpec, ModelSpec

BACKEND = "fused" if is_loaded() else "reference"

TINY_NETWORK = '''
"""A small network in the user's folder."""
from torch import nn

def block(inputs, outputs):
    return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

def make(num_classes=3, width=8):
    pool = [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*block(3, width), *block(width, 2 * width), *pool, nn.Linear(2 * width, num_classes))

def make_three():
    return make(3)

not_a_factory = 3
'''


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty folder to work in, with a small network and small images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PFS_FAST_CIFAR10", raising=False)
    monkeypatch.delitem(sys.modules, "tiny_network", raising=False)
    (tmp_path / "tiny_network.py").write_text(TINY_NETWORK)
    rng = np.random.default_rng(0)
    labels = np.arange(48) % 3
    images = rng.integers(0, 60, (48, 8, 8, 3), dtype=np.uint8)
    images[np.arange(48), :, :, labels] += 150
    np.savez(
        tmp_path / "images.npz",
        x_train=images,
        y_train=labels,
        x_test=images[:15],
        y_test=labels[:15],
    )
    np.savez(tmp_path / "no_test.npz", images=images, labels=labels)
    np.savez(tmp_path / "wrong.npz", pictures=images)
    return tmp_path


@pytest.fixture
def searched(folder):
    """A finished search in runs/tiny."""
    assert search() == 0
    return folder / "runs" / "tiny"


def search(*more: str) -> int:
    arguments = ["--model", "tiny_network:make", "--data", "images.npz", "--out", "runs/tiny"]
    return main(
        [
            "search",
            *arguments,
            "--epochs",
            "2",
            "--batch-size",
            "16",
            "--quiet",
            "--backend",
            BACKEND,
            *more,
        ]
    )


def train(*more: str) -> int:
    arguments = ["--epochs", "2", "--batch-size", "16", "--quiet"]
    return main(["train", "runs/tiny", *arguments, *more])


# --- search and train -------------------------------------------------------------------------------------------------


def test_search_writes_gates_structure_and_record(folder, capsys):
    assert search() == 0
    searched = folder / "runs" / "tiny"
    assert {p.name for p in searched.iterdir()} == {
        "search.safetensors",
        "structure.json",
        "run.json",
    }
    structure = pfs.Structure.from_json((searched / "structure.json").read_text())
    assert 0 < structure.macs_share <= 0.5
    model = ModelSpec("tiny_network:make", {"num_classes": 3}).build()
    assert pfs.SearchResult.load(searched / "search.safetensors", model).structure == structure
    record = json.loads((searched / "run.json").read_text())
    assert record["model"] == {"name": "tiny_network:make", "arguments": {"num_classes": 3}}
    assert str(structure) in capsys.readouterr().out


def test_search_writes_a_folder_for_each_of_several_seeds(folder, capsys):
    assert search("--seeds", "2", "0", "--checkpoint") == 0
    out = capsys.readouterr().out
    searched = folder / "runs" / "tiny"
    assert {p.name for p in searched.iterdir()} == {
        "seed0",
        "seed2",
        "checkpoint.seed0.safetensors",
        "checkpoint.seed2.safetensors",
    }
    results = []
    for seed in (2, 0):
        own = searched / f"seed{seed}"
        assert {p.name for p in own.iterdir()} == {
            "search.safetensors",
            "structure.json",
            "run.json",
        }
        results.append(pfs.SearchResult.load(own / "search.safetensors"))
        assert results[-1].config.seed == seed
        assert f"next: pfs-fast train runs/tiny/seed{seed}" in out
    assert pfs.SearchResults(results).report() in out
    assert main(["train", "runs/tiny/seed0", "--epochs", "1", "--quiet"]) == 0


def test_search_refuses_bad_seeds_before_it_makes_a_folder(folder, capsys):
    assert search("--seeds", "1", "1") == 1
    assert "search: seeds must be different, got [1] more than once" in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_train_saves_a_network_that_loads_again(searched, capsys):
    assert train() == 0
    out = capsys.readouterr().out
    structure = pfs.Structure.from_json((searched / "structure.json").read_text())
    slim = pfs.load(searched / "slim.safetensors", ModelSpec("tiny_network:make").build())
    cost = pfs.count(slim, torch.zeros(1, 3, 8, 8))
    assert (cost.macs, cost.params) == (structure.macs, structure.params)
    history = json.loads((searched / "history.json").read_text())
    test = pfs.data.from_npz("images.npz").loaders().test
    assert pfs.evaluate(slim, test).top1 == pytest.approx(history["accuracy"]["top1"], abs=0.07)
    assert f"{structure.macs:,}" in out and "same accuracy" in out
    assert len(history["history"]) == 2


def test_train_learns(searched):
    assert train("--epochs", "8") == 0
    assert json.loads((searched / "history.json").read_text())["accuracy"]["top1"] > 0.9


def test_train_takes_another_budget_of_the_same_search(searched):
    assert train("--budget", "0.25", "--out", "runs/quarter") == 0
    model = ModelSpec("tiny_network:make").build()
    whole = pfs.count(model, torch.zeros(1, 3, 8, 8)).macs
    slim = pfs.load("runs/quarter/slim.safetensors", model)
    assert pfs.count(slim, torch.zeros(1, 3, 8, 8)).macs <= 0.25 * whole
    assert not (searched / "slim.safetensors").exists()


def test_limits_on_layers_and_memory(capsys):
    options = ["--budget", "peak_activation_bytes=0.8,weight_bytes=3KiB", "--width", "3=3:5"]
    arguments = ["--model", "tiny_network:make", "--data", "images.npz", "--backend", BACKEND]
    search = ["search", *arguments, *options, "--epochs", "1", "--out", "runs/limits", "--quiet"]
    assert main([*search, "--ignore", "0"]) == 0
    structure = pfs.Structure.from_json(Path("runs/limits/structure.json").read_text())
    assert structure.sizes.keys() == {"3"}  # the other group is ignored
    assert 3 <= len(structure.kept["3"]) <= 5
    assert {c.name for c in structure.limits} == {"weight_bytes", "peak_activation_bytes"}
    assert all(c.holds for c in structure.limits)
    assert "peak activation bytes" in capsys.readouterr().out
    cut = ["train", "runs/limits", "--epochs", "1", "--quiet", "--out", "runs/cut"]
    assert main([*cut, "--budget", "peak_activation_bytes=0.9", "--width", "3=:2"]) == 0
    slim = pfs.load("runs/cut/slim.safetensors", ModelSpec("tiny_network:make").build())
    assert slim[3].out_channels <= 2


def test_train_takes_a_structure_alone(searched):
    Path("alone").mkdir()
    (searched / "structure.json").rename("alone/structure.json")
    model = ["--model", "tiny_network:make_three", "--data", "images.npz"]
    assert main(["train", "alone/structure.json", *model, "--epochs", "1", "--quiet"]) == 0
    assert Path("alone/slim.safetensors").exists()


def test_scratch_b_trains_longer(searched, capsys):
    assert train("--scratch-b") == 0
    structure = pfs.Structure.from_json((searched / "structure.json").read_text())
    epochs = pfs.scratch_b_epochs(2, structure.macs_share)
    assert epochs > 2
    assert f"trained {epochs} epochs" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "sizes"), [([], (48, 15)), (["--hold-out", "--restore", "best"], (36, 12))]
)
def test_hold_out_decides_what_is_trained_on_and_watched(options, sizes, folder, monkeypatch):
    seen = []

    def spy(model, loader, val_loader, config, **more):
        seen.append(((loader.num_images, val_loader.num_images), config.restore))
        return learn(model, loader, val_loader, config, **more)

    learn = pfs.train
    monkeypatch.setattr(pfs, "train", spy)
    assert search("--val", "12", "--validate") == 0
    assert train(*options) == 0
    assert seen == [(sizes, "best" if options else "last")]
    history = json.loads((folder / "runs/tiny/history.json").read_text())
    assert history["accuracy"]["images"] == "test" and history["accuracy"]["n"] == 15


def test_data_without_test_images_are_judged_by_training_images(folder, capsys):
    assert search("--data", "no_test.npz") == 0
    assert train() == 0
    assert "top-1 (training)" in capsys.readouterr().out


def test_reference_base_is_the_network_before_widening(folder, capsys):
    arguments = ["--model", "resnet20", "--expansion", "1.25", "--reference", "base"]
    assert search(*arguments, "--max-steps", "1") == 0
    record = json.loads((folder / "runs/tiny/run.json").read_text())
    base = pfs.count(pfs.models.resnet20(3), torch.zeros(1, 3, 8, 8))
    structure = pfs.Structure.from_json((folder / "runs/tiny/structure.json").read_text())
    assert record["reference"] == [base.macs, base.params]
    assert structure.macs <= base.macs // 2 < structure.base_macs // 2
    assert f"of the reference's {base.macs:,} MACs" in capsys.readouterr().out


def test_same_seed_gives_the_same_search(searched):
    first = (searched / "structure.json").read_text()
    assert search("--overwrite") == 0
    assert (searched / "structure.json").read_text() == first


def test_checkpoint_goes_on_with_a_search_that_was_stopped(folder, monkeypatch, capsys):
    stop_after_first_epoch(monkeypatch)
    assert search("--checkpoint") == 130
    assert "interrupted" in capsys.readouterr().err
    assert not (folder / "runs/tiny/run.json").exists()
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert search("--checkpoint") == 0
    resumed = (folder / "runs/tiny/structure.json").read_text()
    assert search("--out", "runs/whole") == 0
    assert resumed == (folder / "runs/whole/structure.json").read_text()


def stop_after_first_epoch(monkeypatch) -> None:
    from pfs_fast.checkpoint import Checkpoint

    save = Checkpoint.save

    def save_and_stop(self) -> None:
        save(self)
        raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save_and_stop)


# --- info -------------------------------------------------------------------------------------------------------------


def test_info_tells_what_is_installed(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "cpu ops" in out and "resnet110" in out and "digits" in out


def test_info_tells_what_a_network_costs(capsys):
    assert main(["info", "--model", "resnet20"]) == 0
    out = capsys.readouterr().out
    assert "40,813,184" in out and "9 channel groups, 336 gates (scope paper)" in out


def test_info_reads_every_file_of_a_run(searched, capsys):
    assert search("--overwrite", "--checkpoint") == 0
    assert train() == 0
    capsys.readouterr()
    expected = {
        "search.safetensors": "held whole",
        "slim.safetensors": "test images",
        "structure.json": "MACs",
        "checkpoint.safetensors": "after epoch 2",
        "run.json": "tiny_network:make",
        "history.json": "val_accuracy",
    }
    assert {p.name for p in searched.iterdir()} == set(expected)
    for name, text in expected.items():
        assert main(["info", str(searched / name)]) == 0
        assert text in capsys.readouterr().out, name
    assert main(["info", str(searched)]) == 0
    assert "search of tiny_network:make" in capsys.readouterr().out


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


# --- inputs -----------------------------------------------------------------------------------------------------------


def test_model_arguments_are_python_values_or_text(capsys):
    assert (
        main(["info", "--model", "tiny_network:make", "--model-arg", "width=4", "--input", "3x8x8"])
        == 0
    )
    assert "12 gates" in capsys.readouterr().out


def test_imagefolder_is_two_words_or_a_path(folder):
    image = pytest.importorskip("PIL.Image")
    for label in "ab":
        (folder / "pictures" / label).mkdir(parents=True)
        for i in range(3):
            image.new("RGB", (12, 10), (i, 0, 0)).save(folder / "pictures" / label / f"{i}.png")
    for spec in (DataSpec("imagefolder", "pictures", 8, 1), DataSpec("pictures", None, 8, 1)):
        splits = spec.splits()
        assert splits.num_classes == 2 and len(splits.val) == 2
        assert splits.train.images.shape == (4, 3, 8, 8)


def test_main_takes_the_arguments_of_the_process(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pfs-fast", "--version"])
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    assert main() == 0
    assert sys.stdout.getvalue().startswith("pfs_fast ")
