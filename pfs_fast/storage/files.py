"""Files that are whole or absent, and that never run code when read: safetensors with JSON metadata."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from .._json import parse_json
from ..errors import FileFormatError, FileWriteError

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked and nothing that was left behind is removed
    fcntl = None

METADATA_KEY = "pfs_fast"
"""Key of the safetensors header under which the JSON metadata of this package stands."""

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_CHECKSUM_KEY = "pfs_fast.sha256"
MAX_JSON_BYTES = 32 * 2**20  # the parsed text takes up to 25 times as much memory

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


def atomic_write(
    path: str | os.PathLike[str], write: Callable[[Path], object], caller: str
) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then puts it in place in one step.

    Whatever happens, ``path`` holds either its old content or the whole new one, and no temporary file stays but of a process
    that was killed; the next writer of the same file removes those. A symbolic link is followed; the permissions of an existing
    file are kept.

    Args:
        path: Where the file shall be.
        write: Receives the path of the temporary file, which exists and is empty and has the suffix of ``path``.
        caller: Name of the public function for the error message.

    Raises:
        FileWriteError: As in `writable_target`, or the disk is full.
    """
    target = writable_target(path, caller)
    try:
        with _private_folder(target) as folder:
            temporary = folder / target.name
            # O_EXCL: never write through a link that somebody else put there. 0o666 is cut by the user's umask.
            descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
            mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
            os.close(descriptor)
            write(temporary)
            _flush_to_disk(temporary)
            # A library may have put its own private file in place of the empty one.
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode) if target.exists() else mode)
            os.replace(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        raise _unwritable(path, caller, "path", error) from error
    with contextlib.suppress(OSError):
        _flush_to_disk(target.parent)


def writable_target(path: str | os.PathLike[str], caller: str, argument: str = "path") -> Path:
    """The file behind ``path``, links followed, if a file may be there.

    Args:
        path: A file or nothing yet.
        caller: Name of the public function for the error message.
        argument: Name of ``path`` there.

    Raises:
        FileWriteError: The folder is missing or closed; ``path`` is a folder, device, FIFO or socket, or no name for a file.
    """
    try:
        target = Path(os.path.realpath(path))
        kind = _kind(path)
        parent = _kind(target.parent)
    except (OSError, TypeError, ValueError) as error:
        raise _unwritable(path, caller, argument, error) from error
    if kind == "a folder":
        raise FileWriteError(
            f"{caller}: {argument} must be a file, got the folder '{path}'; add a name"
        )
    if kind not in (None, "a file"):
        raise FileWriteError(
            f"{caller}: {argument} must be a file, got {kind} in '{path}'; choose another name"
        )
    if parent != "a folder":
        raise FileWriteError(
            f"{caller}: {argument} must lie in an existing folder, got '{path}'; create '{target.parent}'"
        )
    return target


def write_text_atomic(
    path: str | os.PathLike[str], text: str, *, caller: str = "write_text_atomic"
) -> None:
    """Writes ``text`` in UTF-8, whole or not at all. Errors as in `atomic_write`."""
    atomic_write(path, lambda temporary: temporary.write_bytes(text.encode()), caller)


def write_safetensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    caller: str = "write_safetensors",
) -> None:
    """Writes tensors and JSON metadata with a checksum of both to one safetensors file, whole or not at all.

    The file opens with ``safetensors.torch.load_file`` too. Tensors that share memory are stored once each.

    Args:
        path: Target file.
        tensors: Any device and strides; stored contiguous.
        metadata: Anything that JSON can hold; must have "format" (str) and "version" (int), which `read_safetensors` checks.
        caller: Name of the public function for error messages.

    Raises:
        FileWriteError: As in `atomic_write`, or the header would be larger than ``MAX_JSON_BYTES``.
    """
    if not isinstance(metadata.get("format"), str) or not isinstance(metadata.get("version"), int):
        raise TypeError(f"{caller}: metadata must have a str 'format' and an int 'version'")
    text = json.dumps(dict(metadata), allow_nan=False)
    stored = _separate(tensors)
    header = {METADATA_KEY: text, _CHECKSUM_KEY: _checksum(text, stored)}

    def write(temporary: Path) -> None:
        safetensors.torch.save_file(stored, temporary, metadata=header)
        with temporary.open("r+b") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise OSError(
                    f"its header would have {length:,} bytes of at most {MAX_JSON_BYTES:,}"
                )
            ordered = _ordered(file.read(length))
            file.seek(8)
            file.write(ordered)

    atomic_write(path, write, caller)


