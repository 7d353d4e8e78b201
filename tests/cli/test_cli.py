"""The command line, run in this process: main(argv) gives the exit code."""

from __future__ import annotations

import io
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from commands import BACKEND, TINY, search, train

import pfs_fast as pfs
from pfs_fast.cli import main
from pfs_fast.cli.inputs import DataSpec, ModelSpec
from pfs_fast.measuring import latency
from pfs_fast.measuring.timing import Timing

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


@pytest.mark.filterwarnings("always:SearchResult:UserWarning")  # printed, not raised
def test_search_keeps_the_gates_of_every_seed_when_the_machine_is_too_busy_to_measure(
    folder, monkeypatch, capsys
):
    state = {"spread": 0.0}

    def timer(tasks, samples):
        for task in tasks:
            task.run()
        return [Timing(2.0, state["spread"] if task.network else 0.0, 2.0) for task in tasks]

    def search_then_busy(*args, **options):
        found = real_search(*args, **options)
        state["spread"] = 2.0
        return found

    real_search = pfs.search
    monkeypatch.setenv("PFS_FAST_CACHE", str(folder / "cache"))
    monkeypatch.setattr(latency, "DeviceTimer", lambda device, threads: timer)
    monkeypatch.setattr(pfs, "search", search_then_busy)
    limit = ("--budget", "macs=0.5,latency_ms=3,device=cpu")
    assert search("--seeds", "0", "1", *limit) == 1
    shown = capsys.readouterr().err
    assert shown.count("the gates are written without it") == 2
    assert "error: latency: the machine must be quiet while it is measured" in shown
    for seed in (0, 1):
        own = folder / "runs" / "tiny" / f"seed{seed}"
        assert {p.name for p in own.iterdir()} == {"search.safetensors", "run.json"}
    state["spread"] = 0.0
    assert main(["train", "runs/tiny/seed1", *TINY, *limit, "--epochs", "1", "--quiet"]) == 0


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
    assert main(["train", "runs/tiny/seed0", *TINY, "--epochs", "1", "--quiet"]) == 0


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


def test_train_takes_a_network_that_flattens_with_view(folder):
    code = """
from torch import nn

class LeNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU())
        self.classifier = nn.Linear(256, 3)

    def forward(self, x):
        x = self.features(x)
        return self.classifier(x.view(x.size(0), -1))
"""
    (folder / "viewing.py").write_text(code)
    assert search("--model", "viewing:LeNet") == 0
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")
        assert train("--model", "viewing:LeNet") == 0
    assert pfs.load("runs/tiny/slim.safetensors", ModelSpec("viewing:LeNet").build())


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
    cut = ["train", "runs/limits", *TINY, "--epochs", "1", "--quiet", "--out", "runs/cut"]
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
    ("options", "sizes"), [([], (48, None)), (["--hold-out", "--restore", "best"], (36, 12))]
)
def test_hold_out_decides_what_is_trained_on_and_watched(options, sizes, folder, monkeypatch):
    seen = []

    def spy(model, loader, val_loader, config, **more):
        watched = None if val_loader is None else val_loader.num_images
        seen.append(((loader.num_images, watched), config.restore))
        return learn(model, loader, val_loader, config, **more)

    learn = pfs.train
    monkeypatch.setattr(pfs, "train", spy)
    assert search("--val", "12", "--validate") == 0
    assert train(*options) == 0
    assert seen == [(sizes, "best" if options else "last")]
    history = json.loads((folder / "runs/tiny/history.json").read_text())
    assert history["accuracy"]["images"] == "test" and history["accuracy"]["n"] == 15
    # Validation is what was held out: the test images are evaluated once, under their own name.
    assert all(("val_accuracy" in row) == bool(options) for row in history["history"])


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
    from pfs_fast.searching.checkpoint import Checkpoint

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
        "history.json": '"images": "test"',
    }
    assert {p.name for p in searched.iterdir()} == set(expected)
    for name, text in expected.items():
        assert main(["info", str(searched / name)]) == 0
        assert text in capsys.readouterr().out, name
    assert main(["info", str(searched)]) == 0
    assert "search of tiny_network:make" in capsys.readouterr().out


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
