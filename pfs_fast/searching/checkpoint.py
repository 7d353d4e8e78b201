"""Write the whole state of a search after an epoch, and go on from it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FileFormatError
from ..graph.groups import ChannelGroups
from ..storage.files import read_safetensors, writable_target, write_safetensors
from .config import SearchConfig
from .loop import SearchLoop
from .saved_groups import is_number, read_counts, read_history
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
        self._path, self._loop, self._fingerprint = path, loop, fingerprint
        writable_target(path, "search", "checkpoint")  # now, not after an epoch's work

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
        if not os.path.exists(self._path):
            return False
        tensors, meta = read_safetensors(self._path, FORMAT, VERSION, caller="search")
        if meta.get("fingerprint") != self._fingerprint:
            raise FileFormatError(
                f"search: checkpoint must be of this search (model, weights and config), got another one's in "
                f"'{self._path}'; give another path, or delete the file to start anew"
            )
        try:
            self._restore(tensors, meta)
        except (LookupError, TypeError, ValueError) as error:
            raise FileFormatError(
                f"search: checkpoint must hold the whole state of a search, got '{self._path}' with "
                f"{type(error).__name__}: {error}; give another path, or delete the file to start anew"
            ) from error
        return True

    def _restore(self, tensors: dict[str, Tensor], meta: dict[str, Any]) -> None:
        """As ``restore``. Raises LookupError, TypeError or ValueError where the file is damaged."""
        loop, state = self._loop, self._loop.state
        watch = loop.watch
        progress = _Progress.read(meta)
        present, left = tensors["compaction.present"], tensors["compaction.left_died_at"]
        whole = loop.compaction.num_gates
        _check("compaction.left_died_at", left, (whole,), torch.int32)
        _check("compaction.present", present, (len(present),), torch.int64)
        if not torch.equal(present, torch.unique(present)) or not len(present):
            raise ValueError("the present gates do not ascend")
        if present[0] < 0 or present[-1] >= whole:
            raise ValueError(f"the present gates are not of the {whole} of the network")
        loop.compaction.restore(present, left)
        gates, buffers = state.gates.tensors(), dict(loop.network.named_buffers())
        expected = {f"gates.{name}": t for name, t in gates.items()}
        expected |= {f"network.{name}": t for name, t in buffers.items()}
        for name, tensor in expected.items():
            _check(name, tensors[name], tuple(tensor.shape), tensor.dtype)
        _check_gates("gates", tensors["gates.values"], tensors["gates.died_at"])
        if int(tensors["gates.step"]) != progress.steps:
            raise ValueError(
                f"the gates took {int(tensors['gates.step'])} steps of {progress.steps}"
            )
        looks = {
            name.removeprefix("watch."): tensor
            for name, tensor in tensors.items()
            if name.startswith("watch.")
        }
        if looks:
            count = len(looks["steps"])
            _check("watch.steps", looks["steps"], (count,), torch.int64)
            _check("watch.keeps", looks["keeps"], (count, whole), torch.bool)
            _check("watch.positions", looks["positions"], (count, whole), torch.int32)
        best = None
        if "best.values" in tensors:
            best = tensors["best.values"], tensors["best.died_at"]
            _check("best.values", best[0], (whole,), gates["values"].dtype)
            _check("best.died_at", best[1], (whole,), torch.int32)
            _check_gates("best gates", *best)
        for name, now, put in self._random_states():
            if name in tensors or name == "random":
                _check(name, tensors[name], tuple(now.shape), torch.uint8)
                try:
                    put(tensors[name])
                except RuntimeError as error:
                    raise ValueError(f"{name}: {error}") from error
        with torch.no_grad():
            for name, tensor in expected.items():
                tensor.copy_(tensors[name])
        if watch is not None:
            watch.restore(looks, progress.change)
        if best is not None:
            state.best = (best[0].to(loop.device), best[1].to(loop.device))
        state.epoch, state.steps, state.history = progress.epoch, progress.steps, progress.history
        state.best_accuracy, state.seconds = progress.best_accuracy, progress.seconds
        state.ended = progress.ended

    def _random_states(self) -> list[tuple[str, Tensor, Callable[[Tensor], None]]]:
        """Name in the file, present state, and what sets it."""
        device = self._loop.device
        states = [("random", torch.random.get_rng_state(), torch.random.set_rng_state)]
        if device.type == "cuda":
            put = partial(torch.cuda.set_rng_state, device=device)
            states.append(("random_cuda", torch.cuda.get_rng_state(device), put))
        return states


@dataclass(frozen=True)
class _Progress:
    """The metadata of a checkpoint; the fields are those of `LoopState`, and the last change that the watch saw."""

    epoch: int
    steps: int
    ended: str | None
    change: Change | None
    history: list[dict[str, Any]]
    best_accuracy: float
    seconds: float

    @classmethod
    def read(cls, meta: dict[str, Any]) -> _Progress:
        """Raises KeyError or ValueError where the metadata are damaged."""
        change = meta["change"]
        if change is not None:
            if not isinstance(change, list) or len(change) != 2 or not all(map(is_number, change)):
                raise ValueError("the last change is not two numbers")
            change = Change(*change)
        epoch, steps = read_counts("epoch and steps", [meta["epoch"], meta["steps"]])
        if meta["ended"] not in (None, "steps", "stable"):
            raise ValueError("the search ended in no way that there is")
        if not is_number(meta["best_accuracy"]) or not is_number(meta["seconds"]):
            raise ValueError("accuracy or seconds are no numbers")
        history = read_history(meta["history"])
        return cls(
            epoch, steps, meta["ended"], change, history, meta["best_accuracy"], meta["seconds"]
        )


def _check(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} and should be {dtype} {list(shape)}"
        )


def _check_gates(name: str, values: Tensor, died_at: Tensor) -> None:
    if not ((values >= 0) & (values <= 1)).all() or (died_at < -1).any():
        raise ValueError(f"{name} are outside of [0, 1], or died before the first step")


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
