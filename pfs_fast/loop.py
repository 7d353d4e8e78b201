"""The search loop as a state machine: one batch in, one step of the gates; everything it changes in one object."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .batches import Loader, check_labels, checked_batches, label_message, split_outputs
from .compaction import Compaction
from .config import SearchConfig
from .errors import LoaderError, NonFiniteLossError, PfsError
from .gated import GatedNetwork
from .gates import GateBank, GateState
from .objective import cross_entropy
from .stability import StabilityWatch

FP16_LOSS_SCALE = (
    1024.0  # lifts activation gradients of a mean cross-entropy above float16's smallest numbers
)


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
        self._scale = FP16_LOSS_SCALE if dtype == torch.float16 else 1.0
        self._good = self.gates()
        self._shape: torch.Size | None = None
        self._window = _Window(self.device)
        self._started = time.perf_counter()

    # -- training --------------------------------------------------------------------------------------------------

    def step(self, images: Tensor, labels: Tensor) -> None:
        """One step on a batch.

        Raises:
            LoaderError: Labels do not fit the network's classes.
            NonFiniteLossError: On the CPU at once, on CUDA at the next ``entry`` (reading the loss would stall the device).
        """
        logits = self._logits(images)
        labels, bad_label = self._check_labels(labels, logits)
        loss = cross_entropy(logits, labels)
        self._window.add(loss, logits, labels, bad_label, self.state.steps + 1)
        if self.device.type == "cpu":
            self._window.check(self)
        self.bank.zero_grad()
        (loss * self._scale if self._scale != 1.0 else loss).backward()
        if self._scale != 1.0:
            self.bank.grad.div_(self._scale)
        config, gates = self.config, self.state.gates
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
        self.state.steps += 1

    def compact(self, steps_left: int | None) -> bool:
        """Leave dead channels out, if that shortens the rest of the search. Reads the gates, so not for every step.

        Args:
            steps_left: Steps still to come; None where nobody knows.
        """
        if not self.config.compact:
            return False
        keep, saving = self.compaction.candidates()
        # Where nobody knows the end, as many steps as were taken may come.
        if not self.compaction.worthwhile(
            saving, self.state.steps if steps_left is None else steps_left
        ):
            return False
        self.compaction.leave_out(keep)
        return True

    def check_stable(self) -> bool:
        """At the steps where the watch looks: whether the answer has stopped changing. Reads the gates."""
        if self.watch is None or not self.watch.due(self.state.steps):
            return False
        if self.watch.look(self.state.steps, *self.gates()):
            self.state.ended = "stable"
        return self.state.ended is not None

    def _logits(self, images: Tensor) -> Tensor:
        try:
            outputs = self.network(self._place(images))
        except (PfsError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, ValueError) as error:
            if images.shape == self._shape:  # the same went well before
                raise
            raise LoaderError(
                f"search: images must fit the model in every batch, got shape {list(images.shape)}: {error}; resize them, or "
                "set drop_last for a last batch that is too small for batch statistics"
            ) from error
        self._shape = images.shape
        return split_outputs(outputs, len(images), "search")[0]

    def _place(self, images: Tensor) -> Tensor:
        layout = torch.preserve_format
        if self.config.channels_last and images.dim() == 4:
            layout = torch.channels_last
        return images.to(self.device, self._dtype, non_blocking=True, memory_format=layout)

    def _check_labels(self, labels: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Labels on the device and inside the classes; on CUDA a bad one is noted and replaced, not read."""
        classes = logits.size(1)
        if labels.device.type == "cpu":
            check_labels(labels, classes, "search")
            return labels.to(self.device, non_blocking=True), None
        labels = labels.to(self.device, non_blocking=True)
        if labels.is_floating_point():
            check_labels(labels, classes, "search")
            return labels, None
        # cross_entropy would abort the whole CUDA context on a label outside the classes.
        safe = labels.clamp(0, classes - 1)
        worst = torch.where(safe == labels, -1, labels.abs()).max()
        self._window.num_classes = classes
        return safe, worst

    # -- reading ---------------------------------------------------------------------------------------------------

    def entry(self) -> dict[str, Any]:
        """Means since the last entry, read from the device, and a snapshot of the gates as known to be good.

        Raises:
            NonFiniteLossError, LoaderError: Noted since the last entry.
        """
        self._window.check(self)
        history = self.state.history
        if history and history[-1]["step"] == self.state.steps:
            return history[-1]
        entry = {
            "step": self.state.steps,
            "epoch": self.state.epoch,
            **self._window.read(),
            "mean_gate": self._mean_gate(),
            "alive": self._alive(),
            "channels": len(self.compaction.present),
            "seconds": round(self.seconds, 3),
        }
        if self.watch is not None:
            entry |= self._changes()
        if not bool(torch.isfinite(self.state.gates.values).all()):
            raise NonFiniteLossError(
                f"search: gates must be finite, got NaN by step {self.state.steps} though the loss was finite: its gradient is "
                "not, as that of sqrt or a division at 0; change that operation, or use precision='fp32' (now "
                f"{self.config.precision})"
            )
        self._good = self.gates()
        history.append(entry)
        return entry

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
        """For a progress line: read only when it is drawn."""
        metrics = {
            "loss": self._window.last_loss,
            "acc": self._window.last_accuracy,
            "gate": self._mean_gate,
            "alive": self._alive,
        }
        if self.watch is not None and self.watch.last is not None:
            metrics["change"] = max(self.watch.last)
        return metrics

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
        """Accuracy in [0, 1] in eval mode, with running statistics."""
        self.network.eval()
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = 0
        for images, labels in checked_batches(loader, "search", name="val_loader"):
            logits = self._logits(images)
            labels, _ = self._check_labels(labels, logits)
            correct += _num_correct(logits, labels)
            seen += len(images)
        self.network.train()
        return int(correct) / seen

    def keep_if_best(self, accuracy: float) -> None:
        """The official code's rule: the best accuracy among states whose share of non-zero gates is at most r."""
        if self._alive() <= self.config.target and accuracy > self.state.best_accuracy:
            self.state.best_accuracy = accuracy
            self.state.best = self.gates()


