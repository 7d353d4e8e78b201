"""Which channels deserve the budget? Cuts one search by several rules to equal MACs, and trains what each rule leaves.

Run: ``python -m benchmarks.experiments.ranking --data cifar10.npz --network resnet20 --out runs/ranking``. Every search and every
training is written when it ends, and skipped when the command is given again; ``--known FILE.jsonl`` skips those of an earlier
experiment, too. ``--worker 0/2`` and ``--worker 1/2`` share the trainings between two processes. ``--report`` prints the table of
what is there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import pfs_fast as pfs
from benchmarks.experiments.fused_training import fused
from benchmarks.experiments.ranking_rules import RULES, Measured, rule_of
from pfs_fast.budgets.cost import CostModel
from pfs_fast.budgets.solver import solve
from pfs_fast.budgets.structure import Structure
from pfs_fast.graph.groups import ChannelGroups
from pfs_fast.searching.loop import SearchLoop
from pfs_fast.searching.plan import prepare
from pfs_fast.storage.files import write_text_atomic


@dataclass(frozen=True)
class Network:
    """A network of ``pfs_fast.models``.

    Attributes:
        factory: Its name there.
        width: Factor on the paper's widths of the network that shares of MACs refer to.
        expansion: What it is widened by for the search, so that a layer may end wider than it was.
    """

    factory: str
    width: float = 1.0
    expansion: float = 1.0

    def build(self) -> nn.Module:
        return pfs.models.get(self.factory, num_classes=10, expansion=self.width * self.expansion)

    def reference(self) -> tuple[int, int]:
        """(MACs, parameters) that shares refer to."""
        whole = pfs.models.get(self.factory, num_classes=10, expansion=self.width)
        cost = pfs.count(whole, torch.zeros(1, 3, 32, 32))
        return cost.macs, cost.params


NETWORKS = {
    "resnet20": Network("resnet20"),
    "vgg16-0.25": Network("vgg16", 0.25),
    "vgg16-0.25x1.25": Network("vgg16", 0.25, 1.25),
}
# Short trainings scatter: an annealed rate and averaged weights take a good part of it away.
RECIPE = {
    "lr": 0.1,
    "nesterov": True,
    "weight_decay": 5e-4,
    "schedule": "cosine",
    "ema": 0.998,
}
RATES = 25  # learning rates of a training
SEARCH_BATCH = 128  # images
REPEAT_SEEDS = 1000  # between the seeds of two trainings of one structure
WATCHED_STEPS = 50  # steps at either end whose gradients are averaged


def network(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return NETWORKS[name].build()


class Pieces:
    """A loader's batches without end, so many at each pass: an "epoch" of `pfs.train` is a piece of a pass over the data, and
    the learning rate may change several times within it."""

    def __init__(self, loader: pfs.data.DeviceLoader, batches: int) -> None:
        self._batches = batches
        self._endless = self._passes(loader)

    @staticmethod
    def _passes(loader: pfs.data.DeviceLoader) -> Iterator[tuple[Tensor, Tensor]]:
        for epoch in itertools.count():
            loader.set_epoch(epoch)
            yield from loader

    def __len__(self) -> int:
        return self._batches

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return itertools.islice(self._endless, self._batches)


def loaders(
    path: Path, batch: int, seed: int
) -> tuple[pfs.data.DeviceLoader, pfs.data.DeviceLoader]:
    """All training images, and all test images."""
    data = np.load(path)
    statistics = {"mean": pfs.data.CIFAR10_MEAN, "std": pfs.data.CIFAR10_STD, "num_classes": 10}
    train = pfs.data.DeviceLoader(
        data["x_train"],
        data["y_train"],
        batch,
        train=True,
        seed=seed,
        drop_last=True,
        **statistics,
    )
    test = pfs.data.DeviceLoader(data["x_test"], data["y_test"], 500, train=False, **statistics)
    return train, test


def search(
    name: str, seed: int, train: pfs.data.DeviceLoader, steps: int, target: float
) -> Measured:
    """The gate search with scope "all", and the gradients that it passed by."""
    config = pfs.SearchConfig(scope="all", target=target, precision="fp32", seed=seed)
    first = next(iter(train))[0]
    plan = prepare(
        network(name, seed),
        first,
        pfs.Budget(target, multiple_of=1),
        config,
        device=torch.device("cpu"),
    )
    loop, watched = plan.loop, {"early": [], "late": []}
    torch.manual_seed(seed)
    epoch = 0
    while loop.state.steps < steps:
        train.set_epoch(epoch)
        for images, labels in train:
            if loop.state.steps == steps:
                break
            before = loop.gates()[0]
            loop.step(images, labels)
            for part, there in (
                ("early", loop.state.steps <= WATCHED_STEPS),
                ("late", loop.state.steps > steps - WATCHED_STEPS),
            ):
                if there:
                    watched[part].append((before * _whole(plan.loop, loop.bank.grad)).abs())
            if loop.state.steps % 10 == 0:
                loop.compact(steps - loop.state.steps)
        epoch += 1
    loop.entry()
    gates, died_at = loop.gates()
    return Measured(
        plan.groups,
        gates.double().numpy(),
        died_at.long().numpy(),
        *(torch.stack(watched[part]).mean(0).double().numpy() for part in ("early", "late")),
    )


def _whole(loop: SearchLoop, gradient: Tensor) -> Tensor:
    """A gradient of the gates present, with zeros for those that were left out."""
    return loop.compaction.whole(gradient.clone(), loop.state.gates.died_at)[0]


def measured(
    out: Path, name: str, seed: int, train: pfs.data.DeviceLoader, steps: int, target: float
) -> Measured:
    """The one search of a seed, from which every rule cuts at every share: run once, then read."""
    path = out / f"search-{name}-{seed}-{target}.npz"
    if not path.exists():
        found = search(name, seed, train, steps, target)
        whole = path.with_suffix(".part.npz")
        np.savez(
            whole, gates=found.gates, died_at=found.died_at, early=found.early, late=found.late
        )
        os.replace(whole, path)
        return found
    return Measured(groups_of(name, seed), **np.load(path))


def groups_of(name: str, seed: int) -> ChannelGroups:
    config = pfs.SearchConfig(scope="all", precision="fp32")
    images = torch.zeros(2, 3, 32, 32)
    return prepare(
        network(name, seed),
        images,
        pfs.Budget(1.0, multiple_of=1),
        config,
        device=torch.device("cpu"),
    ).groups


def structure(
    found: Measured, rule: str, share: float, reference: tuple[int, int] | None = None
) -> Structure:
    """What a rule keeps; ``reference``: (MACs, parameters) that the share refers to, by default the searched network's."""
    score = rule_of(rule)(found)
    model = CostModel(found.groups)
    limits = pfs.Budget(share, multiple_of=1).resolve(reference or model.base)
    nobody_died = np.full(found.groups.num_units, -1)
    keep = solve(found.groups, score / score.max(), nobody_died, limits, model)
    return Structure.from_keep(found.groups, keep, model)


