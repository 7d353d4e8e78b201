"""Finished parts of suites that take hours: each in a file of its own, so that many short runs add up to one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.settings import Settings


def part(
    settings: Settings, name: str, key: dict[str, Any], compute: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What ``compute`` gives as JSON can hold it, or gave earlier: see ``finished``."""
    found = finished(settings, name, key)
    if found is not None:
        return found
    result = {"key": _key(settings, key), "result": compute(), "machine": asdict(settings.machine)}
    path = _path(settings, name)
    write_whole(path, json.dumps(result, indent=1).encode())
    print(f"  {name}: {path}", flush=True)
    return _dated(result)


def finished(settings: Settings, name: str, key: dict[str, Any]) -> dict[str, Any] | None:
    """What ``part`` gave in an earlier run on the same kind of machine with the same ``key``, if it did.

    The commit is no part of the key: to measure again, delete the folder. ``measured_commit`` and ``measured_date`` tell of which
    one a part is.

    Args:
        name: Of the file, without suffix.
        key: Everything that the result depends on.

    Returns:
        The result, with ``measured_commit`` and ``measured_date``; None if there is none.
    """
    path = _path(settings, name)
    if not path.exists():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["key"] != _key(settings, key):
        return None
    print(f"  {name}: measured {found['machine']['date']}, {path}", flush=True)
    return _dated(found)


def _path(settings: Settings, name: str) -> Path:
    return settings.parts / f"{name}.json"


def _key(settings: Settings, key: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives it back."""
    machine = settings.machine
    kind = {name: getattr(machine, name) for name in ("device", "cpu", "threads", "torch")}
    return json.loads(json.dumps({**kind, "data": settings.data[0], **key}))


def _dated(found: dict[str, Any]) -> dict[str, Any]:
    made = {f"measured_{name}": found["machine"][name] for name in ("commit", "date")}
    return {**found["result"], **made}


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
