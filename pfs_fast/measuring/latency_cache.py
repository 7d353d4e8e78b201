"""Measured times of layers on disk, so that a machine measures each of them once.

One JSON file for each machine, device, version of PyTorch and way of running, in ``$PFS_FAST_CACHE``, by default
``pfs_fast`` in the user's cache folder.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from .._json import parse_json
from ..budgets.deployment import Deployment
from ..errors import FileWriteError
from ..storage.files import read_text, write_text_atomic

FORMAT, VERSION = "pfs_fast.latency", 1

Points = dict[str, dict[str, float]]  # layer -> "in,out" channels -> milliseconds


def cache_folder() -> Path:
    """``$PFS_FAST_CACHE``, else ``pfs_fast`` in the user's cache folder."""
    chosen = os.environ.get("PFS_FAST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pfs_fast"


def machine_key(run: Deployment, input_shape: tuple[int, ...], layout: str) -> dict[str, Any]:
    """Everything that a time depends on besides the layer.

    Args:
        run: How the network runs.
        input_shape: Of one image, (C, H, W).
        layout: ``"contiguous"`` or ``"channels_last"``.
    """
    device = run.place()
    on_cuda = device.type == "cuda"
    key = {
        "machine": platform.node(),
        "device": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads() if run.threads is None else run.threads,
        "precision": run.precision,
        "batch": run.batch,
        "input_shape": list(input_shape),
        "layout": layout,
    }
    if on_cuda:
        key["cudnn"] = [torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32]
    return key


class LatencyCache:
    """The file of one machine key.

    A file that cannot be read, or is not what it should be, is reported by a warning and written anew; so is a folder that
    cannot be written to, and then nothing is kept.

    Args:
        key: As ``machine_key`` gives it.
        folder: Default: ``cache_folder()``.
    """

    def __init__(self, key: dict[str, Any], folder: str | os.PathLike[str] | None = None) -> None:
        self.key = key
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
        self.path = (cache_folder() if folder is None else Path(folder)) / f"latency-{digest}.json"
        self.points: Points = self._read()

    def add(self, points: Points) -> None:
        """Put points into the file, beside those that another process may have added meanwhile."""
        merged = self._read()
        for source in (self.points, points):
            for layer, times in source.items():
                merged.setdefault(layer, {}).update(times)
        self.points = merged
        document = {"format": FORMAT, "version": VERSION, "key": self.key, "points": merged}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(self.path, json.dumps(document, sort_keys=True), caller="latency")
        except (OSError, FileWriteError) as error:
            warnings.warn(
                f"latency: times must be kept in a folder that can be written, got '{self.path.parent}' ({error}); they will "
                "be measured again next time, or set PFS_FAST_CACHE",
                UserWarning,
                stacklevel=2,
            )

    def _read(self) -> Points:
        if not os.path.lexists(self.path):
            return {}
        try:
            document = parse_json(read_text(self.path, "latency"))
        except ValueError as error:
            return self._unusable(str(error))
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            return self._unusable("it is of another format")
        if document.get("version") != VERSION or document.get("key") != self.key:
            return self._unusable("it is of another version or machine")
        points = document.get("points")
        if not _are_points(points):
            return self._unusable("its times are not positive numbers by layer and width")
        return points

    def _unusable(self, reason: str) -> Points:
        warnings.warn(
            f"latency: '{self.path}' must be a whole table of times, got one that cannot be used ({reason}); "
            "the layers are measured anew",
            UserWarning,
            stacklevel=3,
        )
        return {}


def _are_points(points: Any) -> bool:
    return isinstance(points, dict) and all(
        isinstance(times, dict)
        and all(type(t) is float and math.isfinite(t) and t > 0 for t in times.values())
        for times in points.values()
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()