def train_one(
    arguments: argparse.Namespace, name: str, seed: int, share: float, rule: str, repeat: int
) -> dict:
    own = seed + REPEAT_SEEDS * repeat  # of fresh weights and the order of images
    searched, _ = loaders(arguments.data, SEARCH_BATCH, seed)
    train, test = loaders(arguments.data, arguments.batch, own)
    found = measured(arguments.out, name, seed, searched, arguments.steps, arguments.target)
    cut = structure(found, rule, share, NETWORKS[name].reference())
    slim = pfs.slim(network(name, seed), cut, seed=own)
    started = time.perf_counter()
    config = pfs.TrainConfig(epochs=RATES, seed=own, **RECIPE)
    batches = arguments.images // (RATES * arguments.batch)
    pfs.train(fused(slim), Pieces(train, batches), config=config, progress=False)
    accuracy = pfs.evaluate(slim, test)
    return {
        "network": name,
        "seed": seed,
        "share": share,
        "rule": rule,
        "repeat": repeat,
        "accuracy": float(getattr(accuracy, "top1", accuracy)),
        "macs": cut.macs,
        "params": cut.params,
        "widths": [len(kept) for kept in cut.kept.values()],
        "images": trained_images(arguments.images, arguments.batch),
        "batch": arguments.batch,
        "recipe": RECIPE,
        "steps": arguments.steps,
        "target": arguments.target,
        "seconds": round(time.perf_counter() - started, 1),
        "torch": torch.__version__,
    }


def known_rows(path: Path, images: int, batch: int) -> dict[tuple, dict]:
    """Trainings of an earlier experiment of as many images with this recipe, by `case_of`."""
    rows = [{"repeat": 0, **json.loads(line)} for line in path.read_text().splitlines()]
    return {
        case_of(row): row
        for row in rows
        # A row without a recipe is of one that nobody noted.
        if row["images"] == trained_images(images, batch)
        and "recipe" in row
        and row["recipe"].items() <= RECIPE.items()
    }


def case_of(row: dict) -> tuple:
    """What a row is a training of."""
    return tuple(row[key] for key in ("network", "seed", "share", "rule", "repeat"))


def trained_images(images: int, batch: int) -> int:
    """Images of a training of whole batches, as many at each learning rate."""
    return images // (RATES * batch) * RATES * batch


