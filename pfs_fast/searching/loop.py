"""The search loop as a state machine: one batch in, one step of the gates; everything it changes in one object."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LoaderError, ModelError, NonFiniteLossError, PfsError
from ..gating.compaction import Compaction
from ..gating.gated import GatedNetwork
from ..gating.gates import GateBank, GateState
from ..gating.objective import cross_entropy
from ..training.batches import (
    LabelWatch,
    Loader,
    check_labels,
    check_noted,
    checked_batches,
    note_labels,
    require_gradient,
    split_outputs,
)
from ..training.bf16_convs import SoundConvs, may_run_bf16
from .config import SearchConfig
from .stability import StabilityWatch
from .step_meter import DeviceMeter, HostMeter, Measured, PendingMeasure, Reading

FP16_LOSS_SCALE = (
    1024.0  # lifts activation gradients of a mean cross-entropy above float16's smallest numbers
)

# Where reading a number waits for all work that was asked for before: there numbers are read late.
DEFERRED = frozenset({"cuda"})

# Entries on their way at the same time, so that the host is never more than this many windows ahead.
MAX_PENDING = 2


@dataclass
class LoopState:
    """All that a search changes, apart from the running statistics of the network.

    Attributes:
        gates: Gates and their optimiser state.
        epoch: Epochs finished.
        steps: Steps taken (the host's copy of ``gates.step``).
        ended: How the search ended: ``"steps"`` or ``"stable"``; None while it goes on.
        history: Entries so far.
        best_accuracy: Validation accuracy of ``best``; -1 before there is one.
        best: ``(values, died_at)`` of all gates in the best admissible epoch.
        seconds: Time spent in earlier runs of a resumed search.
    """

    gates: GateState
    epoch: int = 0
    steps: int = 0
    ended: str | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    best_accuracy: float = -1.0
    best: tuple[Tensor, Tensor] | None = None
    seconds: float = 0.0


class SearchLoop:
    """Takes batches, steps the gates.

    Args:
        network: The gated network, on its device.
        bank: Its gates.
        config: With ``target`` resolved.
        ops: ``pfs_fast.ops`` or ``pfs_fast.ops.reference``.
        dtype: Of images.
        compaction: Of this network; used where ``config.compact``.
        watch: Says when to stop early; None: never.

    Attributes:
        num_classes: Width of the logits; 0 before the first step.
        deferred: Whether numbers are read late, since reading waits for the device.
    """

    def __init__(
        self,
        network: GatedNetwork,
        bank: GateBank,
        config: SearchConfig,
        ops: ModuleType,
        dtype: torch.dtype,
        compaction: Compaction,
        watch: StabilityWatch | None = None,
    ) -> None:
        self.network, self.bank, self.config, self._ops, self._dtype = (
            network,
            bank,
            config,
            ops,
            dtype,
        )
        self.compaction = compaction
        self.watch = watch
        self.num_gates = compaction.num_gates
        self.state = LoopState(bank.state)
        self.device = bank.state.values.device
        self.deferred = self.device.type in DEFERRED
        self._scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
        self._sound_convs = SoundConvs(network.root, may_run_bf16(network.root, self.device))
        self._good = self.gates()
        self._shape: torch.Size | None = None
        self.num_classes = 0
        self._meter = DeviceMeter(self.device) if self.deferred else HostMeter()
        self._pending: deque[_PendingEntry] = deque()
        self._shown: dict[str, float] = {}
        self._dead_at_look: Reading | None = None
        self._started = time.perf_counter()

    # -- training --------------------------------------------------------------------------------------------------

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step on a batch.

        Raises:
            LoaderError: Labels do not fit the network's classes.
            NonFiniteLossError: On the CPU at once, on CUDA when an ``entry`` has been read (waiting for each loss would stall
                the device).
        """
        logits = self._logits(images)
        labels, noted = self._check_labels(labels, logits.size(1))
        self._learn(logits, labels, noted)
        self.count_step(len(images))

    def device_step(self, images: Tensor, labels: Tensor, *, trusted: bool) -> None:
        """The device's part of ``step``, which a CUDA graph can hold: no host value changes, and none is read.

        Args:
            images: On the device.
            labels: On the device.
            trusted: Labels are known to be right.
        """
        outputs = self.network(self.place(images))
        logits = split_outputs(outputs, len(images), "search")[0]
        noted = None
        if not trusted:
            labels, noted = self._check_labels(labels, logits.size(1))
        self._learn(logits, labels, noted)

    def count_step(self, images: int) -> None:
        """The host's part of a step over so many images."""
        self._meter.count(images)
        self.state.steps += 1

    def check_host_labels(self, labels: Tensor) -> bool:
        """Whether labels lie on the CPU, where they are checked; on a device they are checked there.

        Raises:
            LoaderError: Labels do not fit the network's classes.
        """
        if labels.device.type != "cpu":
            return False
        check_labels(labels, self.num_classes, "search")
        return True

    def host_step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The part of a step on the CPU that is tensor operations alone, which a tape can hold. `note_step` does the rest.

        Args:
            images: Placed.
            labels: On the CPU, inside the classes.

        Returns:
            Loss and number of correct images. Scalars.
        """
        logits = self._logits(images)
        loss = cross_entropy(logits, labels)
        correct = _num_correct(logits, labels)
        self._update(loss)
        return loss.detach(), correct

    def note_step(self, loss: Tensor, correct: Tensor, images: int) -> None:
        """The rest of a step after `host_step`, with what that returned.

        Raises:
            NonFiniteLossError: Of this loss; the gates have taken its step.
        """
        self._meter.add(loss, correct, self.state.steps, None)
        self._check(self._meter.bad_step, self._meter.bad_loss)
        self.count_step(images)

    def tensors(self) -> Iterator[Tensor]:
        """What stays where it is until the network is narrowed: weights, statistics, gates and their optimiser state."""
        yield from self.network.tensors()
        yield from self.bank.tensors()

    def _learn(self, logits: Tensor, labels: Tensor, noted: Tensor | None) -> None:
        loss = cross_entropy(logits, labels)
        step = self.state.gates.step
        self._meter.add(loss.detach(), _num_correct(logits, labels), step, noted)
        if not self.deferred:
            self._check(self._meter.bad_step, self._meter.bad_loss)
        self._update(loss)

    def _update(self, loss: Tensor) -> None:
        require_gradient(loss, "search")
        config, gates = self.config, self.state.gates
        self.bank.zero_grad()
        self._sound_convs.backward(
            loss * self._scale if self._scale != 1.0 else loss, caller="search"
        )
        if self._scale != 1.0:
            self.bank.grad.div_(self._scale)
        self._ops.gate_step_(
            gates.values,
            self.bank.grad,
            gates.exp_avg,
            gates.exp_avg_sq,
            gates.step,
            gates.died_at,
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            gamma=config.gamma,
            target=config.target,
            num_gates=self.num_gates,
        )

    def compact(self, steps_left: int | None, forget: Callable[[], None] | None = None) -> bool:
        """Leave dead channels out, if that shortens the rest of the search. Reads the gates, so not for every step.

        Where reading waits for the device, the gates of the last look decide: what was dead then is dead now.

        Args:
            steps_left: Steps still to come; None where nobody knows.
            forget: Called before anything is left out: whoever recorded a step holds the tensors that will be replaced.
        """
        if not self.config.compact:
            return False
        alive = self._alive_at_look()
        if alive is None:
            return False
        keep, saving = self.compaction.candidates(alive)
        # Where nobody knows the end, as many steps as were taken may come.
        if not self.compaction.worthwhile(
            saving, self.state.steps if steps_left is None else steps_left
        ):
            return False
        if forget is not None:
            forget()
        self.compaction.leave_out(keep)
        if self.deferred:
            self._dead_at_look = self._read_dead()
        return True

    def resume_look(self, every: int) -> None:
        """After a restart: the gates as the last look found them, so that the next one decides as it would have."""
        if self.deferred and self.state.steps >= every:
            self._dead_at_look = self._read_dead(self.state.steps // every * every)

    def _alive_at_look(self) -> Tensor | None:
        if not self.deferred:
            return self.state.gates.values != 0  # NaN counts as alive: the loop reports it
        last, self._dead_at_look = self._dead_at_look, self._read_dead()
        return None if last is None else ~last.get()

    def _read_dead(self, step: int | None = None) -> Reading:
        died_at = self.state.gates.died_at
        dead = died_at >= 0
        return Reading(dead if step is None else dead & (died_at <= step))

    def check_stable(self) -> bool:
        """At the steps where the watch looks: whether the answer has stopped changing. Reads the gates."""
        if self.watch is None or not self.watch.due(self.state.steps):
            return False
        if self.watch.look(self.state.steps, *self.gates()):
            self.state.ended = "stable"
        return self.state.ended is not None

    def _logits(self, images: Tensor) -> Tensor:
        try:
            with self._sound_convs("search"):
                outputs = self.network(self.place(images))
        except (PfsError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError, TypeError) as error:
            if images.shape == self._shape:  # the same went well before
                raise
            if self._dtype in (torch.bfloat16, torch.float16) and _is_of_dtypes(error):
                raise ModelError(
                    f"search: model must run in {self.config.precision}, which its forward mixes with other dtypes, got an error "
                    f"({error}); use SearchConfig(precision='fp32')"
                ) from error
            if isinstance(error, TypeError):
                raise
            raise LoaderError(
                f"search: images must fit the model in every batch, got shape {list(images.shape)}: {error}; resize them, or "
                "set drop_last for a last batch that is too small for batch statistics"
            ) from error
        self._shape = images.shape
        return split_outputs(outputs, len(images), "search")[0]

    def place(self, images: Tensor) -> Tensor:
        """Images on the device, in the dtype and layout of the network; the same tensor where they are so already."""
        layout = torch.preserve_format
        if self.config.channels_last and images.dim() == 4:
            layout = torch.channels_last
        return images.to(self.device, self._dtype, non_blocking=True, memory_format=layout)

    def _check_labels(self, labels: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
        """Labels on the device and safe to use; what is wrong with labels on CUDA is noted, not read."""
        self.num_classes = classes
        if labels.device.type == "cpu":
            check_labels(labels, classes, "search")
            return labels.to(self.device, non_blocking=True), None
        return note_labels(labels.to(self.device, non_blocking=True), classes, "search")

    # -- reading ---------------------------------------------------------------------------------------------------

    def post_entry(self) -> None:
        """Begin an entry: means since the last one and the gates. It is in the history once it has been read.

        Raises:
            NonFiniteLossError, LoaderError: Noted up to an entry that has arrived.
        """
        step = self.state.steps
        newest = self._pending[-1].step if self._pending else self._last_step()
        if newest != step:
            measure = self._meter.take(self.state.gates.values)
            extra = self._changes() if self.watch is not None else {}
            channels = len(self.compaction.present)
            self._pending.append(
                _PendingEntry(step, self.state.epoch, channels, measure, self.gates(), extra)
            )
        while self._pending and (len(self._pending) > MAX_PENDING or self._pending[0].ready()):
            self._settle(self._pending.popleft())

    def entry(self) -> dict[str, Any]:
        """The entry of this step, and all before it, in the history; waits for the device.

        Raises:
            NonFiniteLossError, LoaderError: Noted since the last entry.
        """
        self.post_entry()
        while self._pending:
            self._settle(self._pending.popleft())
        return self.state.history[-1]

    def _last_step(self) -> int:
        return self.state.history[-1]["step"] if self.state.history else -1

    def _settle(self, pending: _PendingEntry) -> None:
        """Checks the numbers of an entry, adds it to the history, and takes its gates as known to be good."""
        found: Measured = pending.measure.get()
        check_noted(found.labels, self.num_classes, "search")
        self._check(found.bad_step, found.bad_loss)
        entry = {
            "step": pending.step,
            "epoch": pending.epoch,
            "loss": found.loss / max(found.steps, 1),
            "accuracy": found.correct / found.images if found.images else 0.0,
            "mean_gate": found.gate_sum / self.num_gates,
            "alive": found.alive / self.num_gates,
            "channels": pending.channels,
            "seconds": round(self.seconds, 3),
            **pending.extra,
        }
        if not found.finite:
            raise NonFiniteLossError(
                f"search: gates must be finite, got NaN by step {pending.step} though the loss was finite: its gradient is "
                "not, as that of sqrt or a division at 0; change that operation, or use precision='fp32' (now "
                f"{self.config.precision})"
            )
        self._good = pending.gates
        self._shown = {
            "loss": found.last_loss,
            "acc": entry["accuracy"],
            "gate": entry["mean_gate"],
            "alive": entry["alive"],
        }
        self.state.history.append(entry)

    def _check(self, bad_step: int, bad_loss: float) -> None:
        if bad_step >= 0:
            raise NonFiniteLossError(
                f"search: loss must be finite, got {bad_loss} at step {bad_step}; check the images for NaN, normalise "
                f"them, lower lr ({self.config.lr:g}), or use precision='fp32' (now {self.config.precision})"
            )

    def finish(self) -> None:
        """Note in the last entry how the search ended; called at its end, once or again after a resume."""
        self.state.ended = self.state.ended or "steps"
        if self.watch is not None and self.state.history:
            self.state.history[-1]["ended"] = self.state.ended

    def _changes(self) -> dict[str, float | None]:
        last = self.watch.last
        return {
            "structure_change": None if last is None else last.structure,
            "order_change": None if last is None else last.order,
        }

    def metrics(self) -> dict[str, Any]:
        """For a progress line: of the latest step, read only when it is drawn; on CUDA of the latest entry that has arrived."""
        metrics: dict[str, Any] = dict(self._shown)
        if not self.deferred:
            metrics = {
                "loss": self._meter.last_loss,
                "acc": self._accuracy,
                "gate": self._mean_gate,
                "alive": self._alive,
            }
        if self.watch is not None and self.watch.last is not None:
            metrics["change"] = max(self.watch.last)
        return metrics

    def _accuracy(self) -> float:
        if self._meter.images:
            return self._meter.correct / self._meter.images
        return self._shown.get("acc", 0.0)  # shown until the next step

    def _mean_gate(self) -> float:
        return float(self.state.gates.values.sum()) / self.num_gates

    def _alive(self) -> float:
        return int(torch.count_nonzero(self.state.gates.values)) / self.num_gates

    def gates(self) -> tuple[Tensor, Tensor]:
        """``(values, died_at)`` of all gates, those left out included. Copies. [num_gates]."""
        return self.compaction.whole(self.state.gates.values, self.state.gates.died_at)

    @property
    def seconds(self) -> float:
        return self.state.seconds + time.perf_counter() - self._started

    @property
    def good_gates(self) -> tuple[Tensor, Tensor]:
        """``(values, died_at)`` as of the last entry with a finite loss."""
        return self._good

    # -- validation ------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def evaluate(self, loader: Loader) -> float:
        """Accuracy in [0, 1] in eval mode, with running statistics.

        Raises:
            LoaderError: Labels do not fit the network's classes.
            NonFiniteLossError: Logits are NaN.
        """
        self.network.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        nan = torch.zeros((), dtype=torch.bool, device=self.device)
        watch = LabelWatch(self.device, "search")
        seen = 0
        for images, labels in checked_batches(loader, "search", name="val_loader"):
            logits = self._logits(images)
            labels = watch.checked(labels, logits.size(1)).to(self.device)
            correct += _num_correct(logits, labels)
            nan |= logits.isnan().any()
            seen += len(images)
        self.network.train()
        watch.read()
        if nan:
            raise NonFiniteLossError(
                f"search: logits of val_loader must be numbers, got NaN after step {self.state.steps}; check its images for NaN and "
                "normalise them"
            )
        return int(correct) / seen

    def keep_if_best(self, accuracy: float) -> None:
        """The official code's rule: the best accuracy among states whose share of non-zero gates is at most r."""
        if self._alive() <= self.config.target and accuracy > self.state.best_accuracy:
            self.state.best_accuracy = accuracy
            self.state.best = self.gates()


class _PendingEntry(NamedTuple):
    """An entry of the history whose numbers are on their way."""

    step: int
    epoch: int
    channels: int
    measure: PendingMeasure
    gates: tuple[Tensor, Tensor]
    extra: dict[str, Any]

    def ready(self) -> bool:
        return self.measure.ready()


def _is_of_dtypes(error: Exception) -> bool:
    return any(word in str(error).lower() for word in ("dtype", "scalar type", "bfloat16", "half"))


def _num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    classes = labels.argmax(1) if labels.is_floating_point() else labels
    return (logits.argmax(1) == classes).sum()
