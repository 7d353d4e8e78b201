"""The folder of a search: what its files are called, and the record from which a later command rebuilds the rest."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .._json import parse_json
from ..budgets.structure import Structure
from ..errors import ConfigError, FileFormatError, FileWriteError
from ..storage.files import lock_folder, read_text, write_text_atomic
from .inputs import DataSpec, ModelSpec

FORMAT, VERSION = "pfs_fast.run", 1

RECORD = "run.json"
STRUCTURE = "structure.json"
SEARCH = "search.safetensors"
CHECKPOINT = "checkpoint.safetensors"
SLIM = "slim.safetensors"
HISTORY = "history.json"


@dataclass(frozen=True)
class Record:
    """What a search was run on.

    Attributes:
        model: The searched network.
        data: Its images.
        reference: ``(macs, params)`` that shares of the budget refer to.
        arguments: The other arguments of the command, for the reader.
        versions: Of pfs_fast and torch.
    """

    model: ModelSpec
    data: DataSpec
    reference: tuple[int, int]
    arguments: dict[str, Any]
    versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Writes run.json, whole or not at all."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        text = json.dumps(document, indent=2, default=str) + "\n"
        write_text_atomic(folder / RECORD, text, caller="search")

    @classmethod
    def read(cls, folder: Path) -> Record:
        """Reads run.json.

        Raises:
            FileFormatError: Missing, damaged, or of another version.
        """
        path = folder / RECORD
        document = read_json(path)
        if document.get("format") != FORMAT or document.get("version") != VERSION:
            found = f"{document.get('format')!r} {document.get('version')!r}"
            raise FileFormatError(
                f"train: '{path}' must be of format '{FORMAT}' {VERSION}, got {found}; search again with this release"
            )
        try:
            macs, params = document["reference"]
            record = cls(
                ModelSpec(**document["model"]),
                DataSpec(**document["data"]),
                (macs, params),
                document["arguments"],
                document["versions"],
            )
            _check_types(record)
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"train: '{path}' must hold a whole record, got {type(error).__name__}: {error}; search again"
            ) from error
        return record


def _check_types(record: Record) -> None:
    """Raises TypeError where a value of a record is of another type than the search wrote."""
    model, data = record.model, record.data
    objects = (model.arguments, record.arguments, record.versions)
    good = (
        isinstance(model.name, str)
        and all(isinstance(value, dict) for value in objects)
        and isinstance(data.source, str)
        and isinstance(data.path, str | None)
        and all(_is_whole(n, 1) for n in (*record.reference, 1 if data.size is None else data.size))
        and (data.val is None or _is_whole(data.val, 0))
    )
    if not good:
        raise TypeError("a value of another type than the search writes")


def _is_whole(value: Any, least: int) -> bool:
    return type(value) is int and least <= value < 2**63


@contextmanager
def held(paths: Sequence[Path], command: str, result: str, overwrite: bool) -> Iterator[None]:
    """Makes folders and holds them, so that no other command writes its results there at the same time.

    Args:
        paths: The folders.
        command: For messages.
        result: Name of the file that a finished command leaves there.
        overwrite: Whether that file may be there already.

    Raises:
        ConfigError: Another command holds one of them, or its result is there.
        FileWriteError: One cannot be made.
    """
    with ExitStack() as stack:
        for path in paths:
            _make(path, command)
            try:
                stack.callback(os.close, lock_folder(path.resolve(), wait=False))
            except BlockingIOError as error:
                raise ConfigError(
                    f"{command}: --out must be a folder that no other command writes to now, got '{path}'; wait for its end, "
                    "or name another one"
                ) from error
            except OSError as error:
                warnings.warn(
                    f"{command}: --out must lie on a file system with locks to be safe from other commands, got '{path}' "
                    f"({error.strerror}); start no other command that writes there",
                    UserWarning,
                    stacklevel=2,
                )
            if not overwrite and os.path.lexists(path / result):
                raise ConfigError(
                    f"{command}: --out must be a folder without {result}, got '{path}'; name another one, or add --overwrite"
                )
        yield


def _make(path: Path, command: str) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileWriteError(
            f"{command}: --out must be a folder that can be made, got '{path}' ({error.strerror}); name another one"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileFormatError: The file is missing, or holds something else.
    """
    try:
        document = parse_json(read_text(path, "read"))
    except FileFormatError:
        raise
    except ValueError as error:
        raise FileFormatError(
            f"read: '{path}' must be JSON, got an error ({error}); was it written to the end?"
        ) from error
    if not isinstance(document, dict):
        raise FileFormatError(
            f"read: '{path}' must hold a JSON object, got {type(document).__name__}; check the path"
        )
    return document


def read_structure(path: Path) -> Structure:
    """A structure's file.

    Raises:
        FileFormatError: The file is missing, or holds something else.
    """
    try:
        return Structure.from_json(read_text(path, "read"))
    except FileFormatError as error:
        raise FileFormatError(f"'{path}': {error}") from error
