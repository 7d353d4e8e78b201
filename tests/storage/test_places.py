"""Where files cannot be: nodes, folders, closed and missing places, full disks; and what killed writers leave behind."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import pfs_fast as pfs
from pfs_fast.errors import FileFormatError, FileWriteError, PfsError
from pfs_fast.storage import files
from pfs_fast.storage.files import read_text, write_text_atomic

# Nodes


def make_fifo(path: Path) -> None:
    os.mkfifo(path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # the name of a socket has at most some 100 bytes
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)


def make_device(path: Path) -> None:
    try:
        os.mknod(path, 0o600 | stat.S_IFCHR, os.makedev(1, 3))
    except PermissionError:
        pytest.skip("only root may make devices")


NODES = {"a FIFO": make_fifo, "a socket": make_socket, "a device": make_device}
WRITERS = {
    "save": lambda path: pfs.save(nn.Linear(2, 2), path),
    "export": lambda path: pfs.export(nn.Linear(2, 2), path, torch.zeros(1, 2)),
    "text": lambda path: write_text_atomic(path, "text"),
}


@pytest.mark.parametrize("linked", [False, True])
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("kind", NODES)
def test_a_node_is_not_replaced(tmp_path: Path, kind: str, write: str, linked: bool):
    node = path = tmp_path / "node.pt2"
    NODES[kind](node)
    if linked:
        path = tmp_path / "link.pt2"
        path.symlink_to(node)
    before = node.lstat()
    with pytest.raises(FileWriteError, match=rf"path must be a file, got {kind} in .*choose"):
        WRITERS[write](path)
    assert (node.lstat().st_ino, node.lstat().st_mode) == (before.st_ino, before.st_mode)
    assert path.is_symlink() == linked
    assert {entry.name for entry in tmp_path.iterdir()} == {"node.pt2", path.name}


@pytest.mark.parametrize("kind", NODES)
def test_a_node_is_not_read(tmp_path: Path, kind: str):
    NODES[kind](tmp_path / "node")
    with pytest.raises(FileFormatError, match=f"it is {kind}"):
        pfs.load(tmp_path / "node", nn.Linear(2, 2))
    with pytest.raises(FileFormatError, match=f"it is {kind}"):
        read_text(tmp_path / "node", "read")


# Paths

BAD_PATHS = {
    "through a file": lambda folder: folder / "file" / "net.pt2",
    "too long": lambda folder: folder / ("x" * 300 + ".pt2"),
    "with a NUL": lambda folder: f"{folder}/a\0b.pt2",
    "with half a character": lambda folder: f"{folder}/a\ud800.pt2",
    "round in circles": lambda folder: folder / "circle.pt2",
    "a number": lambda folder: 12345,
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("text")
    (tmp_path / "circle.pt2").symlink_to(tmp_path / "circle.pt2")
    return tmp_path


@pytest.mark.parametrize("write", ["save", "text"])
@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_no_file_can_have_is_a_write_error(folder: Path, path: str, write: str):
    with pytest.raises(FileWriteError, match="path must"):
        WRITERS[write](BAD_PATHS[path](folder))
    assert {entry.name for entry in folder.iterdir()} == {"file", "circle.pt2"}
    assert (folder / "circle.pt2").is_symlink()


@pytest.mark.parametrize("path", BAD_PATHS)
def test_a_path_that_no_file_can_have_is_a_format_error(folder: Path, path: str):
    for read in (
        lambda bad: pfs.load(bad, nn.Linear(2, 2)),
        pfs.SearchResult.load,
        pfs.SearchResults.load,
        lambda bad: read_text(bad, "read"),
    ):
        with pytest.raises(FileFormatError, match="must be a"):
            read(BAD_PATHS[path](folder))


def test_a_closed_folder_is_a_pfs_error(tmp_path: Path, monkeypatch):
    """As for a folder of another user; root is let in everywhere, so the system's answer is put in its place."""
    real = os.stat

    def closed(path, *rest, **more):
        if isinstance(path, str | os.PathLike) and "theirs" in os.fspath(path):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return real(path, *rest, **more)

    monkeypatch.setattr(os, "stat", closed)
    place = tmp_path / "theirs" / "net.pt2"
    with pytest.raises(FileWriteError, match="Permission denied"):
        pfs.save(nn.Linear(2, 2), place)
    for read in (lambda path: pfs.load(path, nn.Linear(2, 2)), pfs.SearchResult.load):
        with pytest.raises(FileFormatError, match="Permission denied"):
            read(place)


def test_the_longest_name_of_a_file_can_be_written(tmp_path: Path):
    path = tmp_path / ("ü" * 127)
    write_text_atomic(path, "text")
    assert path.read_text() == "text" and list(tmp_path.iterdir()) == [path]


# Full disks

