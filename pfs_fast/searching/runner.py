"""How the steps of one pass are run: one by one, or as replays of recorded graphs and tapes.

A runner takes the batches of a pass and yields after every run of steps how many it took, so that the search can look at the
loop in between. The warm-up that a capture needs is made of real steps: nothing is done twice or undone.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..data.feed import DeviceFeed
from .graphs import CudaGraphs, Graph, Graphs
from .loop import SearchLoop
from .prefetch import CudaTransfer, Transfer, prefetched
from .tape import NotRecordedError, Tape, can_record, foreign_code, record

WARMUP = 3
"""Steps of one shape before they are captured: the first ones choose algorithms and create handles and workspaces."""

STEPS_PER_REPLAY = 8
"""Steps in one graph where batches are made on the device: then not even a replay's launch shows."""

MAX_SHAPES = 4
"""Shapes of batches with graphs or tapes of their own; further ones are stepped one by one."""

RECAPTURE_STEPS = 60.0
"""What a new capture costs, in replayed steps: about a dozen steps at the speed of the host. An estimate."""

Batches = Iterator[tuple[Tensor, Tensor]]


class Runner(Protocol):
    """Runs the steps of a pass."""

    def run(
        self, batches: Batches, most: int | None, until_look: Callable[[], int]
    ) -> Iterator[int]:
        """Takes at most ``most`` steps (None: all of the pass); yields how many were taken since the last yield.

        Args:
            batches: Of the pass. A runner with a feed of its own leaves them alone.
            most: Most steps.
            until_look: Steps that may be taken before the next yield.
        """
        ...

    def invalidate(self) -> None:
        """The network has changed: forget every recorded step."""
        ...


class EagerRunner:
    """Steps one by one.

    Args:
        loop: The loop.
        transfer: Brings batches to the device; None: as the loop does it.
    """

    def __init__(self, loop: SearchLoop, transfer: Transfer | None = None) -> None:
        self._loop, self._transfer = loop, transfer

    def run(
        self, batches: Batches, most: int | None, until_look: Callable[[], int]
    ) -> Iterator[int]:
        if self._transfer is not None:
            batches = prefetched(batches, self._transfer)
        for images, labels in itertools.islice(batches, most):
            self.step(images, labels)
            yield 1

    def invalidate(self) -> None:
        pass

    def step(self, images: Tensor, labels: Tensor) -> None:
        """Takes one step."""
        self._loop.step(images, labels)


class TapeRunner(EagerRunner):
    """On the CPU: replays the operators of a step without Python and autograd.

    Each shape of a batch has a tape of its own, recorded in a step of the search and again after ``invalidate``. The first step of all
    is taken without, since it tells how many classes there are.
    """

    def __init__(self, loop: SearchLoop) -> None:
        super().__init__(loop)
        self._tapes: dict[tuple[object, ...], Tape] = {}
        self._works = True

    def invalidate(self) -> None:
        self._tapes.clear()

    def step(self, images: Tensor, labels: Tensor) -> None:
        loop = self._loop
        if not self._works or loop.num_classes == 0:
            loop.step(images, labels)
            return
        images = loop.place(images)
        loop.check_host_labels(labels)
        form = tuple((x.shape, x.dtype, x.stride()) for x in (images, labels))
        tape = self._tapes.get(form)
        if tape is not None:
            loss, correct = tape.replay(images, labels)
        elif len(self._tapes) < MAX_SHAPES:
            (loss, correct), found = record(loop.host_step, (images, labels), loop.tensors())
            if isinstance(found, Tape):
                self._tapes[form] = found
            else:
                self._give_up(found)
        else:
            loss, correct = loop.host_step(images, labels)
        loop.note_step(loss, correct, len(images))

    def _give_up(self, reason: NotRecordedError) -> None:
        self._works = False
        self._tapes.clear()
        warnings.warn(
            f"search: a step on the CPU must be tensor operations alone for a recording of it to be replayed, but {reason}; going on "
            "without one, which is slower; change that operation, or set SearchConfig(cpu_graph=False)",
            RuntimeWarning,
            stacklevel=2,
        )