def read_safetensors(
    path: str | os.PathLike[str],
    format_name: str,
    version: int,
    *,
    caller: str = "read_safetensors",
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads a file of `write_safetensors`.

    Args:
        path: The file.
        format_name: The "format" that the file must have.
        version: The newest "version" that the caller understands; older ones are returned for the caller to handle.
        caller: Name of the public function for error messages.

    Returns:
        The tensors, on the CPU, and the metadata.

    Raises:
        FileFormatError: The file is missing, truncated, changed since it was written, not safetensors, of another format or of
            a newer version. Files without a checksum, which older releases wrote, are read as they are.
    """
    header, metadata = _read_header(path, caller)
    if metadata["format"] != format_name:
        raise FileFormatError(
            f"{caller}: path must be a file of format '{format_name}', got '{path}' of format "
            f"'{metadata['format']}'; open it with the function that belongs to that format"
        )
    if metadata["version"] > version:
        raise FileFormatError(
            f"{caller}: path must be of version {version} or older, got '{path}' of version "
            f"{metadata['version']}; update pfs_fast"
        )
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, caller, _reason(error)) from error
    if header.get(_CHECKSUM_KEY, "") not in ("", _checksum(header[METADATA_KEY], tensors)):
        raise _unreadable(
            path, caller, "its content does not have the checksum that it was written with"
        )
    return tensors, metadata


def read_metadata(path: str | os.PathLike[str], *, caller: str = "read_metadata") -> dict[str, Any]:
    """Reads only the metadata of a file of `write_safetensors`: "format", "version" and what belongs to them.

    Raises:
        FileFormatError: The file is missing, truncated, not safetensors, or of another program.
    """
    return _read_header(path, caller)[1]


def read_text(path: str | os.PathLike[str], caller: str) -> str:
    """The text of a file in UTF-8.

    Raises:
        FileFormatError: The file is missing, closed, no regular file, larger than ``MAX_JSON_BYTES``, or no text.
    """
    try:
        kind = _kind(path)
        if kind not in (None, "a file"):
            reason = f"it is {kind}"
        else:
            with open(path, "rb") as file:
                content = file.read(MAX_JSON_BYTES + 1)
            if len(content) <= MAX_JSON_BYTES:
                return content.decode("utf-8")
            reason = f"it has more than {MAX_JSON_BYTES:,} bytes"
    except UnicodeDecodeError:
        reason = "it is not text"
    except (OSError, TypeError, ValueError) as error:
        reason = _reason(error)
    raise FileFormatError(
        f"{caller}: '{path}' must be a readable file, got an error ({reason}); check the path"
    )


def lock_folder(folder: str | os.PathLike[str], *, wait: bool) -> int:
    """Locks a folder against other holders of its lock, until the descriptor is closed or the process ends.

    Returns:
        The descriptor.

    Raises:
        BlockingIOError: Somebody else holds the lock, and ``wait`` is False.
        OSError: There is no such folder, or its file system has no locks.
    """
    if fcntl is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def _private_folder(target: Path) -> Iterator[Path]:
    """An empty folder beside ``target``, locked while this process works in it, and removed with what it holds.

    A process that is killed leaves its folder and loses the lock, which tells the next writer what it may remove.
    """
    prefix = "." + os.fsdecode(os.fsencode(target.name)[:200]) + "."
    _remove_abandoned(target.parent, prefix)
    lock = None
    while lock is None:
        folder = target.with_name(prefix + secrets.token_hex(6))
        os.mkdir(folder, 0o700)
        try:
            lock = lock_folder(folder, wait=True)
        except FileNotFoundError:
            continue
        except OSError:
            break  # a file system without locks, on which nobody can take the folder for an abandoned one
        if not folder.exists():  # somebody took it for an abandoned one before it was locked
            os.close(lock)
            lock = None
    try:
        yield folder
    finally:
        with contextlib.suppress(OSError):
            _remove(folder)
        if lock is not None:
            os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Removes the folders of writers that were killed: those whose lock can be had."""
    try:
        names = os.listdir(parent)
    except OSError:  # one may write into a folder that one may not list
        return
    for name in names:
        if name.startswith(prefix) and re.fullmatch("[0-9a-f]{12}", name[len(prefix) :]):
            with contextlib.suppress(OSError):
                lock = lock_folder(parent / name, wait=False)
                try:
                    if os.fstat(lock).st_uid == os.geteuid():
                        _remove(parent / name)
                finally:
                    os.close(lock)


def _remove(folder: Path) -> None:
    for entry in os.scandir(folder):
        os.unlink(entry)
    os.rmdir(folder)


def _kind(path: str | os.PathLike[str]) -> str | None:
    """What a path leads to, "a file" where it is a regular one; None: nothing."""
    try:
        return _KINDS.get(stat.S_IFMT(os.stat(os.fspath(path)).st_mode), "a file")
    except (FileNotFoundError, NotADirectoryError):
        return None


def _ordered(header: bytes) -> bytes:
    """A safetensors header with its texts in one order, so that equal contents make equal files. The library's is chance."""
    entries = json.loads(header)
    texts = dict(sorted(entries.pop("__metadata__").items()))
    same = {"__metadata__": texts, **entries}
    found = json.dumps(same, separators=(",", ":"), ensure_ascii=False).encode().ljust(len(header))
    return found if len(found) == len(header) else header


def _checksum(text: str, tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _read_header(
    path: str | os.PathLike[str], caller: str
) -> tuple[dict[str, str], dict[str, Any]]:
    """The texts of a file's header, and the metadata among them."""
    _check_form(path, caller)
    try:
        with safetensors.safe_open(os.fspath(path), framework="pt") as file:
            header = file.metadata() or {}
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, caller, _reason(error)) from error
    if METADATA_KEY not in header:
        raise FileFormatError(
            f"{caller}: path must be a file that pfs_fast wrote, got '{path}', a safetensors file of another program; "
            "read it with safetensors.torch.load_file"
        )
    try:
        metadata = parse_json(header[METADATA_KEY])
    except ValueError as error:
        raise _unreadable(path, caller, f"its metadata is not JSON: {error}") from error
    if not (
        isinstance(metadata, dict)
        and isinstance(metadata.get("format"), str)
        and type(metadata.get("version")) is int
    ):
        raise _unreadable(path, caller, "its metadata has no format and version")
    return header, metadata


def _check_form(path: str | os.PathLike[str], caller: str) -> None:
    """Names the usual mistakes, which the safetensors reader would report as a broken header."""
    try:
        kind = _kind(path)
        if kind not in (None, "a file"):  # a FIFO would wait for a writer
            raise OSError(f"it is {kind}")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(8)
            length = int.from_bytes(start, "little")
            plausible = len(start) == 8 and length <= MAX_JSON_BYTES
            header = file.read(length) if plausible else b""
    except FileNotFoundError as error:
        raise _unreadable(path, caller, "there is no such file") from error
    except (OSError, TypeError, ValueError) as error:
        raise _unreadable(path, caller, _reason(error)) from error
    if size == 0:
        raise _unreadable(path, caller, "it is empty")
    if start.startswith(_PICKLE_STARTS):
        raise _unreadable(
            path,
            caller,
            "it is a pickle or a zip archive as torch.save writes it, which may run code and is never read here",
        )
    if size < 8 or (plausible and header.startswith(b"{") and _is_cut(header, length, size)):
        raise _unreadable(path, caller, f"it is truncated after {size} bytes")
    if not plausible:
        raise _unreadable(
            path, caller, f"its header has {length:,} bytes of at most {MAX_JSON_BYTES:,}"
        )


def _is_cut(header: bytes, length: int, size: int) -> bool:
    if len(header) < length:
        return True
    try:
        entries = parse_json(header.decode())
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    return 8 + length + max(ends, default=0) > size


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory: the format has no views."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
        storage = tensor.untyped_storage()
        whole = storage.nbytes() == tensor.numel() * tensor.element_size()
        if not whole or storage.data_ptr() in seen:
            tensor = tensor.clone(memory_format=torch.contiguous_format)
        seen.add(tensor.untyped_storage().data_ptr())
        stored[name] = tensor
    return stored


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreadable(path: str | os.PathLike[str], caller: str, reason: str) -> FileFormatError:
    return FileFormatError(
        f"{caller}: path must be a whole safetensors file that pfs_fast wrote, got '{path}' ({reason}); "
        "check the path, or write the file again"
    )


def _unwritable(
    path: str | os.PathLike[str], caller: str, argument: str, error: Exception
) -> FileWriteError:
    return FileWriteError(
        f"{caller}: {argument} must be writable, got '{path}' ({_reason(error)}); "
        "nothing was changed there, check permissions and free space"
    )


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number in errno.errorcode else str(error) or type(error).__name__