FULL_DISK = """
import resource, sys, torch
from torch import nn
import pfs_fast as pfs
model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
if sys.argv[1].endswith(".safetensors"):
    write = lambda: pfs.save(model, sys.argv[1])
else:
    write = lambda: pfs.export(model, sys.argv[1], torch.zeros(1, 64))
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    write()
except pfs.errors.FileWriteError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.mark.parametrize("name", ["net.pt2", "net.onnx", "net.safetensors"])
def test_a_file_that_cannot_be_written_to_its_end_is_a_write_error(tmp_path: Path, name: str):
    if name.endswith("onnx"):
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnx")
    (tmp_path / name).write_text("old")
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, name], cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode == 1, run.stderr  # not ended by a signal
    assert "refused: " in run.stderr and "path must be writable, got" in run.stderr
    assert (tmp_path / name).read_text() == "old"
    assert os.listdir(tmp_path) == [name]


# Killed writers

WRITER = """
import sys, time
from pfs_fast.storage.files import atomic_write

def write(temporary):
    temporary.write_text("half")
    print("writing", flush=True)
    sys.stdin.read()

atomic_write(sys.argv[1], write, "writer")
"""


def start_writer(path: Path) -> subprocess.Popen[str]:
    writer = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout.readline() == "writing\n"
    return writer


def test_what_a_killed_writer_left_goes_and_a_live_writers_file_stays(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    killed, live = start_writer(path), start_writer(path)
    with killed, live:
        assert len(list(tmp_path.iterdir())) == 2
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        other = tmp_path / "other.safetensors"
        write_text_atomic(other, "of another name")
        assert len(list(tmp_path.iterdir())) == 3  # what the other two left is not its business
        write_text_atomic(path, "new")
        assert (
            len(list(tmp_path.iterdir())) == 3
        )  # the file, the other, and the live writer's folder
        live.stdin.close()
        assert live.wait() == 0
    assert path.read_text() == "half"
    assert set(tmp_path.iterdir()) == {path, other}


def test_files_that_only_look_left_behind_stay(tmp_path: Path):
    path = tmp_path / "net"
    names = [".net.0123456789ab", ".net.0123456789abc", ".net.keep", ".net.backup.0123456789ab"]
    for name in names:
        (tmp_path / name).write_text("mine")
    write_text_atomic(path, "new")
    assert {entry.name for entry in tmp_path.iterdir()} == {"net", *names}


def test_a_folder_taken_away_before_it_is_locked_is_made_anew(tmp_path: Path, monkeypatch):
    real, taken = files.lock_folder, []

    def slow(folder, *, wait):
        if wait and len(taken) < 2:
            taken.append(folder)
            if len(taken) == 1:
                os.rmdir(folder)
            else:
                lock = real(folder, wait=wait)
                os.rmdir(folder)
                return lock
        return real(folder, wait=wait)

    monkeypatch.setattr(files, "lock_folder", slow)
    write_text_atomic(tmp_path / "net", "new")
    assert len(taken) == 2 and os.listdir(tmp_path) == ["net"]


def test_a_file_system_without_locks_is_written_to(tmp_path: Path, monkeypatch):
    left = tmp_path / ".net.0123456789ab"
    left.mkdir()
    (left / "net").write_text("perhaps of a live writer")

    def refuse(folder, *, wait):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(files, "lock_folder", refuse)
    write_text_atomic(tmp_path / "net", "new")
    assert (tmp_path / "net").read_text() == "new" and (left / "net").exists()


# Headers


def header_of(length: int, text: bytes) -> bytes:
    return length.to_bytes(8, "little") + text


def test_a_header_beyond_all_reason_is_not_parsed(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    length = files.MAX_JSON_BYTES + 1
    with path.open("wb") as file:
        file.write(header_of(length, b'{"__metadata__":{"pfs_fast":"['))
        file.truncate(8 + length)  # sparse
    with pytest.raises(FileFormatError, match=r"its header has 33,554,433 bytes of at most 33,5"):
        pfs.load(path, nn.Linear(2, 2))


def test_metadata_that_could_not_be_read_again_is_not_written(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(files, "MAX_JSON_BYTES", 5000)
    path = tmp_path / "net.safetensors"
    with pytest.raises(
        FileWriteError, match=r"its header would have [\d,]+ bytes of at most 5,000"
    ):
        pfs.save(nn.Linear(2, 2), path, metadata={"note": "x" * 5000})
    assert not list(tmp_path.iterdir())


def test_text_beyond_all_reason_is_not_read(tmp_path: Path):
    path = tmp_path / "structure.json"
    with path.open("wb") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    with pytest.raises(FileFormatError, match="more than 33,554,432 bytes"):
        read_text(path, "read")


# Checksums


def test_one_changed_bit_of_a_tensor_is_found(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    model = nn.Linear(3, 3)
    pfs.save(model, path)
    good = bytearray(path.read_bytes())
    for bit in (0, 5, 8 * 20 + 3):
        bad = bytearray(good)
        bad[-1 - bit // 8] ^= 1 << (bit % 8)
        path.write_bytes(bad)
        with pytest.raises(FileFormatError, match="checksum that it was written with"):
            pfs.load(path, model)
    path.write_bytes(good)
    assert torch.equal(pfs.load(path, nn.Linear(3, 3)).weight, model.weight)


def test_a_changed_number_of_the_metadata_is_found(tmp_path: Path):
    path = tmp_path / "net.safetensors"
    pfs.save(nn.Linear(3, 3), path, metadata={"accuracy": 0.25})
    path.write_bytes(path.read_bytes().replace(b"0.25", b"0.99"))
    with pytest.raises(PfsError, match="checksum that it was written with"):
        pfs.load(path, nn.Linear(3, 3))
