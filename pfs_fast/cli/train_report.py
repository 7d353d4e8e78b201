"""What training leaves behind: a file that is proved, a history, and a table of costs and accuracy."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

import pfs_fast

from ..budgets.structure import Structure
from ..data import DeviceLoader
from ..errors import ConfigError, FileFormatError, ModelError
from ..storage.files import write_text_atomic
from ..training.evaluation import Accuracy
from ..training.onednn import in_layout
from ..training.train import TrainResult


def check_cost(slim: nn.Module, structure: Structure, image: torch.Tensor) -> None:
    """The slim network must cost what its structure says, counted anew on the module.

    Raises:
        ConfigError: It does not, because the images have another size than those of the search.
    """
    cost = pfs_fast.count(slim, in_layout(image, torch.contiguous_format))  # runs any network
    if (cost.macs, cost.params) != (structure.macs, structure.params):
        raise ConfigError(
            f"train: images must have the size that was searched, got {cost.macs:,} MACs and {cost.params:,} "
            f"parameters where the structure has {structure.macs:,} and {structure.params:,}; use the same --data "
            "and --size"
        )


def check_reloaded(
    path: Path,
    dense: nn.Module,
    slim: nn.Module,
    accuracy: Accuracy,
    loader: DeviceLoader,
    amp: str,
) -> None:
    """The file must give back the weights bit for bit, and a network that is right as often."""
    device = next(slim.parameters()).device
    reloaded = pfs_fast.load(path, dense).to(device)
    for own, trained in zip(reloaded.parameters(), slim.parameters(), strict=True):
        own.data = torch.empty_like(trained).copy_(own)  # the same layout, hence the same rounding
    saved, found = slim.state_dict(), reloaded.state_dict()
    different = [
        name for name in saved if not torch.equal(saved[name], found[name].to(saved[name].device))
    ]
    if different:
        raise FileFormatError(
            f"train: '{path}' must give back the weights that were saved, got others in {', '.join(different[:5])}; "
            "check the disk"
        )
    again = pfs_fast.evaluate(reloaded, loader, amp=amp)
    # GPU convolutions may round differently from one call to the next, which can turn a near tie.
    allowed = 0.0 if device.type == "cpu" else 0.001
    if abs(again.top1 - accuracy.top1) > allowed:
        raise ModelError(
            f"train: the reloaded network must be right as often, got {again.top1:.4%} after {accuracy.top1:.4%}; "
            "does its forward depend on anything but weights and buffers?"
        )


def write_history(path: Path, trained: TrainResult, accuracy: dict[str, Any]) -> None:
    document = {
        "format": "pfs_fast.history",
        "version": 1,
        "config": asdict(trained.config),
        "accuracy": accuracy,
        "seconds": trained.seconds,
        "history": trained.history,
    }
    write_text_atomic(path, json.dumps(document, indent=1) + "\n", caller="train")


def comparison(structure: Structure, accuracy: Accuracy, images: str) -> str:
    """A table of the whole and the slim network."""
    rows = [
        ("", "MACs", "params", f"top-1 ({images})"),
        ("whole", f"{structure.base_macs:,}", f"{structure.base_params:,}", "-"),
        ("slim", f"{structure.macs:,}", f"{structure.params:,}", f"{accuracy.top1:.2%}"),
        ("slim/whole", f"{structure.macs_share:.1%}", f"{structure.params_share:.1%}", ""),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    lines = []
    for name, *cells in rows:
        right = (cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True))
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)
