"""How well a latency limit is met: structures for several limits, timed again by plain code in turns with the whole network.

Run: ``python -m benchmarks.experiments.latency --network mobilenet_v2 resnet50 --threads 2 --out runs/latency``. The gates are random: what is asked
here is whether the limit holds, not which channels go. Each line that is printed is also a row of ``latency.csv``.
"""

from __future__ import annotations

import argparse
import copy
import csv
import statistics
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

import pfs_fast as pfs
from benchmarks.machine import Machine
from pfs_fast.gating.scope import gated_groups
from pfs_fast.graph.analysis import channel_graph

ROUNDS = 41
# (share of the whole network's latency, share of its MACs); the second limit is the tighter one in the last case
LIMITS = ((0.8, 0.9), (0.65, 0.9), (0.5, 0.9), (0.9, 0.4))


def result_of(name: str, scope: str) -> tuple[pfs.SearchResult, nn.Module]:
    """A search that never ran: random gates of a torchvision network at 224x224."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(name)
    image = torch.zeros(1, 3, 224, 224)
    groups = gated_groups(channel_graph(model, (image,)), model, scope)
    whole = pfs.count(model, image)
    gates, died_at = torch.rand(groups.num_units), torch.full((groups.num_units,), -1)
    result = pfs.SearchResult(
        groups,
        gates,
        died_at.int(),
        pfs.Budget(0.5),
        (whole.macs, whole.params),
        pfs.SearchConfig(scope=scope, ranking="gates"),
        model=model,
        input_shape=(3, 224, 224),
    )
    return result, model


def settled(network: nn.Module, image: Tensor) -> nn.Module:
    """A copy whose batch norms have the statistics of random images: others let activations fade to subnormal numbers, which are slow."""
    network = copy.deepcopy(network).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None
    with torch.no_grad():
        network(torch.randn(4, *image.shape[1:]))
    return network.eval()


def in_turns(slim: nn.Module, whole: nn.Module, image: Tensor) -> dict[str, list[float]]:
    """Milliseconds of both networks, one after the other, the first three rounds left out."""
    times: dict[str, list[float]] = {"slim": [], "whole": []}
    with torch.inference_mode():
        for number in range(ROUNDS + 3):
            for name, network in (("slim", slim), ("whole", whole)):
                start = time.perf_counter()
                network(image)
                if number >= 3:
                    times[name].append((time.perf_counter() - start) * 1e3)
    return times


def measure(name: str, scope: str) -> list[dict[str, object]]:
    result, model = result_of(name, scope)
    start = time.perf_counter()
    latency = result.meters.latency(pfs.Budget(latency_ms=1.0, device="cpu").run)
    table_s = time.perf_counter() - start
    rows = []
    for share, macs in LIMITS:
        whole = latency.measure(model)  # now: the machine's pace changes
        limit = round(share * whole.median, 2)
        start = time.perf_counter()
        structure = result.structure_for(pfs.Budget(latency_ms=limit, macs=macs, device="cpu"))
        seconds = time.perf_counter() - start
        check = next(c for c in structure.limits if c.name == "latency_ms")
        image = torch.randn(1, 3, 224, 224)
        slim = settled(pfs.slim(model, structure, seed=1), image)
        times = in_turns(slim, settled(model, image), image)
        low, again, high = statistics.quantiles(times["slim"], n=4)
        rows.append(
            {
                "network": name,
                "scope": scope,
                "limit_ms": limit,
                "limit_share": share,
                "macs_limit": macs,
                "macs_share": structure.macs_share,
                "predicted_ms": check.predicted,
                "measured_ms": check.measured,
                "spread_ms": check.spread,
                "of_limit": check.measured / limit,
                "again_ms": again,
                "again_p25": low,
                "again_p75": high,
                "again_of_limit": again / limit,
                "whole_ms": whole.median,
                "whole_again_ms": statistics.median(times["whole"]),
                "table_s": table_s,
                "seconds": seconds,
            }
        )
        print(
            "  ".join(
                f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in rows[-1].items()
            ),
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--network", nargs="+", default=["mobilenet_v2", "resnet50"])
    parser.add_argument("--scope", default="all", choices=("paper", "all"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = Machine.here(torch.device("cpu"))
    rows = [row for name in options.network for row in measure(name, options.scope)]
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "latency.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], *asdict(machine)])
        writer.writeheader()
        writer.writerows({**row, **asdict(machine)} for row in rows)


if __name__ == "__main__":
    main()
