"""One whole step of the gate search (forward, backward, gate update) by every variant."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import pfs_fast as pfs
from benchmarks.baselines import PlainSearch, compiled_reason, cudnn_reason
from benchmarks.footprint import peak_bytes, saved_bytes
from benchmarks.settings import Settings
from benchmarks.timing import Clock, Variant
from pfs_fast._cuda_settings import cuda_settings
from pfs_fast.gating.scope import Site, gate_sites, gated_groups
from pfs_fast.graph.analysis import channel_graph
from pfs_fast.graph.groups import ChannelGroups
from pfs_fast.searching.config import PRECISIONS
from pfs_fast.searching.graphs import side_stream
from pfs_fast.searching.kept_memory import KeptMemory
from pfs_fast.searching.loop import SearchLoop
from pfs_fast.searching.plan import prepare
from pfs_fast.searching.runner import GraphRunner, make_runner

CAPTURED_AFTER = 5
"""Steps after which every later one is a replay: those of the warm-up, and the one that is captured."""

EAGER = " eager"
"""Ends the name of a variant whose step is made call by call, where the variant itself is a replay."""


@dataclass(frozen=True)
class Step:
    """A step that can be taken on any batch.

    Attributes:
        take: Takes it.
        network: Whose weights and buffers do not count as activations.
        precision: Of convolutions and activations.
        channels_last: Layout of the images.
        eager: Whether memory can be seen, which a compiler hides.
        by_autograd: The same step where ``take`` does without autograd, whose memory is asked for too; None: ``take``.
        around: What a step runs in, its clock included.
        captured: Whether ``take`` replays a CUDA graph, whose memory is set aside at the capture: it is that of ``by_autograd``.
    """

    take: Callable[[Tensor, Tensor], None]
    network: nn.Module
    precision: str
    channels_last: bool
    eager: bool = True
    by_autograd: Callable[[Tensor, Tensor], None] | None = None
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    captured: bool = False

    def place(self, images: Tensor) -> Tensor:
        """Images as the step wants them."""
        layout = torch.channels_last if self.channels_last else torch.contiguous_format
        return images.to(PRECISIONS[self.precision]).contiguous(memory_format=layout)

    def timed(self, images: Tensor, labels: Tensor) -> Variant:
        """The step on one batch, for the timer: the second of two, since in a search a step follows its like.

        Of a graph, the one after those that it takes to capture it.
        """
        placed = self.place(images)
        before = iter([CAPTURED_AFTER] if self.captured else [])

        def run(clock: Clock) -> None:
            with self.around():
                for _ in range(next(before, 1)):
                    self.take(placed, labels)
                clock.restart()
                self.take(placed, labels)
                clock.lap("step")

        return run

    def footprint(self, images: Tensor, labels: Tensor) -> tuple[int | None, int | None]:
        """``(saved bytes, peak bytes)`` of a step that is not the first; (None, None) where they cannot be seen."""
        if not self.eager:
            return None, None
        placed = self.place(images)
        weights = [*self.network.parameters(), *self.network.buffers()]
        by_autograd = self.by_autograd or self.take
        take = by_autograd if self.captured else self.take
        with self.around():
            saved = saved_bytes(lambda: by_autograd(placed, labels), without=weights)
            take(placed, labels)  # the step before, which may be recorded
            return saved, peak_bytes(lambda: take(placed, labels), images.device)


@dataclass(frozen=True)
class Steps:
    """The variants of one network, and those that were not run with the reason."""

    steps: dict[str, Step]
    skipped: dict[str, str]
    norms: tuple[str, ...]


def gate_places(model: nn.Module, size: int) -> tuple[ChannelGroups, tuple[Site, ...]]:
    """The paper's gates of a model: groups, and the batch norms that they follow."""
    graph = channel_graph(model, (torch.zeros(1, 3, size, size),))
    groups = gated_groups(graph, model, "paper")
    return groups, gate_sites(graph, groups, "paper")


def _as_in_search(loop: SearchLoop, precision: str) -> dict[str, Step]:
    """The step as ``pfs_fast.search`` takes it: with its memory, its runner, and on CUDA its stream and settings.

    Where that is a replay of a CUDA graph, the step call by call is a variant of its own.
    """
    memory = KeptMemory()
    runner = make_runner(loop, None)
    device = loop.device
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @contextmanager
    def around() -> Iterator[None]:
        with side_stream(device, stream), cuda_settings(device, repeatable=True):
            yield

    def inside(step: Callable[[Tensor, Tensor], None]) -> Callable[[Tensor, Tensor], None]:
        def run(images: Tensor, labels: Tensor) -> None:
            with memory:
                step(images, labels)

        return run

    ours = Step(
        inside(runner.step),
        loop.network,
        precision,
        channels_last=True,
        by_autograd=inside(loop.step),
        around=around,
        captured=isinstance(runner, GraphRunner),
    )
    if not ours.captured:
        return {"ours": ours}
    return {"ours": ours, "ours" + EAGER: replace(ours, take=ours.by_autograd, captured=False)}


def all_steps(
    model: nn.Module, images: Tensor, settings: Settings, *, target: float = 0.5
) -> Steps:
    """Every variant over the same weights.

    Args:
        images: A batch on the device. [N, 3, H, W], float32.
        target: Mean gate aimed at.
    """
    device, native = settings.device, settings.native
    config = pfs.SearchConfig(target=target, compact=False)
    loop = prepare(model, images, pfs.Budget(0.5, multiple_of=1), config, device=device).loop
    norms = loop.bank.layers
    shared = {"device": device, "target": target}
    naive = PlainSearch.naive(model, norms, **shared)
    folded = PlainSearch.best(model, norms, dtype=PRECISIONS[native], **shared)
    if folded.flat.numel() != loop.num_gates:
        raise ValueError(
            f"all_steps: the baselines must have the {loop.num_gates} gates of the search, got {folded.flat.numel()}; "
            "gates of a group at several layers are not written here"
        )
    steps = {
        "naive": Step(naive.step, naive.network, "fp32", channels_last=False),
        "folded": Step(folded.step, folded.network, native, channels_last=True),
        **_as_in_search(loop, native),
    }
    skipped = {"cudnn": cudnn_reason(device)}
    reason = compiled_reason(device, settings.compiled)
    if reason is None:
        compiled = PlainSearch.best(model, norms, dtype=PRECISIONS[native], **shared)
        compiled.compile()
        steps["compiled"] = Step(compiled.step, compiled.network, native, True, eager=False)
    else:
        skipped["compiled"] = reason
    return Steps(steps, skipped, norms)
