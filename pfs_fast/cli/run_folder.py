"""The folder of a search: what its files are called, and the record from which a later command rebuilds the rest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..budgets.structure import Structure
from ..errors import ConfigError, FileFormatError, FileWriteError
from ..storage.files import write_text_atomic
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
            return cls(
                ModelSpec(**document["model"]),
                DataSpec(**document["data"]),
                (int(macs), int(params)),
                dict(document["arguments"]),
                dict(document["versions"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"train: '{path}' must hold a whole record, got {type(error).__name__}: {error}; search again"
            ) from error


def new_folder(path: Path, overwrite: bool) -> Path:
    """Makes the folder of a search; refuses one that holds a finished search.

    Raises:
        ConfigError: There is a search in it already.
        FileWriteError: It cannot be made.
    """
    if (path / RECORD).exists() and not overwrite:
        raise ConfigError(
            f"search: --out must be a folder without a search, got '{path}'; name another one, or add --overwrite"
        )
    return make_folder(path, "search")


def make_folder(path: Path, command: str) -> Path:
    """Makes a folder where there is none yet."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileWriteError(
            f"{command}: --out must be a folder that can be made, got '{path}' ({error.strerror}); name another one"
        ) from error
    return path


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileFormatError: The file is missing, or holds something else.
    """
    try:
        document = json.loads(_read_text(path))
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
        return Structure.from_json(_read_text(path))
    except FileFormatError as error:
        raise FileFormatError(f"'{path}': {error}") from error


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise FileFormatError(
            f"read: '{path}' must be a readable file, got an error ({reason}); check the path"
        ) from error
