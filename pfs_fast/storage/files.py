"""Files that are whole or absent, and that never run code when read: safetensors with JSON metadata."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ..errors import FileFormatError, FileWriteError

METADATA_KEY = "pfs_fast"
"""Key of the safetensors header under which the JSON metadata of this package stands."""

_PICKLE_STARTS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
_MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors format itself


def atomic_write(
    path: str | os.PathLike[str], write: Callable[[Path], object], caller: str
) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then puts it in place in one step.

    Whatever happens, ``path`` holds either its old content or the whole new one, and no temporary file stays. A symbolic link
    is followed; the permissions of an existing file are kept.

    Args:
        path: Where the file shall be.
        write: Receives the path of the temporary file, which exists and is empty and has the suffix of ``path``.
        caller: Name of the public function for the error message.

    Raises:
        FileWriteError: The folder is missing or not writable, ``path`` is a folder, or the disk is full.
    """
    target = Path(os.path.realpath(path))
    if target.is_dir():
        raise FileWriteError(f"{caller}: path must be a file, got the folder '{path}'; add a name")
    if not target.parent.is_dir():
        raise FileWriteError(
            f"{caller}: path must lie in an existing folder, got '{path}'; create '{target.parent}'"
        )
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(6)}{target.suffix}")
    try:
        try:
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
            raise FileWriteError(
                f"{caller}: path must be writable, got '{path}' ({_reason(error)}); "
                "nothing was changed there, check permissions and free space"
            ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        _flush_to_disk(target.parent)


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
    """Writes tensors and JSON metadata to one safetensors file, whole or not at all.

    The file opens with ``safetensors.torch.load_file`` too. Tensors that share memory are stored once each.

    Args:
        path: Target file.
        tensors: Any device and strides; stored contiguous.
        metadata: Anything that JSON can hold; must have "format" (str) and "version" (int), which `read_safetensors` checks.
        caller: Name of the public function for error messages.

    Raises:
        FileWriteError: As in `atomic_write`.
    """
    if not isinstance(metadata.get("format"), str) or not isinstance(metadata.get("version"), int):
        raise TypeError(f"{caller}: metadata must have a str 'format' and an int 'version'")
    header = {METADATA_KEY: json.dumps(dict(metadata), allow_nan=False)}
    stored = _separate(tensors)

    def write(temporary: Path) -> None:
        safetensors.torch.save_file(stored, temporary, metadata=header)

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
        FileFormatError: The file is missing, truncated, not safetensors, of another format or of a newer version.
    """
    metadata = read_metadata(path, caller=caller)
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
            return {name: file.get_tensor(name) for name in file.keys()}, metadata  # noqa: SIM118
    except (OSError, safetensors.SafetensorError) as error:
        raise _unreadable(path, caller, _reason(error)) from error


def read_metadata(path: str | os.PathLike[str], *, caller: str = "read_metadata") -> dict[str, Any]:
    """Reads only the metadata of a file of `write_safetensors`: "format", "version" and what belongs to them.

    Raises:
        FileFormatError: The file is missing, truncated, not safetensors, or of another program.
    """
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
        metadata = json.loads(header[METADATA_KEY])
    except ValueError as error:
        raise _unreadable(path, caller, "its metadata is not JSON") from error
    if not (
        isinstance(metadata, dict)
        and isinstance(metadata.get("format"), str)
        and isinstance(metadata.get("version"), int)
    ):
        raise _unreadable(path, caller, "its metadata has no format and version")
    return metadata


def _check_form(path: str | os.PathLike[str], caller: str) -> None:
    """Names the usual mistakes, which the safetensors reader would report as a broken header."""
    target = Path(path)
    if target.is_dir():
        raise _unreadable(path, caller, "it is a folder")
    try:
        size = target.stat().st_size
        with target.open("rb") as file:
            start = file.read(8)
            length = int.from_bytes(start, "little")
            plausible = len(start) == 8 and length <= _MAX_HEADER_BYTES
            header = file.read(length) if plausible else b""
    except FileNotFoundError as error:
        raise _unreadable(path, caller, "there is no such file") from error
    except OSError as error:
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


def _is_cut(header: bytes, length: int, size: int) -> bool:
    if len(header) < length:
        return True
    try:
        entries = json.loads(header)
        ends = [entry["data_offsets"][1] for name, entry in entries.items() if name[:2] != "__"]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError):
        return False
    return 8 + length + max(ends, default=0) > size


def _separate(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory: the format has no views."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().resolve_conj().resolve_neg().contiguous()
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


def _reason(error: Exception) -> str:
    number = getattr(error, "errno", None)
    return os.strerror(number) if number in errno.errorcode else str(error) or type(error).__name__