class _Window:
    """Sums since the last entry, kept on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.num_classes = 0
        self.last_loss: Tensor | None = None
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_loss = torch.zeros((), dtype=torch.float64, device=device)
        self._bad_label = torch.full((), -1, dtype=torch.int64, device=device)
        self._reset()

    def _reset(self) -> None:
        self._loss = torch.zeros((), dtype=torch.float64, device=self._device)
        self._accuracy = 0.0  # shown until the next step
        self._correct = torch.zeros((), dtype=torch.int64, device=self._device)
        self._images = self._steps = 0

    @torch.no_grad()
    def add(
        self, loss: Tensor, logits: Tensor, labels: Tensor, bad_label: Tensor | None, step: int
    ) -> None:
        self.last_loss = loss.detach()
        self._loss += self.last_loss
        self._correct += _num_correct(logits, labels)
        self._images += len(logits)
        self._steps += 1
        first_bad = ~torch.isfinite(self.last_loss) & (self._bad_step < 0)
        self._bad_step.masked_fill_(first_bad, step)
        self._bad_loss.copy_(torch.where(first_bad, self.last_loss.double(), self._bad_loss))
        if bad_label is not None:
            torch.maximum(self._bad_label, bad_label, out=self._bad_label)

    def check(self, loop: SearchLoop) -> None:
        if int(self._bad_label) >= 0:
            raise LoaderError(label_message("search", self.num_classes, int(self._bad_label)))
        step = int(self._bad_step)
        if step >= 0:
            raise NonFiniteLossError(
                f"search: loss must be finite, got {float(self._bad_loss)} at step {step}; check the images for NaN, normalise "
                f"them, lower lr ({loop.config.lr:g}), or use precision='fp32' (now {loop.config.precision})"
            )

    def last_accuracy(self) -> float:
        return int(self._correct) / self._images if self._images else self._accuracy

    def read(self) -> dict[str, float]:
        means = {"loss": float(self._loss) / max(self._steps, 1), "accuracy": self.last_accuracy()}
        self._reset()
        self._accuracy = means["accuracy"]
        return means


def _num_correct(logits: Tensor, labels: Tensor) -> Tensor:
    classes = labels.argmax(1) if labels.is_floating_point() else labels
    return (logits.argmax(1) == classes).sum()