@dataclass
class _Shape:
    """Batches of one form: how many were stepped, and their recorded step over buffers at fixed addresses."""

    warm: int = 0
    images: Tensor | None = None
    labels: Tensor | None = None
    graph: Graph | None = None


class _Recorder:
    """Captures work where that is possible; says once why it is not, and then never tries again."""

    def __init__(self, graphs: Graphs) -> None:
        self._graphs = graphs
        self.works = True
        self._seen_waiting = False

    def last_warm_step(self, step: Callable[[], None]) -> bool:
        """Takes the step before a capture, and says whether one may follow; gives up where it waits for the device.

        What waits is seen for the whole process, so that another thread may have been it: the next step is looked at, too.
        """
        reason = self._graphs.waits(step)
        if reason is not None and self._seen_waiting:
            self._give_up(reason)
        self._seen_waiting = reason is not None
        return reason is None

    def capture(self, work: Callable[[], None]) -> Graph | None:
        if not self.works:
            return None
        try:
            return self._graphs.capture(work)
        except RuntimeError as error:
            self._give_up(f"{type(error).__name__}: {error}")
            return None

    def _give_up(self, reason: str) -> None:
        self.works = False
        warnings.warn(
            f"search: the step must be capturable in a CUDA graph, where nothing waits for the device, got {reason}; going on "
            "without one, which is slower; change that operation, or set SearchConfig(cuda_graph=False)",
            RuntimeWarning,
            stacklevel=2,
        )


class GraphRunner(EagerRunner):
    """Replays a recorded step for batches of any loader, copied into fixed buffers.

    Each shape of a batch has a graph of its own, captured after ``WARMUP`` steps and again after ``invalidate``.

    Args:
        loop: The loop.
        graphs: Records the device's work.
        transfer: Brings batches to the device; None: as the loop does it.
    """

    def __init__(self, loop: SearchLoop, graphs: Graphs, transfer: Transfer | None = None) -> None:
        super().__init__(loop, transfer)
        self._recorder = _Recorder(graphs)
        self._shapes: dict[tuple[object, ...], _Shape] = {}

    def invalidate(self) -> None:
        for shape in self._shapes.values():
            if shape.graph is not None:
                shape.graph.reset()
        self._shapes.clear()

    def step(self, images: Tensor, labels: Tensor) -> None:
        loop = self._loop
        trusted = labels.device.type == "cpu"  # checked there, in _fill
        key = (images.shape, labels.shape, labels.dtype, trusted)
        shape = self._shapes.get(key)
        if shape is None and len(self._shapes) < MAX_SHAPES:
            shape = self._shapes[key] = _Shape()
        if shape is None or not self._recorder.works:
            loop.step(images, labels)
            return
        if shape.graph is None:
            shape.warm += 1
            if shape.warm < WARMUP:
                loop.step(images, labels)
                return
            if shape.warm == WARMUP:
                self._warm_up(shape, images, labels, trusted)
                return
            shape.graph = self._recorder.capture(
                lambda: loop.device_step(shape.images, shape.labels, trusted=trusted)
            )
            if shape.graph is None:
                if self._transfer is not None:
                    self._transfer.stay_in_stream()
                loop.step(images, labels)
                return
        self._fill(shape, images, labels)
        shape.graph.replay()
        loop.count_step(len(images))

    def _warm_up(self, shape: _Shape, images: Tensor, labels: Tensor, trusted: bool) -> None:
        """The last step before a capture, over the buffers that it will read."""
        loop = self._loop
        shape.images = torch.empty_like(loop.place(images))
        shape.labels = torch.empty_like(labels, device=loop.device)
        self._fill(shape, images, labels)
        if not self._recorder.last_warm_step(
            lambda: loop.device_step(shape.images, shape.labels, trusted=trusted)
        ):
            shape.warm -= 1
        loop.count_step(len(images))

    def _fill(self, shape: _Shape, images: Tensor, labels: Tensor) -> None:
        self._loop.check_host_labels(labels)
        shape.images.copy_(self._loop.place(images), non_blocking=True)
        shape.labels.copy_(labels, non_blocking=True)


