"""What a user waits for on the CPU before and after a search: the channel groups of a network, and a structure for a budget.

- groups: ``pfs_fast.graph.analysis.analyse``, from a model to its prunable groups. ResNet-50 on the meta device with 1, 2 and 4 times the
  channels shows how the time grows with them.
- structures: ``SearchResult.structure_for`` on random gates of ResNet-50, half of them dead, for one limit after another.

Images of 224x224, 1,000 classes. No baseline does the same: the table has times and the limits that the project sets itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor, nn

import pfs_fast as pfs
from benchmarks.settings import Settings
from benchmarks.tables import Case, timing_columns
from benchmarks.timing import Clock, Variant, time_variants
from pfs_fast.graph.analysis import analyse
from pfs_fast.searching.plan import prepare

GROUPS = "From a model to its channel groups"
STRUCTURES = "`structure_for` on a search of ResNet-50"
STRUCTURE_LIMIT_MS = 10.0
CPU = torch.device("cpu")


def _wide(expansion: float) -> nn.Module:
    with torch.device("meta"):
        return pfs.models.get("resnet50", num_classes=1000, expansion=expansion)


# name: (model, milliseconds at most, None where it is there for comparison)
MODELS: dict[str, tuple[Callable[[], nn.Module], float | None]] = {
    "resnet50": (lambda: torchvision.models.resnet50(), 1000.0),
    "densenet201": (lambda: torchvision.models.densenet201(), 3000.0),
    "resnet50 x1, meta": (lambda: _wide(1.0), None),
    "resnet50 x2, meta": (lambda: _wide(2.0), None),
    "resnet50 x4, meta": (lambda: _wide(4.0), None),
}
BUDGETS: dict[str, pfs.Budget] = {
    **{f"macs {share}": pfs.Budget(share, multiple_of=1) for share in (0.1, 0.3, 0.5, 0.7, 0.9)},
    "params 0.3": pfs.Budget(params=0.3, multiple_of=1),
    "macs 0.5, params 0.4": pfs.Budget(0.5, params=0.4, multiple_of=1),
    "macs 0.5, preferred multiple": pfs.Budget(0.5),
    "macs 0.5, multiples of 8": pfs.Budget(0.5, multiple_of=8),
}


def run(settings: Settings) -> Iterator[Case]:
    if settings.device.type != "cpu":
        yield Case([], {GROUPS: [{"not run": "analysis runs on the CPU, whatever the device"}]})
        return
    for name, (build, limit) in MODELS.items():
        yield _groups(name, build(), limit, settings)
    yield _structures(settings)


def _groups(name: str, model: nn.Module, limit: float | None, settings: Settings) -> Case:
    image = torch.zeros(1, 3, 224, 224, device=next(model.parameters()).device)
    found = analyse(model, image)
    lines = {"network": name, "units": found.num_units, "groups": len(found.groups)}
    return _timed(GROUPS, {name: lambda: analyse(model, image)}, {name: lines}, limit, settings)


def _structures(settings: Settings) -> Case:
    generator = torch.Generator().manual_seed(0)

    def random(units: int) -> Tensor:
        return torch.rand(units, generator=generator)

    plan = prepare(
        torchvision.models.resnet50(),
        torch.zeros(2, 3, 224, 224),
        pfs.Budget(0.5),
        pfs.SearchConfig(precision="fp32", scope="all"),
        device=CPU,
    )
    units = plan.groups.num_units
    gates, died = random(units), (random(units) * 1000).long()
    alive = random(units) < 0.5
    result = plan.result((torch.where(alive, gates, 0), torch.where(alive, -1, died)))
    lines = {}
    for name, budget in BUDGETS.items():
        cut = result.structure_for(budget)
        lines[name] = {"limit": name, "MACs kept": cut.macs, "parameters kept": cut.params}
    calls = {name: _call(result, budget) for name, budget in BUDGETS.items()}
    return _timed(STRUCTURES, calls, lines, STRUCTURE_LIMIT_MS, settings)


def _call(result: pfs.SearchResult, budget: pfs.Budget) -> Callable[[], object]:
    return lambda: result.structure_for(budget)


def _timed(
    title: str,
    calls: dict[str, Callable[[], object]],
    lines: dict[str, dict[str, object]],
    limit: float | None,
    settings: Settings,
) -> Case:
    """One row and one line for each call, all in turn."""

    def variant(call: Callable[[], object]) -> Variant:
        def timed(clock: Clock) -> None:
            call()
            clock.lap("call")

        return timed

    variants = {name: variant(call) for name, call in calls.items()}
    timings = time_variants(variants, device=CPU, effort=settings.profile.effort)
    rows = []
    for name, line in lines.items():
        time = timings.time(name)
        columns = timing_columns(time, None)
        rows.append({"what": title, "case": name, **columns, "limit_ms": limit})
        line["ms"] = time
        line["at most ms"] = limit
        line["met"] = None if limit is None else "yes" if time.high <= limit else "no"
    return Case(rows, {title: list(lines.values())})
