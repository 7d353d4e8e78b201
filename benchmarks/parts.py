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
    """What ``compute`` gives, or gave in an earlier run on the same kind of machine with the same ``key``.

    The commit is no part of that: to measure again, delete the folder. ``measured_commit`` and ``measured_date`` tell of which one
    a part is.

    Args:
        name: Of the file, without suffix.
        key: Everything that the result depends on.
        compute: Gives what JSON can hold.

    Returns:
        The result, with ``measured_commit`` and ``measured_date``.
    """
    machine = settings.machine
    kind = {name: getattr(machine, name) for name in ("device", "cpu", "threads", "torch")}
    key = json.loads(json.dumps({**kind, "data": settings.data[0], **key}))
    path = settings.parts / f"{name}.json"
    if path.exists():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["key"] == key:
            print(f"  {name}: measured {found['machine']['date']}, {path}", flush=True)
            return _dated(found)
    result = {"key": key, "result": compute(), "machine": asdict(machine)}
    write_whole(path, json.dumps(result, indent=1).encode())
    print(f"  {name}: {path}", flush=True)
    return _dated(result)


def _dated(found: dict[str, Any]) -> dict[str, Any]:
    made = {f"measured_{name}": found["machine"][name] for name in ("commit", "date")}
    return {**found["result"], **made}


def write_whole(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(path.name + ".unfinished")
    unfinished.write_bytes(content)
    os.replace(unfinished, path)