@dataclass
class _Recorded:
    warm: int = 0
    graphs: dict[int, Graph] = field(default_factory=dict)  # steps in the graph -> graph


class FeedRunner:
    """Replays recorded steps that make their own batches from images on the device, several in one graph.

    A last batch that is smaller than the others is stepped without a graph.

    Args:
        loop: The loop.
        graphs: Records the device's work.
        feed: Makes the batches.
        steps_per_replay: Steps in the larger of the two graphs; the other one has a single step.
    """

    def __init__(
        self,
        loop: SearchLoop,
        graphs: Graphs,
        feed: DeviceFeed,
        steps_per_replay: int = STEPS_PER_REPLAY,
    ) -> None:
        self._loop, self._feed, self._steps_per_replay = loop, feed, steps_per_replay
        self._recorder = _Recorder(graphs)
        self._recorded = _Recorded()

    def run(
        self, batches: Batches, most: int | None, until_look: Callable[[], int]
    ) -> Iterator[int]:
        feed = self._feed
        feed.start(self._loop.state.epoch)
        left = len(feed) if most is None else min(most, len(feed))
        while left > 0:
            taken = self._run_some(min(left, max(feed.full_left, 1), until_look()))
            left -= taken
            yield taken

    def invalidate(self) -> None:
        for graph in self._recorded.graphs.values():
            graph.reset()
        self._recorded = _Recorded()

    def _run_some(self, most: int) -> int:
        """Takes between one step and ``most``; ``most`` ends within the full batches, or is 1."""
        feed, recorded = self._feed, self._recorded
        if feed.full_left == 0:
            self._loop.step(*feed.rest())
            return 1
        if not self._recorder.works or recorded.warm < WARMUP:
            recorded.warm += 1
            if recorded.warm == WARMUP and self._recorder.works:
                if not self._recorder.last_warm_step(self._device_step):
                    recorded.warm -= 1
                self._loop.count_step(feed.batch_size)
            else:
                self._loop.step(*feed.make())
            feed.count(1)
            return 1
        steps = self._steps_per_replay if most >= self._steps_per_replay else 1
        graph = recorded.graphs.get(steps)
        if graph is None:
            graph = self._recorder.capture(lambda: self._device_steps(steps))
            if graph is None:
                return self._run_some(most)
            recorded.graphs[steps] = graph
        graph.replay()
        for _ in range(steps):
            self._loop.count_step(feed.batch_size)
        feed.count(steps)
        return steps

    def _device_steps(self, steps: int) -> None:
        for _ in range(steps):
            self._device_step()

    def _device_step(self) -> None:
        images, labels = self._feed.make()
        trusted = self._feed.num_classes <= self._loop.num_classes
        self._loop.device_step(images, labels, trusted=trusted)


def make_runner(loop: SearchLoop, loader: object) -> Runner:
    """The fastest runner for a loop and its loader."""
    # Python of the user's in the step must run in every one.
    graphs = _graphs(loop) if foreign_code(loop.network.train_net) is None else None
    if graphs is not None and DeviceFeed.serves(loader, loop.device):
        runner: Runner = FeedRunner(loop, graphs, DeviceFeed(loader))
    else:
        transfer = CudaTransfer(loop.device) if loop.device.type == "cuda" else None
        if graphs is not None:
            runner = GraphRunner(loop, graphs, transfer)
        elif _has_tape(loop):
            runner = TapeRunner(loop)
        else:
            runner = EagerRunner(loop, transfer)
    # Also without graphs, so that the same seed narrows at the same step and gives the same gates.
    loop.compaction.recapture_steps = RECAPTURE_STEPS if loop.deferred else 0.0
    return runner


def _has_tape(loop: SearchLoop) -> bool:
    return (
        loop.device.type == "cpu"
        and not loop.deferred
        and loop.config.cpu_graph
        and can_record()
        and foreign_code(loop.network.train_net) is None
    )


def _graphs(loop: SearchLoop) -> Graphs | None:
    return CudaGraphs() if loop.device.type == "cuda" and loop.config.cuda_graph else None
