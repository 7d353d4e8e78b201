"""What the loop measures between two entries of the history: on the CPU in Python numbers, on CUDA without waiting.

``DeviceMeter`` updates storage at fixed addresses by a fixed sequence of operations, so that a CUDA graph can hold them, and
``Reading`` brings numbers to the host while the device goes on.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Measured:
    """Numbers of the steps since the last entry, and the state of the gates after them.

    Attributes:
        loss: Sum of the steps' losses.
        last_loss: Loss of the last step.
        correct: Images whose largest logit was the label's.
        bad_step: First step with a loss that is not finite, ever; -1.
        bad_loss: That loss.
        labels: What ``note_labels`` noted of all labels, ever. [3].
        gate_sum: Sum of all gates.
        alive: Gates above 0.
        finite: Whether all gates are finite.
        images: Number of images.
        steps: Number of steps.
    """

    loss: float
    last_loss: float
    correct: int
    bad_step: int
    bad_loss: float
    labels: tuple[float, ...]
    gate_sum: float
    alive: int
    finite: bool
    images: int
    steps: int


class Reading:
    """A tensor on its way to the host; the copy is ordered behind what was asked of the device before.

    Args:
        tensor: On any device; on CUDA in the current stream.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._done: torch.cuda.Event | None = None
        if tensor.is_cuda:
            self._host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            self._host.copy_(tensor, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record()
        else:
            self._host = tensor.clone()

    def ready(self) -> bool:
        """Whether ``get`` returns at once."""
        return self._done is None or self._done.query()

    def get(self) -> Tensor:
        """The values on the CPU; waits for them."""
        if self._done is not None:
            self._done.synchronize()
        return self._host


class Meter:
    """Collects what happened in each step. The two kinds of it measure the same."""

    def __init__(self) -> None:
        self.images = self.steps = 0

    def count(self, images: int) -> None:
        """One more step of so many images. The host's part, also of a step that a graph replays."""
        self.images += images
        self.steps += 1

    def add(self, loss: Tensor, correct: Tensor, step: Tensor | int, noted: Tensor | None) -> None:
        """The device's part of a step.

        Args:
            loss: Scalar, detached.
            correct: Images whose largest logit is the label's. Scalar.
            step: Steps taken before this one. [1], int64; of a ``HostMeter`` also a number.
            noted: Of the labels, by ``note_labels``. [3]. None: labels are known to be right.
        """
        raise NotImplementedError

    def take(self, gates: Tensor) -> PendingMeasure:
        """The numbers since the last call, with the state of the gates; starts anew."""
        raise NotImplementedError


class PendingMeasure:
    """Numbers that may still be on their way from the device."""

    def __init__(self, values: Reading, images: int, steps: int) -> None:
        self._values, self._images, self._steps = values, images, steps

    def ready(self) -> bool:
        return self._values.ready()

    def get(self) -> Measured:
        last, total, correct, bad_step, bad_loss, *noted, gate_sum, alive, finite = (
            self._values.get().tolist()
        )
        return Measured(
            total,
            last,
            int(correct),
            int(bad_step),
            bad_loss,
            tuple(noted),
            gate_sum,
            int(alive),
            bool(finite),
            self._images,
            self._steps,
        )


class DeviceMeter(Meter):
    """Keeps its sums on a device; nothing is read before ``take``.

    Args:
        device: Of the network.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        # float64 holds every step and label below 2^53, and one tensor is one copy.
        self._values = torch.tensor(
            [0.0, 0.0, 0.0, -1.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64
        ).to(device)
        self._last, self._sum, self._correct = (self._values[i] for i in range(3))
        self._bad_step, self._bad_loss, self._noted = (
            self._values[3],
            self._values[4],
            self._values[5:],
        )

    @torch.no_grad()
    def add(self, loss: Tensor, correct: Tensor, step: Tensor, noted: Tensor | None) -> None:
        self._last.copy_(loss)
        self._sum.add_(self._last)
        self._correct.add_(correct)
        first_bad = torch.isfinite(self._last).logical_not_().logical_and_(self._bad_step < 0)
        self._bad_loss.copy_(torch.where(first_bad, self._last, self._bad_loss))
        self._bad_step.copy_(torch.where(first_bad, step.squeeze(0) + 1, self._bad_step))
        if noted is not None:
            self._noted.copy_(torch.maximum(self._noted, noted))

    @torch.no_grad()
    def take(self, gates: Tensor) -> PendingMeasure:
        state = [gates.sum(), torch.count_nonzero(gates), torch.isfinite(gates).all()]
        values = torch.cat([self._values, torch.stack([x.to(torch.float64) for x in state])])
        pending = PendingMeasure(Reading(values), self.images, self.steps)
        self._values[1:3].zero_()  # a bad step or label stays noted, and so does the last loss
        self.images = self.steps = 0
        return pending


class HostMeter(Meter):
    """Keeps its sums as Python numbers: on the CPU a number is read at once, and a tensor operation takes longer."""

    def __init__(self) -> None:
        super().__init__()
        self.last_loss = self._sum = 0.0
        self.correct = 0
        self.bad_step, self.bad_loss = -1, 0.0

    def add(self, loss: Tensor, correct: Tensor, step: Tensor | int, noted: Tensor | None) -> None:
        self.last_loss = float(loss)
        self._sum += self.last_loss
        self.correct += int(correct)
        if not math.isfinite(self.last_loss) and self.bad_step < 0:
            self.bad_step, self.bad_loss = int(step) + 1, self.last_loss

    def take(self, gates: Tensor) -> PendingMeasure:
        state = [float(gates.sum()), int(torch.count_nonzero(gates)), bool(gates.isfinite().all())]
        values = [
            self.last_loss,
            self._sum,
            self.correct,
            self.bad_step,
            self.bad_loss,
            0,
            0,
            0,
            *state,
        ]
        reading = Reading(torch.tensor(values, dtype=torch.float64))
        pending = PendingMeasure(reading, self.images, self.steps)
        self._sum, self.correct, self.images, self.steps = 0.0, 0, 0, 0
        return pending
