"""Files of a run folder are data: no command calls, imports, downloads or steers the terminal because a file says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from commands import search, train
from torch import nn

import pfs_fast as pfs
from pfs_fast.cli import main
from pfs_fast.cli.inputs import ModelSpec
from pfs_fast.cli.terminal import escaped

LISTED = ["--model", "resnet20", "--expansion", "0.25", "--max-steps", "1"]


@pytest.fixture
def listed(folder) -> Path:
    """A finished search of a network that run.json may name."""
    assert search(*LISTED) == 0
    return folder / "runs" / "tiny"


def change(file: Path, **changes: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def train_as_recorded(*more: str) -> int:
    return main(["train", "runs/tiny", "--epochs", "1", "--batch-size", "16", "--quiet", *more])


# Code

EVIL_MODULE = "open('imported', 'w').close()\ndef make(**_):\n    open('called', 'w').close()\n"
CODE = {
    "a function of the system": ("os:system", {"command": "touch called"}),
    "a module beside": ("evil:make", {}),
    "a module named like a package's": ("timm.evil:make", {}),
    "a function of torchvision's": ("torchvision.models:resnet18", {}),
    "a function of timm's": ("timm:create_model", {"model_name": "resnet18"}),
    "weights": ("torchvision:resnet18", {"weights": "DEFAULT"}),
    "weights of the backbone": (
        "torchvision:fcn_resnet50",
        {"weights_backbone": "IMAGENET1K_V1"},
    ),
    "pretrained": ("timm:resnet18", {"pretrained": True}),
    "a pretrained_cfg": ("timm:resnet18", {"pretrained_cfg": "hf-hub:someone/something"}),
    "a checkpoint": ("timm:resnet18", {"checkpoint_path": "weights.pth"}),
    "a cache": ("timm:resnet18", {"cache_dir": "elsewhere"}),
    "an unknown name": ("resnet21", {}),
    "an object": ("resnet20", {"num_classes": {"__class__": "evil"}}),
    "lists in lists": ("resnet20", {"num_classes": [[3]]}),
}


@pytest.mark.parametrize("case", CODE)
def test_train_calls_nothing_that_only_a_file_names(listed, case, capsys, monkeypatch):
    name, arguments = CODE[case]
    if name.startswith("timm"):
        pytest.importorskip("timm")
    Path("evil.py").write_text(EVIL_MODULE)
    Path("timm.py").write_text(EVIL_MODULE)
    change(listed / "run.json", model={"name": name, "arguments": arguments})
    capsys.readouterr()
    called = []
    monkeypatch.setattr(ModelSpec, "build", lambda self, seed=None: called.append(self))
    assert train_as_recorded() == 1
    error = capsys.readouterr().err
    assert "must name a network of pfs_fast, torchvision or timm with plain values" in error
    assert f"add --model {name}" in error
    assert not called and not Path("called").exists() and not Path("imported").exists()
    assert not (listed / "slim.safetensors").exists()


def test_the_command_line_may_name_what_a_file_may_not(folder, capsys):
    assert search("--model-arg", "width=4") == 0
    hint = "--model tiny_network:make --model-arg width=4"
    assert f"next: pfs-fast train runs/tiny {hint}\n" in capsys.readouterr().out
    assert train_as_recorded() == 1
    assert f"if you trust it, add {hint}\n" in capsys.readouterr().err
    assert train_as_recorded(*hint.split()) == 0
    slim = pfs.load(
        "runs/tiny/slim.safetensors", ModelSpec("tiny_network:make", {"width": 4}).build()
    )
    assert slim[0].out_channels <= 4


@pytest.mark.parametrize("name", ["resnet20", "torchvision:squeezenet1_1", "timm:test_resnet"])
def test_a_listed_network_is_built_from_its_record_without_the_current_folder(folder, name, capsys):
    if name.startswith("timm"):
        pytest.importorskip("timm")
    arguments = {"num_classes": 3}
    for module in ("timm", "torchvision", "evil"):
        Path(f"{module}.py").write_text(EVIL_MODULE)
    spec = ModelSpec(name, arguments)
    assert spec.is_plain()
    script = f"import sys; sys.path.remove(''); from pfs_fast.cli.inputs import ModelSpec; ModelSpec({name!r}, {arguments}).recorded('run.json').build()"
    paths = [str(Path(pfs.__file__).parents[1]), *filter(os.path.isabs, sys.path)]
    run = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert not Path("imported").exists()


@pytest.mark.filterwarnings("ignore:train. config.channels_last must be False on a CPU")
def test_a_recorded_listed_network_is_trained(listed, capsys):
    assert train_as_recorded() == 0
    model = pfs.models.resnet20(3, expansion=0.25)
    assert isinstance(pfs.load(listed / "slim.safetensors", model), nn.Module)


@pytest.mark.parametrize(
    "arguments", [{"num_classes": "many"}, {"num_classes": 2**62}, {"colour": 1}, {"expansion": -1}]
)
def test_arguments_that_the_recorded_network_does_not_take_are_an_error(listed, arguments, capsys):
    change(listed / "run.json", model={"name": "torchvision:resnet18", "arguments": arguments})
    assert train_as_recorded() == 1
    assert "arguments" in capsys.readouterr().err


DAMAGED = {
    "model": [5, {"name": 5, "arguments": {}}, {"name": "resnet20", "arguments": 5}],
    "data": [5, {"source": 5}, {"source": "digits", "size": 0}, {"source": "digits", "val": "a"}],
    "reference": [5, [1], [0, 5], ["a", "b"], [1.5, 2], [10**400, 1]],
    "arguments": [5, None],
    "versions": [[], "1"],
}


@pytest.mark.parametrize("key", DAMAGED)
def test_a_record_with_values_of_other_types_is_refused(listed, key, capsys):
    before = (listed / "run.json").read_text()
    for value in DAMAGED[key]:
        change(listed / "run.json", **{key: value})
        assert train_as_recorded() == 1 == main(["info", "runs/tiny"])
        assert capsys.readouterr().err.count("must hold a whole record") == 2, value
        (listed / "run.json").write_text(before)


# The terminal

TRICK = "\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e\u2028end"


def test_escaped_text_shows_what_it_holds():
    assert escaped(TRICK) == r"\x1b]0;owned\x07\x1b[2J\r\x9b31m\u202e\u2028end"
    assert escaped("a\nb ± ü\U0001f600") == "a\\nb ± ü\U0001f600"
    assert escaped("a\nb\t", keep="\n") == "a\nb\\t"
    assert escaped("half \ud800") == r"half \ud800"


def assert_harmless(capsys) -> None:
    captured = capsys.readouterr()
    shown = captured.out + captured.err
    assert "end" in shown and r"\x1b" in shown.replace(r"\u001b", r"\x1b")
    assert [char for char in shown if not char.isprintable() and char != "\n"] == []


def test_names_in_files_do_not_steer_the_terminal(listed, capsys):
    record, structure = listed / "run.json", listed / "structure.json"
    change(record, model={"name": TRICK, "arguments": {TRICK: TRICK}})
    for command in (["info", "runs/tiny"], ["info", "runs/tiny/run.json"], ["train", "runs/tiny"]):
        capsys.readouterr()
        main([*command, "--debug"])
        assert_harmless(capsys)
    structure.write_text(structure.read_text().replace("layer1.0.conv1", json.dumps(TRICK)[1:-1]))
    capsys.readouterr()
    main(["info", "runs/tiny/structure.json"])
    assert_harmless(capsys)
    change(structure, format=TRICK)
    main(["info", "runs/tiny/structure.json"])
    assert_harmless(capsys)


def test_names_in_model_files_do_not_steer_the_terminal(folder, capsys):
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.add_module(TRICK.replace(".", ""), nn.Linear(2, 2))

    Odd.__qualname__ = TRICK
    pfs.save(
        Odd(), "odd.safetensors", metadata={"accuracy": {"top1": 0.5, "n": 3, "images": TRICK}}
    )
    assert main(["info", "odd.safetensors"]) == 0
    assert_harmless(capsys)


@pytest.mark.parametrize(
    "user", [[], "text", {"accuracy": 5}, {"accuracy": {"top1": "high", "n": 1, "images": "x"}}]
)
def test_info_shows_a_network_with_other_metadata(folder, user, capsys):
    from pfs_fast.storage.files import read_safetensors, write_safetensors

    pfs.save(nn.Linear(2, 2), "net.safetensors")
    tensors, metadata = read_safetensors("net.safetensors", "pfs_fast.model", 1)
    write_safetensors("net.safetensors", tensors, {**metadata, "user": user})
    assert main(["info", "net.safetensors"]) == 0
    assert "linear  2 -> 2" in capsys.readouterr().out


@pytest.mark.parametrize("drop", ["class", "layers", "epoch", "steps"])
def test_info_refuses_files_that_lack_something(folder, drop, capsys):
    from pfs_fast.storage.files import write_safetensors

    kind = "pfs_fast.checkpoint" if drop in ("epoch", "steps") else "pfs_fast.model"
    metadata = {"format": kind, "version": 1, "class": "Net", "layers": {}, "epoch": 1, "steps": 2}
    del metadata[drop]
    write_safetensors("net.safetensors", {"a": torch.zeros(1)}, metadata)
    assert main(["info", "net.safetensors"]) == 1
    assert "info: path must" in capsys.readouterr().err


# Results that are there


def test_train_replaces_a_trained_network_only_if_told_to(searched, capsys):
    assert train() == 0
    before = (searched / "slim.safetensors").read_bytes()
    assert train("--seed", "1") == 1
    assert "--out must be a folder without slim.safetensors" in capsys.readouterr().err
    assert (searched / "slim.safetensors").read_bytes() == before
    assert train("--seed", "1", "--overwrite") == 0
    assert (searched / "slim.safetensors").read_bytes() != before


@pytest.mark.parametrize("command", [search, train])
def test_two_commands_do_not_write_to_one_folder_at_once(searched, command, capsys):
    from pfs_fast.storage.files import lock_folder

    lock = lock_folder(searched, wait=False)
    try:
        assert command("--overwrite") == 1
        assert "that no other command writes to now" in capsys.readouterr().err
    finally:
        os.close(lock)
    assert command("--overwrite") == 0


def test_a_folder_without_locks_is_used_with_a_warning(searched, monkeypatch, capsys):
    def refuse(folder, *, wait):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("pfs_fast.cli.run_folder.lock_folder", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert train() == 0
    assert "start no other command that writes there" in capsys.readouterr().err
