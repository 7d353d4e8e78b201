"""The paper's method in a few lines of plain PyTorch, written from its description alone: the oracle of the search tests.

Nothing here imports the package. Gates are parameters of a ``torch.optim.Adam``, multiplied in by forward hooks after the
batch norm that follows each gated convolution; weights keep their ``requires_grad`` and are only left out of the optimiser.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class PlainSearch:
    """Gates by convolution name, the step at which each died (-1: alive), and the cross-entropy of each step."""

    gates: dict[str, Tensor]
    died_at: dict[str, Tensor]
    losses: list[float] = field(default_factory=list)


def norm_after(conv: str) -> str:
    """Name of the batch norm behind a convolution: ``conv`` -> ``bn``, ``conv1`` -> ``bn1``."""
    parent, _, name = conv.rpartition(".")
    return f"{parent}.{name.replace('conv', 'bn')}"


def plain_search(
    model: nn.Module,
    gated: Sequence[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    *,
    gamma: float,
    target: float,
    lr: float = 0.01,
) -> PlainSearch:
    """One step on every batch, in float64, with batch statistics and the whole graph's gradients."""
    model = copy.deepcopy(model).double().train()
    modules = dict(model.named_modules())
    gates = {name: nn.Parameter(torch.ones(modules[name].out_channels).double()) for name in gated}
    for name, gate in gates.items():
        modules[norm_after(name)].register_forward_hook(
            lambda _module, _inputs, out, gate=gate: out * gate.view(1, -1, 1, 1)
        )
    optimizer = torch.optim.Adam(gates.values(), lr=lr)
    found = PlainSearch(
        {name: gate.data for name, gate in gates.items()},
        {name: torch.full((len(gate),), -1) for name, gate in gates.items()},
    )
    for step, (images, labels) in enumerate(batches, start=1):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images.double()), labels)
        mean_gate = torch.cat(list(gates.values())).abs().mean()
        (loss + gamma * (mean_gate - target) ** 2).backward()
        optimizer.step()
        found.losses.append(loss.item())
        for name, gate in gates.items():
            gate.data.clamp_(0, 1)
            newly = (gate.data == 0) & (found.died_at[name] < 0)
            found.died_at[name][newly] = step
            found.died_at[name][gate.data > 0] = -1
    return found
