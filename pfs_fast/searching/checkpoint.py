"""Write the whole state of a search after an epoch, and go on from it."""

from __future__ import annotations

import hashlib
import os
from dataclasses import asdict
from pathlib import Path

import torch
from torch import nn

from ..errors import FileFormatError, FileWriteError
from ..graph.groups import ChannelGroups
from ..storage.files import read_safetensors, write_safetensors
from .config import SearchConfig
from .loop import SearchLoop
from .stability import Change

FORMAT, VERSION = "pfs_fast.checkpoint", 2
_HOW_STEPS_RUN = frozenset({"cpu_graph", "cuda_graph"})  # a search may go on with or without


class Checkpoint:
    """One file, replaced after each epoch.

    Args:
        path: The file; a search that finds it goes on from it.
        loop: The loop whose state is saved and restored.
        fingerprint: Of the search; a file with another one is refused.
    """

    def __init__(self, path: str | os.PathLike[str], loop: SearchLoop, fingerprint: str) -> None:
        self._path, self._loop, self._fingerprint = Path(path), loop, fingerprint
        if not self._path.absolute().parent.is_dir():  # now, not after an epoch's work
            raise FileWriteError(
                f"search: checkpoint must lie in an existing folder, got '{path}'; create '{self._path.parent}'"
            )

    def save(self) -> None:
        state = self._loop.state
        tensors = {f"gates.{name}": t for name, t in state.gates.tensors().items()}
        tensors |= {f"network.{name}": t for name, t in self._loop.network.named_buffers()}
        present, left_died_at = self._loop.compaction.state()
        tensors |= {"compaction.present": present, "compaction.left_died_at": left_died_at}
        tensors["random"] = torch.random.get_rng_state()
        if self._loop.device.type == "cuda":
            tensors["random_cuda"] = torch.cuda.get_rng_state(self._loop.device)
        change = None
        if self._loop.watch is not None:
            looks, change = self._loop.watch.state()
            tensors |= {f"watch.{name}": t for name, t in looks.items()}
        if state.best is not None:
            tensors["best.values"], tensors["best.died_at"] = state.best
        metadata = {
            "format": FORMAT,
            "version": VERSION,
            "fingerprint": self._fingerprint,
            "epoch": state.epoch,
            "steps": state.steps,
            "ended": state.ended,
            "change": change,
            "history": state.history,
            "best_accuracy": state.best_accuracy,
            "seconds": self._loop.seconds,
        }
        write_safetensors(self._path, tensors, metadata, caller="search")

    def restore(self) -> bool:
        """Set the loop to the saved state, if there is a file.

        Raises:
            FileFormatError: Truncated, of another format or version, or of another search.
        """
        if not self._path.exists():
            return False
        tensors, meta = read_safetensors(self._path, FORMAT, VERSION, caller="search")
        if meta.get("fingerprint") != self._fingerprint:
            raise FileFormatError(
                f"search: checkpoint must be of this search (model, weights and config), got another one's in "
                f"'{self._path}'; give another path, or delete the file to start anew"
            )
        state = self._loop.state
        self._loop.compaction.restore(
            tensors["compaction.present"], tensors["compaction.left_died_at"]
        )
        with torch.no_grad():
            for name, tensor in state.gates.tensors().items():
                tensor.copy_(tensors[f"gates.{name}"])
            for name, buffer in self._loop.network.named_buffers():
                buffer.copy_(tensors[f"network.{name}"])
        torch.random.set_rng_state(tensors["random"])
        if self._loop.device.type == "cuda" and "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"], self._loop.device)
        if self._loop.watch is not None:
            looks = {
                name.removeprefix("watch."): tensor
                for name, tensor in tensors.items()
                if name.startswith("watch.")
            }
            self._loop.watch.restore(looks, meta["change"] and Change(*meta["change"]))
        if "best.values" in tensors:
            device = self._loop.device
            state.best = (tensors["best.values"].to(device), tensors["best.died_at"].to(device))
        state.epoch, state.steps, state.history = meta["epoch"], meta["steps"], meta["history"]
        state.best_accuracy, state.seconds = meta["best_accuracy"], meta["seconds"]
        state.ended = meta["ended"]
        return True


def fingerprint(model: nn.Module, groups: ChannelGroups, config: SearchConfig) -> str:
    """Hash of the weights, the gated groups and the options that say something of the gates."""
    options = {name: value for name, value in asdict(config).items() if name not in _HOW_STEPS_RUN}
    digest = hashlib.sha256(repr((options, [(g.name, g.size) for g in groups.groups])).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()