def report(rows: list[dict]) -> str:
    """Accuracy by rule, best first, and its difference to equal shares of the same seed; trainings of one structure are
    averaged first, and the random structures count as one rule."""
    lines = []
    for name, share in sorted({(r["network"], r["share"]) for r in rows}):
        here = [r for r in rows if (r["network"], r["share"]) == (name, share)]
        lines += [
            "",
            f"**{name}, {share:.0%} of the MACs** ({here[0]['images']:,} images)",
            "",
            "| rule | accuracy % | n | to uniform | its standard deviation | n | params |",
            "|---|---|---|---|---|---|---|",
        ]
        by_rule: dict[str, dict[tuple[int, str], list[dict]]] = {}
        for row in here:
            title = re.sub(r"^random-.*", "random", row["rule"])
            by_rule.setdefault(title, {}).setdefault((row["seed"], row["rule"]), []).append(row)
        even = {seed: _accuracy(own) for (seed, _), own in by_rule.get("uniform", {}).items()}
        for title, structures in sorted(
            by_rule.items(), key=lambda item: -np.mean([_accuracy(own) for own in item[1].values()])
        ):
            found = {key: _accuracy(own) for key, own in structures.items()}
            gains = [value - even[seed] for (seed, _), value in found.items() if seed in even]
            gain = f"{np.mean(gains):+.2f}" if gains else "-"
            spread = f"{np.std(gains, ddof=1):.2f}" if len(gains) > 1 else "-"
            params = np.mean([row["params"] for own in structures.values() for row in own])
            lines.append(
                f"| {title} | {np.mean(list(found.values())):.2f} | {len(found)} | {gain} | {spread} | {len(gains)} | "
                f"{params:,.0f} |"
            )
    return "\n".join(lines)


def _accuracy(rows: list[dict]) -> float:
    """Mean of the trainings of one structure, in %."""
    return 100 * float(np.mean([row["accuracy"] for row in rows]))


def rule_name(text: str) -> str:
    """A rule's name as the command line gives it."""
    try:
        rule_of(text)
    except KeyError:
        known = ", ".join(RULES)
        raise argparse.ArgumentTypeError(
            f"must be one of {known}, share:gates|early|late^P/macs^C, shape:SLOPE,ENDS,TRUNK or "
            f"weights:W,W,..., got {text}"
        ) from None
    return text


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help=".npz file with x_train, y_train, x_test, y_test")
    parser.add_argument("--out", type=Path, required=True, help="folder of searches and results")
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=NETWORKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--rules", nargs="+", default=list(RULES), type=rule_name)
    parser.add_argument("--steps", type=int, default=1000, help="steps of the search")
    parser.add_argument("--target", type=float, default=0.5, help="share of gates of the search")
    parser.add_argument("--images", type=int, default=250_000, help="images of each training")
    parser.add_argument("--repeats", type=int, default=1, help="trainings of each structure")
    parser.add_argument("--batch", type=int, default=64, help="images of a training step")
    parser.add_argument("--worker", default="0/1", metavar="I/N", help="take every N-th training")
    parser.add_argument("--known", type=Path, help="rows of an earlier experiment, a .jsonl file")
    parser.add_argument("--report", action="store_true", help="only print the table")
    chosen = parser.parse_args()
    if chosen.data is None and not chosen.report:
        parser.error("argument --data must name an .npz file, got none; --report alone needs none")
    index, _, workers = chosen.worker.partition("/")
    if not (index.isdigit() and workers.isdigit() and int(index) < int(workers)):
        parser.error(f"argument --worker must be I/N with I below N, got {chosen.worker}")
    return chosen


def main() -> None:
    arguments = parse_arguments()
    arguments.out.mkdir(parents=True, exist_ok=True)
    known = {}
    if arguments.known is not None:
        known = known_rows(arguments.known, arguments.images, arguments.batch)
    if not arguments.report:
        index, workers = (int(part) for part in arguments.worker.split("/"))
        # Seed by seed, so that a broken-off experiment has whole seeds.
        cases = [
            (name, seed, share, rule, repeat)
            for seed in arguments.seeds
            for name in arguments.network
            for share in arguments.shares
            for repeat in range(arguments.repeats)
            for rule in arguments.rules
        ]
        for case in cases[index::workers]:
            name, seed, share, rule, repeat = case
            again = f"+{repeat}" if repeat else ""
            path = arguments.out / f"{name}-{seed}-{share}-{rule.replace('/', '_')}{again}.json"
            if path.exists() or case in known:
                continue
            row = train_one(arguments, *case)
            write_text_atomic(path, json.dumps(row), caller="ranking")
            print(f"{row['accuracy']:.4f} {case} {row['widths']} {row['seconds']} s", flush=True)
    rows = [json.loads(path.read_text()) for path in sorted(arguments.out.glob("*.json"))]
    print(report(list((known | {case_of(row): row for row in rows}).values())))


if __name__ == "__main__":
    main()
